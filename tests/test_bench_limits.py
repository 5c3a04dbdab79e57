"""The benchmark's limits of time: what is stopped ends with all that it started, and keeps what it had."""

import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from padfree_bench import cli, gpu_check, plan, tune
from padfree_bench.processes import run_limited
from padfree_bench.session import refuse_to_replace
from padfree_bench.timing import Effort, _repetitions

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
child.wait()
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_command_past_its_limit_ends_with_its_children(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as out:
        assert run_limited([sys.executable, "-c", PARENT], 3, stdout=out) is None
    child = int((tmp_path / "out").read_text())
    for _ in range(50):
        if not is_running(child):
            break
        time.sleep(0.1)
    assert not is_running(child)


def test_a_step_past_its_limit_keeps_what_it_had_found(tmp_path: Path) -> None:
    program = "import json, time; print(json.dumps({'files': 3}), flush=True); time.sleep(60)"
    step = gpu_check.Step("suite", "", 3, (sys.executable, "-c", program))
    outcome = gpu_check.run_step(step, False, 100, tmp_path / "suite.log")
    assert (outcome.status, outcome.details) == (gpu_check.TIMED_OUT, {"files": 3})


@pytest.mark.parametrize(
    ("round_ms", "repetitions"), [(1, 100), (100, 20), (1000, 10), (3000, 5), (60_000, 3)]
)
def test_slow_rounds_are_few(round_ms: float, repetitions: int) -> None:
    assert _repetitions(round_ms, Effort(seconds=2, least=10, most=100, at_most_seconds=15)) == repetitions


@pytest.mark.parametrize("command", [gpu_check, tune, plan])
def test_minutes_that_mean_nothing_are_refused(command: ModuleType) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["--minutes", "nan"])


@pytest.mark.parametrize("step", ["agreement", "memcheck"])
def test_a_step_that_replays_cases_has_them_exported_first(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def run_step(step: gpu_check.Step, *_: object) -> gpu_check.Outcome:
        ran.append(step.name)
        return gpu_check.Outcome(step.name, gpu_check.PASSED)

    monkeypatch.setattr(gpu_check, "run_step", run_step)
    gpu_check.main(["--steps", step, "--output", str(tmp_path)])
    assert ran == ["export", step]
    ran.clear()
    gpu_check.main(["--steps", step, "--output", str(tmp_path), "--cases", str(tmp_path / "cases")])
    assert ran == [step]


@pytest.mark.parametrize("part", plan.PARTS)
def test_what_a_part_leaves_out_has_a_name_of_its_own(part: int) -> None:
    for _, line in plan.PARTS[part]:
        refuse_to_replace(cli.parser().parse_args(line))


@pytest.mark.parametrize("part", plan.PARTS)
def test_every_part_ends_within_nine_minutes(part: int) -> None:
    assert sum(share for share, _ in plan.PARTS[part]) == pytest.approx(1)
    assert plan.MINUTES + plan.GRACE_MINUTES + plan.REPORT_MINUTES <= 9


def test_told_to_stop_it_leaves_nothing_running() -> None:
    program = (
        "from padfree_bench.processes import *; stop_on_sigterm();"
        "run_limited([sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'], 60)"
    )
    folders = [str(gpu_check.ROOT / folder) for folder in ("kernels", "bench")]
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {folders}; {program}"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.terminate()
    process.wait(timeout=30)
    time.sleep(0.5)
    assert not is_running(child)
