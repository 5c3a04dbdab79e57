"""`python -m bench compare`: a slowdown does not hide, noise is none, a lost figure is not forgotten."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

import tiny_bench
from padfree_bench.measuring import timing
from padfree_bench.measuring.results import NOT_RUN, Result, Row, save
from padfree_bench.measuring.timing import Effort, measure
from padfree_bench.reports.compare import changes, main
from tiny_bench import CPU


def environment(device: str = "CPU, 2 cores", kind: str = "cpu") -> dict[str, object]:
    return {
        "device": device,
        "device_type": kind,
        "versions": {"torch": "2", "triton": "3"},
        "command": "c",
        "commit": "d" * 40,
    }


def a_row(peer: str, ms: float, case: str = "c", spread: float = 0.02) -> Row:
    return tiny_bench.a_row(peer, ms, case, spread)


class TestCompare:
    def write(self, folder: Path, name: str, rows: list[Row], **changed: object) -> Path:
        folder = folder / name
        return save(Result("attention", environment() | changed, rows), folder)

    def test_a_planted_slowdown_of_a_fifth_is_caught(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = self.write(tmp_path, "a", [a_row("padfree", 1.0), a_row("sdpa", 2.0)])
        after = self.write(tmp_path, "b", [a_row("padfree", 1.2), a_row("sdpa", 2.02)])
        assert main([str(before), str(after)]) == 1
        printed = capsys.readouterr().out
        assert "padfree: 1 [0.98, 1.02] -> 1.2" in printed and "1 slower" in printed

    def test_the_same_figures_pass_and_so_does_noise(self, tmp_path: Path) -> None:
        before = self.write(tmp_path, "a", [a_row("padfree", 1.0, spread=0.15)])
        after = self.write(tmp_path, "b", [a_row("padfree", 1.1, spread=0.15)])
        assert main([str(before), str(before)]) == 0
        assert main([str(before), str(after)]) == 0

    def test_a_peer_that_lost_its_figure_is_not_forgotten(self, tmp_path: Path) -> None:
        before = self.write(tmp_path, "a", [a_row("padfree", 1.0), a_row("sdpa", 1.0)])
        gone = Row("attention", "c", "imdb", "forward", "padfree", NOT_RUN, reason="out of memory")
        after = self.write(tmp_path, "b", [gone, a_row("sdpa", 1.0)])
        assert main([str(before), str(after)]) == 1

    def test_several_runs_of_each_side_count_what_differs_between_runs_as_noise(self, tmp_path: Path) -> None:
        """One run a side takes a machine's slow hour for a slower kernel; two a side do not, and still see a fifth."""
        calm, slow = (self.write(tmp_path, n, [a_row("padfree", ms)]) for n, ms in (("a", 1.0), ("b", 1.25)))
        assert main([str(calm), str(slow)]) == 1
        assert main([f"{calm},{slow}", f"{slow},{calm}"]) == 0
        worse = self.write(tmp_path, "c", [a_row("padfree", 1.5)])
        assert main([f"{calm},{slow}", f"{worse},{worse}"]) == 1

    def test_a_figure_that_one_of_several_runs_lost_is_not_forgotten(self, tmp_path: Path) -> None:
        before = self.write(tmp_path, "a", [a_row("padfree", 1.0), a_row("sdpa", 1.0)])
        gone = Row("attention", "c", "imdb", "forward", "padfree", NOT_RUN, reason="out of memory")
        after = self.write(tmp_path, "b", [gone, a_row("sdpa", 1.0)])
        assert main([str(before), f"{before},{after}"]) == 1

    def test_a_row_that_vanished_is_lost_and_a_case_that_was_not_reached_is_named_apart(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = self.write(
            tmp_path, "a", [a_row("padfree", 1.0), a_row("sdpa", 1.0), a_row("sdpa", 1.0, "late")]
        )
        result = Result("attention", environment(), [a_row("sdpa", 1.0)], not_reached=["late"])
        after = save(result, tmp_path / "b")
        assert main([str(before), str(after)]) == 1
        printed = capsys.readouterr().out
        assert "no figure any more:\n  c forward padfree: not in the file\n" in printed
        assert "not reached within the time given:\n  late forward sdpa\n" in printed
        assert "1 lost, 1 not reached" in printed
        assert main([str(after), str(before)]) == 0
        late = self.write(tmp_path, "c", [a_row("sdpa", 1.0), a_row("sdpa", 1.0, "late")])
        assert main([str(late), str(after)]) == 1

    @pytest.mark.parametrize(
        ("changed", "status"),
        [
            ({"cuda": "13"}, 0),
            ({"torch_threads": 8}, 0),
            ({"versions": {"torch": "3"}}, 0),
            ({"cpu": "another"}, 2),
            ({"device": "another"}, 2),
            ({"device_type": "cuda", "cpu": "another"}, 0),
        ],
    )
    def test_another_machine_is_noted_and_another_device_refused(
        self, changed: dict[str, object], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        kind = {"device_type": changed.get("device_type", "cpu")}
        before = self.write(tmp_path, "a", [a_row("sdpa", 1.0)], **kind)
        after = self.write(tmp_path, "b", [a_row("sdpa", 1.0)], **changed)
        assert main([str(before), str(after)]) == status
        captured = capsys.readouterr()
        assert captured.err.count("\n") == (status == 2) and ("note: " in captured.out) == (status == 0)

    @pytest.mark.parametrize("threshold", ["-1", "nan", "inf"])
    def test_a_threshold_that_means_nothing_is_one_line_and_status_2(
        self, threshold: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = str(self.write(tmp_path, "a", [a_row("sdpa", 1.0)]))
        assert main([file, file, "--threshold", threshold]) == 2
        assert capsys.readouterr().err.count("\n") == 1

    @pytest.mark.parametrize("time", [0.0, -1.0, math.nan])
    def test_a_time_that_cannot_be_is_one_line_and_status_2(
        self, time: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = str(self.write(tmp_path, "a", [a_row("sdpa", 1.0)]))
        bad = str(self.write(tmp_path, "b", [replace(a_row("sdpa", 1.0), ms_p50=time)]))
        assert main([bad, file]) == main([file, bad]) == 2
        assert capsys.readouterr().err.count("\n") == 2

    def test_a_real_call_that_does_a_fifth_more_work_is_slower(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [0.0]

        def call(seconds: float) -> None:
            now[0] += seconds * (1 + 0.02 * math.sin(1e6 * now[0]))

        calls = {"before": lambda: call(1e-3), "after": lambda: call(1.2e-3)}
        monkeypatch.setattr(timing, "perf_counter", lambda: now[0])
        samples = measure(calls, CPU, Effort(1, 20, 20, 1))
        rows = {
            n: replace(a_row("p", 1), ms_p20=s.p20, ms_p50=s.p50, ms_p80=s.p80) for n, s in samples.items()
        }
        (change,) = changes(*(Result("s", environment(), [rows[n]]) for n in ("before", "after")))
        assert change.slower and change.ratio == pytest.approx(1.2, abs=0.02)

    def test_a_file_that_is_no_result_is_one_line_and_status_2(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "x.json").write_text("{}")
        assert main([str(tmp_path / "x.json")] * 2) == 2
        assert capsys.readouterr().err.count("\n") == 1
