"""One run after another: none replaces what is not its own, and a kill takes no more than what was in flight."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from padfree_bench import cli
from padfree_bench.measuring import machine
from padfree_bench.measuring.cases import Case, parse_case
from padfree_bench.measuring.ceilings import Ceilings
from padfree_bench.measuring.inputs import make_inputs
from padfree_bench.measuring.results import FAULT, SECOND_WAVE, Result, Row, load, markdown, save
from padfree_bench.measuring.timing import Effort
from padfree_bench.reports import drawing, plots, readme, report
from padfree_bench.reports.compare import main
from padfree_bench.suites import attention
from padfree_bench.suites.session import ahead, terminal_table
from tiny_bench import CPU, a_row, result_of

SHAPES = "B1-H1-D8-S16,B1-H1-D8-S24"
QUICK = ["attention", "--quick", "--shapes", SHAPES, "--directions", "forward"]


class TestFaults:
    def rows(self) -> list[Row]:
        fault = a_row("sdpa-cudnn", 0.001, status=FAULT, reason="faster than its floor of 1 ms (bytes)")
        return [a_row("padfree", 1.0), a_row("sdpa", 2.0), fault]

    def test_a_fault_is_loud_wherever_it_is_shown(self) -> None:
        result = result_of(self.rows())
        for text in (markdown(result), terminal_table(result)):
            assert "FAULT 0.001 [0.001, 0.001]" in text and "FAULT: 1 figures are faster" in text
        assert "faster than its floor of 1 ms" in terminal_table(result)
        page = report.render([("gpu", result)], {})
        assert "<tr class='fault'>" in page and "FAULT: 1 figures" in page

    def test_a_fault_is_neither_the_best_of_the_others_nor_ours_nor_drawn(self) -> None:
        result = result_of(self.rows())
        assert "| sdpa 2 ms | sdpa 2 ms | **padfree 1 ms**" in readme.table([("gpu", result)])
        assert "sdpa-cudnn" not in readme.table([("gpu", result)])
        result.rows[0].status = FAULT
        assert readme.HEAD not in readme.table([("gpu", result)])

    def test_a_picture_leaves_out_faults_and_anchors(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn: list[list[str]] = []

        def save_figure(figure: Any, stem: Path) -> Path:
            drawn.append([label.get_text() for label in figure.axes[0].get_yticklabels()])
            return stem

        monkeypatch.setattr(drawing, "save_figure", save_figure)
        rows = [*self.rows(), a_row("sdpa" + SECOND_WAVE, 1.0, wave=2), a_row("flex", 1.0, wave=2)]
        rows = [replace(row, direction="step") for row in rows]
        plots.draw_all(result_of(rows), tmp_path)
        assert drawn == [["padfree", "sdpa", "flex"]]

    def test_a_figure_that_became_a_fault_is_lost(self, tmp_path: Path) -> None:
        good = save(result_of([a_row("sdpa", 2.0), a_row("sdpa-cudnn", 1.0)]), tmp_path / "a")
        bad = save(result_of(self.rows()), tmp_path / "b")
        assert main([str(good), str(bad)]) == 1

    def test_the_suite_saves_all_and_ends_with_status_1(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        slow = Ceilings(1.0, {"fp32": 1.0}, 1.0)
        for module in ("session", "attention"):
            monkeypatch.setattr(f"padfree_bench.suites.{module}.measure_ceilings", lambda *_: slow)
        assert cli.main([*QUICK, "--peers", "sdpa", "--output", str(tmp_path)]) == 1
        assert "FAULT: 2 figures" in capsys.readouterr().err
        result = load(next(tmp_path.glob("*/attention.json")))
        assert [row.status for row in result.rows] == [FAULT, FAULT]


class TestFolders:
    @pytest.mark.parametrize(
        ("name", "slug"),
        [
            ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"),
            ("NVIDIA H200", "h200"),
            ("CPU, 2 cores", "cpu-2-cores"),
        ],
    )
    def test_every_card_has_a_folder_of_its_own(
        self, name: str, slug: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(machine, "device_name", lambda device: name)
        assert machine.device_slug(CPU) == slug

    def test_the_suite_writes_into_its_own_cards(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
            monkeypatch.setattr(machine, "device_name", lambda device, name=name: name)
            assert cli.main([*QUICK, "--peers", "sdpa", "--output", str(tmp_path)]) == 0
        found = {path.parent.name: load(path).device for path in tmp_path.glob("*/attention.json")}
        assert found == {"h100-80gb-hbm3-quick": "NVIDIA H100 80GB HBM3", "h200-quick": "NVIDIA H200"}

    def test_figures_of_another_card_are_not_replaced(self, tmp_path: Path) -> None:
        path = save(result_of([a_row("sdpa", 1.0)], "NVIDIA H100", started="now"), tmp_path)
        before = path.read_text()
        with pytest.raises(ValueError, match="holds figures of NVIDIA H100, these are of NVIDIA H200"):
            save(result_of([a_row("sdpa", 1.0)], "NVIDIA H200", started="later"), tmp_path)
        assert path.read_text() == before


class TestEarlierRuns:
    FIRST, SECOND = "2026-11-26T01:12:03+00:00", "2026-11-27T08:00:00+00:00"

    def run(self, started: str, ms: float = 1.0) -> Result:
        return result_of([a_row("sdpa", ms)], started=started)

    def test_a_second_run_keeps_the_first_and_its_own_later_saves_keep_nothing(self, tmp_path: Path) -> None:
        folder = tmp_path / "h200"
        first, second = self.run(self.FIRST), self.run(self.SECOND, 3.0)
        for result in (first, first, second, second):
            save(result, folder)
        (kept,) = folder.glob("earlier/*")
        assert kept.name == "2026-11-26T01-12-03-attention.json" and load(kept) == first
        assert load(folder / "attention.json") == second
        assert [result for _, result in report.collect(tmp_path)] == [second]
        assert main([str(kept), str(folder / "attention.json")]) == 1

    def test_a_quick_run_keeps_nothing(self, tmp_path: Path) -> None:
        for started in (self.FIRST, self.SECOND):
            save(replace(self.run(started), quick=True), tmp_path)
        assert not (tmp_path / "earlier").exists()

    def test_a_file_that_nobody_can_read_is_kept_too(self, tmp_path: Path) -> None:
        (tmp_path / "attention.json").write_text('{"suite": "atten')
        save(self.run(self.FIRST), tmp_path)
        assert (tmp_path / "earlier" / "unknown-attention.json").read_text() == '{"suite": "atten'


class TestSeeds:
    def drawn(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[list[int], int]:
        """(seeds that the inputs were drawn with, the one in the file)."""
        seeds: list[int] = []

        def recorded(case: Case, device: Any, seed: int = 0) -> Any:
            seeds.append(seed)
            return make_inputs(case, device, seed)

        monkeypatch.setattr(attention, "make_inputs", recorded)
        assert cli.main([*QUICK, "--peers", "sdpa", "--output", str(tmp_path), *options]) == 0
        return seeds, load(next(tmp_path.glob("*/attention.json"))).environment["seed"]

    def test_each_run_draws_its_own_and_notes_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runs = [self.drawn(tmp_path / name, monkeypatch) for name in "abc"]
        for seeds, noted in runs:
            assert seeds == [noted, noted]
        assert len({noted for _, noted in runs}) > 1

    def test_a_run_repeats_with_the_seed_of_another(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.drawn(tmp_path, monkeypatch, "--seed", "5") == ([5, 5], 5)

    def test_another_seed_draws_other_inputs(self) -> None:
        case = parse_case("B1-H1-D8-S16")
        one, same, other = (make_inputs(case, CPU, seed).query for seed in (1, 1, 2))
        assert torch.equal(one, same) and not torch.equal(one, other)


class TestCommit:
    @pytest.fixture(autouse=True)
    def without_git(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("PADFREE_COMMIT", raising=False)
        monkeypatch.setattr(machine, "output", lambda *command: None)
        monkeypatch.setattr(machine, "CARRIED_COMMIT", tmp_path / "commit")

    def carry(self, sources: str) -> None:
        content = {"commit": "a" * 40, "clean": True, "sources": sources}
        machine.CARRIED_COMMIT.write_text(json.dumps(content))

    def test_a_copy_without_history_reads_the_file_that_came_along(self) -> None:
        self.carry(machine.sources_digest())
        environment = machine.environment(CPU, ["attention"])
        assert (environment["commit"], environment["commit_is_clean"]) == ("a" * 40, True)

    def test_a_copy_whose_history_ends_early_reads_it_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.carry(machine.sources_digest())
        answers = {"status": " M x", "rev-parse": "b" * 40}
        monkeypatch.setattr(machine, "output", lambda *command: answers[command[1]])
        assert machine.commit() == ("a" * 40, True)

    @pytest.mark.parametrize("text", ["", "[]", '{"commit": "a"}'])
    def test_a_file_that_says_nothing_is_no_commit(self, text: str) -> None:
        assert machine.commit() == (None, None)
        machine.CARRIED_COMMIT.write_text(text)
        assert machine.commit() == (None, None)

    def test_git_knows_better_than_a_file_from_yesterday(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.carry("of other sources")
        answers = {"status": " M x", "rev-parse": "b" * 40}
        monkeypatch.setattr(machine, "output", lambda *command: answers[command[1]])
        assert machine.commit() == ("b" * 40, False)
        monkeypatch.setenv("PADFREE_COMMIT", "c" * 40)
        assert machine.commit()[0] == "c" * 40


@pytest.mark.parametrize("options", [[], ["--no-pictures"]])
def test_pictures_may_wait_for_the_report(options: list[str], tmp_path: Path) -> None:
    line = "attention --quick --shapes B1-H1-D8-S16 --peers sdpa --directions forward"
    assert cli.main([*line.split(), "--output", str(tmp_path), *options]) == 0
    assert any(tmp_path.glob("*/plots")) == (not options)


def test_what_does_not_fit_costs_its_case_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compute_truth(inputs: Any) -> Any:
        if inputs.case.seq == 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(inputs)

    real = attention.compute_truth
    monkeypatch.setattr(attention, "compute_truth", compute_truth)
    assert cli.main([*QUICK, "--peers", "sdpa", "--output", str(tmp_path)]) == 0
    result = load(next(tmp_path.glob("*/attention.json")))
    assert [row.seq for row in result.rows] == [24] and len(result.not_reached) == 1
    assert "out of memory, the next case may fit" in capsys.readouterr().err


def test_how_long_it_takes_is_said_before_and_a_remark_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An upper bound errs by another figure in every case; its remark is one and the same."""
    arguments = [*QUICK, "--peers", "sdpa,sdpa-flash-nomask", "--minutes", "5", "--output", str(tmp_path)]
    arguments[arguments.index(SHAPES)] = "B2-H1-D8-S16-pad50,B2-H1-D8-S24-pad50"
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    said = "attention: 2 cases, 2 timings, 1 s if calls are fast to 30 s if slow, checks on top"
    assert f"{said}; no further case starts after 5 min\n" in captured.err
    assert captured.err.index(said) < captured.err.index("saved ")
    assert captured.out.count("sdpa-flash-nomask: no mask") == 1


def test_a_remark_that_differs_in_a_figure_alone_stands_once() -> None:
    wrong = "wrong answer, not timed: relative error out {} (limit 4e-02)"
    rows = [a_row("flex", 1.0, reason=wrong.format(error)) for error in ("1.5e-01", "2.5e-01", "nan")]
    rows += [a_row("sdpa", 1.0, reason=f"faster than its floor of {ms} ms (exp2)") for ms in ("12", "0.3")]
    rows += [a_row(f"fa{n}", 1.0, reason=f"FlashAttention-{n} is not installed") for n in (2, 4)]
    remarks = terminal_table(result_of(rows)).partition("remarks:\n")[2].splitlines()
    assert remarks == [
        f"  flex: {wrong.format('1.5e-01')} (and 1 with other figures)",
        f"  flex: {wrong.format('nan')}",
        "  sdpa: faster than its floor of 12 ms (exp2) (and 1 with other figures)",
        "  fa2: FlashAttention-2 is not installed",
        "  fa4: FlashAttention-4 is not installed",
    ]


def test_where_nothing_is_timed_no_time_is_told() -> None:
    said = ahead("memory", 5, 0, Effort(), None)
    assert said == "memory: 5 cases, nothing is timed, checks on top"
    assert "360 timings, 12 min if calls are fast to 90 min if slow" in ahead("x", 120, 3, Effort(), None)
