"""What the benchmark suite reports: no figure made up, none lost, and a slowdown does not hide."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from padfree_bench import cli
from padfree_bench.measuring import timing
from padfree_bench.measuring.cases import Case
from padfree_bench.measuring.errors import first_line
from padfree_bench.measuring.inputs import make_inputs
from padfree_bench.measuring.results import (
    FAULT,
    NOT_RUN,
    OK,
    Result,
    Row,
    from_json,
    load,
    markdown,
    save,
    to_json,
)
from padfree_bench.measuring.timing import Effort, measure
from padfree_bench.peers import Peer
from padfree_bench.reports import readme, report
from padfree_bench.reports.compare import changes, main
from padfree_bench.reports.drawing import not_run
from padfree_bench.suites import attention
from padfree_bench.suites.attention import admit

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def environment(device: str = "CPU, 2 cores", kind: str = "cpu") -> dict[str, object]:
    return {
        "device": device,
        "device_type": kind,
        "versions": {"torch": "2", "triton": "3"},
        "command": "c",
        "commit": "d" * 40,
    }


def a_row(peer: str, ms: float, case: str = "c", direction: str = "forward", spread: float = 0.02) -> Row:
    return Row(
        "attention",
        case,
        "imdb",
        direction,
        peer,
        OK,
        ms_p20=ms * (1 - spread),
        ms_p50=ms,
        ms_p80=ms * (1 + spread),
    )


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


class TestResults:
    def test_a_file_reads_back_as_it_was_written(self) -> None:
        result = Result("attention", environment(), [a_row("sdpa", 1.5)], {"bytes_per_s": 1e9}, True, ["x"])
        assert from_json(to_json(result)) == result

    def test_reasons_reach_the_table(self) -> None:
        row = Row("attention", "c", "imdb", "forward", "xformers", NOT_RUN, reason="not installed | here")
        assert "not run | not installed \\| here" in markdown(Result("attention", environment(), [row]))

    def test_a_run_without_a_case_in_time_writes_nothing(self, tmp_path: Path) -> None:
        arguments = ["attention", "--quick", "--shapes", "B1-H1-D8-S16,B1-H1-D8-S24", "--peers", "sdpa"]
        cli.main([*arguments, "--minutes", "1e-9", "--output", str(tmp_path)])
        assert list(tmp_path.iterdir()) == []

    def test_a_run_that_measured_nothing_leaves_the_last_good_file_alone(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = [
            "attention",
            "--quick",
            "--shapes",
            "B1-H1-D8-S16,B1-H1-D8-S24",
            "--output",
            str(tmp_path),
        ]
        assert cli.main([*arguments, "--peers", "sdpa"]) == 0
        (path,) = tmp_path.glob("*/attention.json")
        before = path.read_text()
        capsys.readouterr()
        assert cli.main([*arguments, "--peers", "sdpa", "--minutes", "1e-9"]) == 2
        assert cli.main([*arguments, "--peers", "padfree"]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("nothing was measured") == 2 and "no GPU" in captured.out
        assert path.read_text() == before

    @pytest.mark.parametrize("found_by", ["check", "clock"])
    def test_a_lost_gpu_ends_the_run_with_what_was_saved(
        self,
        found_by: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def fail() -> None:
            raise torch.AcceleratorError("illegal memory access")

        def run_case(session: object, case: Case, *rest: object, **options: object) -> list[list[Row]]:
            if case.seq == 24 and found_by == "clock":
                fail()
            if case.seq == 24:
                admit(Peer("bad", lambda inputs, training: fail(), ""), make_inputs(case, CPU), None, False)  # type: ignore[arg-type, return-value]
            return [[a_row("sdpa", 1.0, case.id)]]

        monkeypatch.setattr(torch.cuda, "synchronize", fail)
        monkeypatch.setattr(attention, "run_case", run_case)
        shapes = "B1-H1-D8-S16,B1-H1-D8-S24,B1-H1-D8-S32"
        assert cli.main(["attention", "--quick", "--shapes", shapes, "--output", str(tmp_path)]) == 1
        assert "illegal memory access" in capsys.readouterr().err
        result = load(next(tmp_path.glob("*/attention.json")))
        assert [row.seq for row in result.rows] == [None] and len(result.not_reached) == 2

    def test_a_refused_launch_costs_its_row_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        assert first_line(torch.AcceleratorError("invalid argument")).endswith("invalid argument")

    def test_the_command_writes_tables_pictures_and_a_page(self, tmp_path: Path) -> None:
        shapes = "B2-H2-D8-S16,B2-H2-D8-S32"
        arguments = [
            "attention",
            "--quick",
            "--shapes",
            shapes,
            "--peers",
            "padfree,sdpa",
            "--directions",
            "forward",
        ]
        assert cli.main([*arguments, "--output", str(tmp_path)]) == 0
        assert cli.main(["report", "--results", str(tmp_path)]) == 0
        (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
        assert {p.name for p in folder.iterdir()} >= {
            "attention.json",
            "attention.csv",
            "attention.md",
            "plots",
        }
        assert list(folder.glob("plots/*.png"))
        result = load(folder / "attention.json")
        assert not_run(result.rows) == "padfree: not run (no GPU)"
        page = (tmp_path / "index.html").read_text()
        assert "<b>padfree</b>: no GPU" in page and "<svg" in page and "No GPU was measured yet" in page
        recorded = json.loads((folder / "attention.json").read_text())
        assert recorded["environment"]["command"].startswith("python -m bench attention --quick")
        assert recorded["ceilings"]["bytes_per_s"] > 0


def agrees(path: Path, results: list[tuple[str, Result]]) -> bool:
    """Whether this README says what the files say."""
    text = path.read_text()
    return readme.rewrite(text, readme.table(results)) == text


class TestReadme:
    def results(self) -> list[tuple[str, Result]]:
        case = "B64-H12-D64-S400-imdb-bf16"
        rows = [a_row("padfree-skip", 0.07, case), a_row("sdpa", 0.21, case), a_row("sdpa-math", 0.9, case)]
        return [("gpu", Result("attention-imdb", environment("GPU", "cuda"), rows))]

    def test_the_table_is_made_from_the_files(self) -> None:
        text = readme.rewrite(
            f"top\n{readme.BEGIN}\noutdated\n{readme.END}\nend\n", readme.table(self.results())
        )
        assert text.startswith("top\n") and text.endswith("\nend\n") and "outdated" not in text
        assert "| sdpa 0.21 ms | sdpa 0.21 ms | **padfree-skip 0.07 ms**" in text and "3.00x" in text

    def test_a_case_we_lose_stands_there_too(self) -> None:
        ((_, result),) = results = self.results()
        result.rows[0] = a_row("padfree-skip", 0.42, result.rows[0].case)
        assert "0.50x" in readme.table(results)

    def test_a_case_measured_again_later_on_the_same_card_stands_once(self) -> None:
        ((_, first),) = results = self.results()
        first.environment["started"] = "2026-11-26T10:00:00+00:00"
        case = first.rows[0].case
        later = Result(
            "attention-table",
            environment("GPU", "cuda"),
            [a_row("padfree-skip", 0.06, case), a_row("sdpa", 0.2, case)],
        )
        later.environment["started"] = "2026-11-26T10:05:00+00:00"
        text = readme.table([*results, ("gpu", later)])
        assert "**padfree-skip 0.06 ms**" in text and "0.07 ms" not in text
        assert "0.07 ms" in readme.table([*results, ("another card", later)])

    @pytest.mark.parametrize("kept", [["sdpa"], ["padfree-skip"], ["sdpa", "sdpa-math"]])
    def test_a_later_run_of_some_peers_replaces_no_case_that_it_cannot_stand_for(
        self, kept: list[str]
    ) -> None:
        ((_, first),) = results = self.results()
        first.environment["started"] = "2026-11-26T10:00:00+00:00"
        later = Result(
            "attention-some",
            environment("GPU", "cuda") | {"started": "2026-11-26T10:05:00+00:00"},
            [replace(row, ms_p50=0.06) for row in first.rows if row.peer in kept],
        )
        assert "**padfree-skip 0.07 ms**" in readme.table([*results, ("gpu", later)])
        faulty = [replace(row, status=FAULT if row.peer == "padfree-skip" else OK) for row in first.rows]
        assert "**padfree-skip 0.07 ms**" in readme.table([*results, ("gpu", replace(later, rows=faulty))])

    def test_without_a_gpu_file_it_says_not_measured_yet(self) -> None:
        assert "On a GPU: not measured yet" in readme.table([])

    def test_rows_of_ours_alone_make_no_line(self) -> None:
        ((_, result),) = results = self.results()
        del result.rows[1:]
        assert readme.HEAD not in readme.table(results)
        result.rows[0] = a_row("sdpa", 1.0, result.rows[0].case)
        assert readme.HEAD not in readme.table(results)

    def test_skipped_rows_are_owned_up_to_where_they_stand(self) -> None:
        ((_, result),) = results = self.results()
        assert "leave rows at padding uncomputed" in readme.table(results)
        result.rows[0] = a_row("padfree", 0.07, result.rows[0].case)
        assert "uncomputed" not in readme.table(results)

    def test_a_changed_figure_is_noticed(self, tmp_path: Path) -> None:
        path = tmp_path / "README.md"
        path.write_text(f"{readme.BEGIN}\n{readme.table(self.results())}\n{readme.END}\n")
        assert agrees(path, self.results())
        path.write_text(path.read_text().replace("0.07 ms", "0.05 ms"))
        assert not agrees(path, self.results())

    def test_readme_and_the_committed_files_agree(self) -> None:
        path = ROOT / "README.md"
        if not path.exists() or readme.BEGIN not in path.read_text():
            pytest.skip("README.md holds no benchmark markers")
        assert agrees(path, report.collect(ROOT / "bench" / "results")), (
            "README differs from bench/results: run python -m bench report --readme README.md"
        )


class TestEntryPoints:
    def test_python_m_bench_lists_every_command(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "bench", "--help"], cwd=ROOT, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0
        for name in (
            "attention",
            "memory",
            "encoder",
            "train",
            "hf",
            "compile-report",
            "tune",
            "report",
            "compare",
        ):
            assert name in done.stdout

    def test_the_command_has_one_form_in_every_message_and_page(self) -> None:
        files = [*(ROOT / "bench").rglob("*.py"), *ROOT.glob("*.md"), *(ROOT / "bench").glob("*.md")]
        assert [path.name for path in files if "python3 -m bench" in path.read_text()] == []

    def test_make_help_lists_every_target(self) -> None:
        text = (ROOT / "Makefile").read_text()
        (targets,) = re.findall(r"^\.PHONY: (.*)", text, re.MULTILINE)
        told = re.findall(r"^([a-z-]+):.*##", text, re.MULTILINE)
        assert set(targets.split()) - set(told) == {"help"}

    def test_pytest_bench_runs_the_same_cases_with_and_without_timing(self, tmp_path: Path) -> None:
        base = [
            sys.executable,
            "-m",
            "pytest",
            "bench",
            "-q",
            "-p",
            "no:cacheprovider",
            "-o",
            "python_files=bench_*.py",
        ]
        base += ["-k", "S128 and forward and (sdpa-math or padfree-skip)"]
        saved = tmp_path / "b.json"
        # pytest-benchmark times nothing where it believes itself a worker of pytest-xdist.
        alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        for extra in ([f"--benchmark-json={saved}"], ["--benchmark-disable"]):
            done = subprocess.run(
                [*base, *extra], cwd=ROOT, env=alone, check=False, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout + done.stderr
            assert "1 passed" in done.stdout
        (entry,) = json.loads(saved.read_text())["benchmarks"]
        assert entry["group"].endswith("forward")
        assert entry["extra_info"]["tokens_per_s"] > 0 and entry["extra_info"]["relative_error"] < 1e-4
