"""What the benchmark suite times: real lengths, only peers with the right answer, all of them in turn."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import padfree
from padfree_bench import cli
from padfree_bench.measuring import timing
from padfree_bench.measuring.cases import HEADS, choose_cases, groups, parse_case
from padfree_bench.measuring.ceilings import Ceilings, Work, work
from padfree_bench.measuring.check import compute_truth
from padfree_bench.measuring.inputs import make_inputs
from padfree_bench.measuring.lengths import imdb_histogram, imdb_lengths, make_lengths
from padfree_bench.measuring.profiling import peak_bytes
from padfree_bench.measuring.results import FAULT, OK, UPPER_BOUND, load
from padfree_bench.measuring.timing import Effort, Sample, measure
from padfree_bench.peers import PEERS
from padfree_bench.suites import attention, contenders
from tiny_bench import CEILINGS, CPU, SMALL, rows_of


class TestLengths:
    def test_the_histogram_is_that_of_the_25000_training_reviews(self) -> None:
        lengths, counts = imdb_histogram()
        assert counts.sum() == 25_000
        assert np.minimum(lengths, 400) @ counts / 25_000 == pytest.approx(254, abs=1)
        assert lengths.max() == 3127

    @pytest.mark.parametrize(("cut", "linear", "quadratic"), [(400, 0.636, 0.477), (512, 0.538, 0.363)])
    def test_a_batch_is_as_full_as_all_reviews_are(self, cut: int, linear: float, quadratic: float) -> None:
        drawn = imdb_lengths(64, cut)
        assert drawn.mean() / cut == pytest.approx(linear, abs=0.01)
        assert (drawn**2).mean() / cut**2 == pytest.approx(quadratic, abs=0.01)
        assert drawn.max() == cut and drawn.min() >= 1

    @pytest.mark.parametrize("percent", range(0, 100, 10))
    def test_the_padding_sweep_leaves_the_fraction_it_names(self, percent: int) -> None:
        assert 1 - make_lengths(f"pad{percent:02d}", 64, 512).mean() / 512 == pytest.approx(
            percent / 100, abs=0.01
        )

    def test_an_unknown_kind_is_named(self) -> None:
        with pytest.raises(ValueError, match="got 'long'"):
            make_lengths("long", 2, 8)


class TestCases:
    def test_the_gpu_groups_hold_what_the_suite_promises(self) -> None:
        named = groups("cuda")
        assert {(c.heads, c.head_dim) for c in named["imdb"]} == set(HEADS)
        assert {c.seq for c in named["imdb"]} == {400, 512}
        assert min(c.seq for c in named["length"]) == 128 and max(c.seq for c in named["length"]) == 65536
        assert [c.lengths for c in named["padding"]] == [f"pad{p:02d}" for p in range(0, 100, 10)]
        assert {c.dtype for c in choose_cases("cuda", None, None, False)} == {"fp32", "fp16", "bf16"}

    def test_an_id_parses_back_to_its_case(self) -> None:
        for case in groups("cuda")["imdb"]:
            assert replace(parse_case(case.id), group=case.group) == case

    @pytest.mark.parametrize("option", ["--shapes", "--dtypes", "--peers", "--directions"])
    @pytest.mark.parametrize("suite", ["attention", "memory", "encoder", "hf"])
    def test_a_wrong_argument_is_one_line_and_status_2(
        self, suite: str, option: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main([suite, "--quick", option, "magic"]) == 2
        assert capsys.readouterr().err.count("\n") == 1

    @pytest.mark.parametrize("arguments", [["--shapes", "imdb"], ["--dtypes", "fp8"], ["--peers", "magic"]])
    def test_so_is_one_of_the_train_suite(
        self, arguments: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["train", "--quick", *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1

    @pytest.mark.parametrize(
        "line",
        ["train --directions both", "encoder --twice", "train --twice", "hf --twice", "memory --twice"],
    )
    def test_an_option_without_a_meaning_in_a_suite_is_no_option_of_it(self, line: str) -> None:
        with pytest.raises(SystemExit, match="2"):
            cli.main([*line.split(), "--quick"])

    @pytest.mark.parametrize("line", ["encoder --directions backward", "hf --directions forward,backward"])
    def test_the_backward_of_a_model_alone_is_refused(
        self, line: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main([*line.split(), "--quick"]) == 2
        assert "must be forward (inference) or both (training)" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "line",
        ["attention --peers sdpa", "memory --shapes length", "encoder --dtypes fp32", "hf --directions both"],
    )
    def test_a_part_of_a_suite_needs_a_label(
        self, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main([*line.split(), "--output", str(tmp_path)]) == 2
        assert "must come with --label" in capsys.readouterr().err and list(tmp_path.iterdir()) == []

    def test_a_quick_look_at_memory_takes_its_dtypes(self, tmp_path: Path) -> None:
        line = "memory --quick --peers sdpa --directions forward --dtypes bf16"
        assert cli.main([*line.split(), "--output", str(tmp_path)]) == 0
        rows = load(next(tmp_path.glob("*/memory.json"))).rows
        assert [row.dtype for row in rows] == ["bf16", "bf16"] and rows[0].peak_mib

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_all_groups_come_in_turn_each_in_its_own_order(self, device: str) -> None:
        cases = choose_cases(device, None, None, False)
        assert [case.group for case in cases[:10]] == ["imdb", "full", "padding", "length", "batch"] * 2
        for name, group in groups(device).items():
            assert [case for case in cases if case.group == name][: len(group)] == group


class TestTruth:
    def test_it_equals_the_reference_differentiated_in_fp64(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Chunks of a few rows, so that the sums over chunks are exercised.
        monkeypatch.setitem(
            __import__("padfree_bench.measuring.inputs", fromlist=["x"]).CHUNK_ELEMENTS, "cpu", 300
        )
        inputs = make_inputs(SMALL, CPU)
        leaves = [x.double().requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
        out = padfree.reference(*leaves, inputs.padding)
        assert isinstance(out, torch.Tensor)
        grads = torch.autograd.grad(out, leaves, inputs.d_out.double())
        truth, keep = compute_truth(inputs), inputs.keep[:, None, :, None]
        for actual, expected in zip(
            (truth.out, truth.d_query, truth.d_key, truth.d_value), (out, *grads), strict=True
        ):
            torch.testing.assert_close(actual * keep, expected * keep, rtol=1e-12, atol=1e-12)


class TestMeasures:
    def test_repetitions_are_interleaved(self) -> None:
        order: list[str] = []
        calls = {name: (lambda name=name: order.append(name)) for name in "AB"}
        measure(calls, CPU, Effort(seconds=1, least=3, most=3, warmup=1))
        assert "".join(order) == "AB" * 4

    def test_two_runs_of_one_peer_differ_by_less_than_their_interval(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        random = np.random.default_rng(0)

        def one_run() -> dict[str, object]:
            now = [0.0]

            def call() -> None:
                now[0] += 1e-3 * random.lognormal(0, 0.05)

            monkeypatch.setattr(timing, "perf_counter", lambda: now[0])
            return measure({str(case): call for case in range(100)}, CPU, Effort(2, 10, 10, 1))  # type: ignore[return-value]

        first, second = one_run(), one_run()
        agree = sum(abs(first[n].p50 - second[n].p50) < first[n].p80 - first[n].p20 for n in first)  # type: ignore[attr-defined]
        assert agree >= 90

    def test_useful_work_counts_real_tokens_only(self) -> None:
        inputs = make_inputs(replace(SMALL, lengths="full"), CPU)
        pairs, rows = 3 * 2 * 40 * 40, 3 * 2 * 40
        forward, both = work(inputs, "forward"), work(inputs, "both")
        assert (forward.flops, forward.moved, forward.exp2) == (4 * pairs * 8, 4 * rows * 8 * 4, pairs)
        assert (both.flops, both.moved) == (3.5 * forward.flops, 12 * rows * 8 * 4 + 2 * 4 * rows)
        assert work(make_inputs(SMALL, CPU), "forward").flops < 0.5 * forward.flops

    def test_the_floor_is_the_slowest_unit(self) -> None:
        assert CEILINGS.floor(Work(1e11, 1e8, 1e9, 0, 0), "fp32") == (1e3, "matrix")
        assert CEILINGS.floor(Work(1e9, 1e8, 1e10, 0, 0), "fp32") == (1e3, "bytes")
        assert CEILINGS.floor(Work(1e9, 1e9, 1e9, 0, 0), "fp32") == (1e3, "exp2")

    def test_the_floor_counts_no_byte_that_a_cache_may_keep(self) -> None:
        """Read again or still unwritten at the end, up to the cache's size each; never what is read first."""
        ceilings = replace(CEILINGS, l2_bytes=100)
        assert ceilings.memory_bytes(Work(0, 0, first=1000, again=0, written=0)) == 1000
        assert ceilings.memory_bytes(Work(0, 0, first=1000, again=80, written=60)) == 1000
        assert ceilings.memory_bytes(Work(0, 0, first=1000, again=180, written=160)) == 1000 + 80 + 60

    def test_a_gpu_reads_its_inputs_cold_and_a_cpu_may_have_them_from_the_last_repetition(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inputs, kinds = make_inputs(SMALL, CPU), ("forward", "backward", "both")
        assert [work(inputs, kind).first for kind in kinds] == [0, 0, 0]
        warm = [work(inputs, kind) for kind in kinds]
        monkeypatch.setattr(type(inputs), "device", torch.device("cuda"))
        cold = [work(inputs, kind) for kind in kinds]
        assert [x.moved for x in cold] == [x.moved for x in warm]
        tensor, lse = inputs.tokens * 2 * 8 * 4, inputs.tokens * 2 * 4
        assert [(x.first, x.again) for x in cold] == [
            (3 * tensor, 0),
            (5 * tensor + lse, 0),
            (4 * tensor, 4 * tensor + lse),
        ]

    def test_a_figure_below_its_floor_is_a_fault_whatever_else_its_row_says(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(attention, "measure_ceilings", lambda *_: Ceilings(1.0, {"fp32": 1.0}, 1.0))
        slow, inputs = Ceilings(1.0, {"fp32": 1.0}, 1.0), make_inputs(SMALL, CPU)
        peers = [PEERS["sdpa"], PEERS["sdpa-flash-nomask"]]
        rows = {row.peer: row for row in rows_of(SMALL, peers, ["forward"], slow)}
        assert rows["sdpa"].status == FAULT and "faster than its floor of " in rows["sdpa"].reason
        # It computes something else, for which this is no floor.
        assert rows["sdpa-flash-nomask"].status == UPPER_BOUND
        row = replace(rows["sdpa"], status=OK, reason="launches not counted", ms_p50=1e9, graph_ms=1.0)
        attention.fill_speed(row, inputs, "forward", slow)
        assert row.status == FAULT
        assert row.reason.startswith("launches not counted; as a graph faster than its floor of ")

    def test_ceilings_are_measured_anew_before_a_figure_is_called_a_fault(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[set[str]] = []

        def measured(device: torch.device, dtypes: set[str]) -> Ceilings:
            asked.append(dtypes)
            return Ceilings(1.0, {"fp32": 1e15}, 1e15)

        monkeypatch.setattr(attention, "measure_ceilings", measured)
        disturbed = Ceilings(1e15, {"fp32": 1.0}, 1.0)
        (row,) = rows_of(SMALL, [PEERS["sdpa"]], ["forward"], disturbed)
        assert (row.status, row.reason, asked) == (OK, "", [{"fp32"}])
        assert disturbed == Ceilings(1e15, {"fp32": 1e15}, 1e15)

    def test_a_call_that_was_issued_too_slowly_for_its_events_is_marked(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for host_us in (400.0, 600.0):
            sample = Sample(1e3, 1e3, 1e3, 5, host_us)
            monkeypatch.setattr(contenders, "measure", lambda *_, kept=sample, **__: {"sdpa": kept})
            (row,) = rows_of(SMALL, [PEERS["sdpa"]], ["forward"])
            assert (row.reason == attention.HOST_BOUND) == (host_us > 500)

    def test_peak_memory_counts_what_is_held_at_once(self) -> None:
        def call() -> None:
            for _ in range(4):
                torch.empty(2**20, dtype=torch.uint8).add_(1)

        assert 2**20 <= peak_bytes(call, CPU) < 2.2 * 2**20
