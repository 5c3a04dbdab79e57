"""What the benchmark suite reports: no figure made up, none lost, and a slowdown does not hide."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from padfree_bench import cli
from padfree_bench.measuring.cases import Case
from padfree_bench.measuring.errors import first_line
from padfree_bench.measuring.inputs import make_inputs
from padfree_bench.measuring.results import NOT_RUN, Row, from_json, load, markdown, to_json
from padfree_bench.peers import Peer
from padfree_bench.reports.drawing import not_run
from padfree_bench.suites import attention
from padfree_bench.suites.attention import admit
from tiny_bench import CPU, ROOT, a_row, result_of


class TestResults:
    def test_a_file_reads_back_as_it_was_written(self) -> None:
        result = replace(result_of([a_row("sdpa", 1.5)], "CPU, 2 cores"), quick=True, not_reached=["x"])
        assert from_json(to_json(result)) == result

    def test_reasons_reach_the_table(self) -> None:
        row = Row("attention", "c", "imdb", "forward", "xformers", NOT_RUN, reason="not installed | here")
        assert "not run | not installed \\| here" in markdown(result_of([row]))

    def test_a_run_without_a_case_in_time_writes_nothing(self, tmp_path: Path) -> None:
        arguments = ["attention", "--quick", "--shapes", "B1-H1-D8-S16,B1-H1-D8-S24", "--peers", "sdpa"]
        cli.main([*arguments, "--minutes", "1e-9", "--output", str(tmp_path)])
        assert list(tmp_path.iterdir()) == []

    def test_a_run_that_measured_nothing_leaves_the_last_good_file_alone(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shapes = "B1-H1-D8-S16,B1-H1-D8-S24"
        arguments = ["attention", "--quick", "--shapes", shapes, "--output", str(tmp_path)]
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
            return [[a_row("sdpa", 1.0, case.id, seq=None)]]

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
        line = f"attention --quick --shapes {shapes} --peers padfree,sdpa --directions forward"
        assert cli.main([*line.split(), "--output", str(tmp_path)]) == 0
        assert cli.main(["report", "--results", str(tmp_path)]) == 0
        (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
        written = {"attention.json", "attention.csv", "attention.md", "plots"}
        assert {path.name for path in folder.iterdir()} >= written
        assert list(folder.glob("plots/*.png"))
        result = load(folder / "attention.json")
        assert not_run(result.rows) == "padfree: not run (no GPU)"
        page = (tmp_path / "index.html").read_text()
        assert "<b>padfree</b>: no GPU" in page and "<svg" in page and "No GPU was measured yet" in page
        recorded = json.loads((folder / "attention.json").read_text())
        assert recorded["environment"]["command"].startswith("python -m bench attention --quick")
        assert recorded["ceilings"]["bytes_per_s"] > 0


class TestEntryPoints:
    def test_python_m_bench_lists_every_command(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "bench", "--help"], cwd=ROOT, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0
        suites = ("attention", "memory", "encoder", "train", "hf")
        for name in (*suites, "compile-report", "tune", "report", "compare"):
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
        options = ["-q", "-p", "no:cacheprovider", "-o", "python_files=bench_*.py"]
        base = [sys.executable, "-m", "pytest", "bench", *options]
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
