"""The benchmark's limits of time: what is stopped ends with all that it started, and keeps what it had."""

import subprocess
import sys
from pathlib import Path

import pytest

from padfree_bench.gpu_round import warm
from padfree_bench.gpu_round.steps import ROOT
from padfree_bench.measuring.processes import run_limited
from padfree_bench.measuring.timing import Effort, _repetitions
from padfree_bench.tuning import tune
from waiting import is_running, wait_for

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
print(child.pid, flush=True)
child.wait()
"""


def test_a_command_past_its_limit_ends_with_its_children(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as out:
        assert run_limited([sys.executable, "-c", PARENT], 15, stdout=out) is None
    child = int((tmp_path / "out").read_text())
    wait_for(lambda: not is_running(child))


def test_a_worker_that_crashes_costs_its_own_item_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(warm, "compile_item", eval)
    good, crash = "([True], 0.5)", "__import__('os')._exit(11)"
    summary = warm.warm([good, crash, *[good] * 4], jobs=2)
    assert (summary["items"], summary["hits"], summary["core_seconds"]) == (6, 5, 2.5)
    (failed,) = summary["failed"]
    assert "terminated abruptly" in failed


@pytest.mark.parametrize(
    ("round_ms", "repetitions"), [(1, 100), (100, 20), (1000, 10), (3000, 5), (60_000, 3)]
)
def test_slow_rounds_are_few(round_ms: float, repetitions: int) -> None:
    assert _repetitions(round_ms, Effort(seconds=2, least=10, most=100, at_most_seconds=15)) == repetitions


def test_minutes_that_mean_nothing_are_refused() -> None:
    with pytest.raises(SystemExit, match="2"):
        tune.main(["--minutes", "nan"])


def test_told_to_stop_it_leaves_nothing_running() -> None:
    program = (
        "from padfree_bench.measuring.processes import *; stop_on_sigterm();"
        "run_limited([sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(3600)'], 60)"
    )
    folders = [str(ROOT / folder) for folder in ("kernels", "bench")]
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {folders}; {program}"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.terminate()
    process.wait()
    wait_for(lambda: not is_running(child))
