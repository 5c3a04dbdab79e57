"""The fault audit's own tests: its list is alive, and a sample of it is killed; `make faults` runs all of it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from faults import FAULTS, Fault, audit
from faults.audit import DATA, judge

TESTS = Path(__file__).parent
SAMPLE = (
    "rows past the end are stored",
    "the accumulator is not rescaled",
    "delta is left out of dq",
    "dk of padded keys is not cleared",
    "only the first query head of a group gives to dk and dv",
    "the mask's gradient takes only one head",
    "the mask's polarity is inverted",
    "dropout is the same for every head",
    "every packed sequence starts at 0",
    "the window's left side is off by one",
    "key and value of a fused buffer are swapped",
    "the gradient of the LSE is dropped",
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_changes_the_source_that_is_there(fault: Fault) -> None:
    assert fault.fragment != fault.replacement
    assert fault.found() == fault.count, f"stale: {fault.fragment!r} in {fault.file}"


def test_there_are_at_least_60_faults_of_every_part() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 60
    parts = {
        "bounds",
        "mask",
        "window",
        "packing",
        "dropout",
        "wrapper",
        "ownership",
        "offset width",
        "online softmax",
    }
    assert parts <= {fault.kind for fault in FAULTS}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sampled_fault_is_killed(name: str, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    command = [sys.executable, "-m", "faults", "--names", name, "--workers", "1", "--no-baseline"]
    done = subprocess.run(
        [*command, "--output", str(output)], check=False, cwd=TESTS, capture_output=True, text=True
    )
    assert output.exists(), done.stdout + done.stderr
    (verdict,) = json.loads(output.read_text())["verdicts"]
    assert verdict["killed"]
    assert "::" in verdict["by"], "killed by a test, not by a suite that cannot start"


def test_a_hang_ends_by_the_work_it_has_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "BUDGET_CPU_S", 2)
    endless = tmp_path / "test_endless.py"
    endless.write_text("def test_without_end():\n    while True:\n        pass\n")
    (verdict,) = audit.audit([audit.CLEAN], workers=1, suite=[str(endless)])
    assert verdict.killed and verdict.by == "no end within 2 s of CPU time"


@pytest.mark.parametrize(("exit_code", "killed"), [(0, False), (1, True), (-11, True), (-24, True)])
def test_a_crash_or_a_hang_counts_as_killed(exit_code: int, killed: bool, tmp_path: Path) -> None:
    assert judge(FAULTS[0], tmp_path / "log", exit_code, 1.0).killed is killed


@pytest.fixture
def last_audit() -> dict[str, Any]:
    return json.loads(DATA.read_text())


def test_the_last_whole_audit_killed_95_percent(last_audit: dict[str, Any]) -> None:
    assert last_audit["total"] >= 60
    assert last_audit["killed"] >= 0.95 * last_audit["total"]


def test_every_survivor_of_the_last_audit_is_explained(last_audit: dict[str, Any]) -> None:
    reasons = {fault.name: fault.reason for fault in FAULTS}
    assert not [v["name"] for v in last_audit["verdicts"] if not v["killed"] and not reasons.get(v["name"])]
