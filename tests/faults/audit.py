"""Plant faults one at a time in a copy of the kernels and run the fast suite against each, in forked children.

A child starts with torch, Triton and pytest imported, but not the library, and may die of a memory fault: a crash
counts as a kill. The suite must pass on an unchanged copy first, and must fail on one that cannot be imported.
"""

import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path

from faults.fault import ROOT, Fault

# Most discriminating first, after one that takes no time: a child stops at the first failure.
STRIDES = "test_known_bugs_shapes.py::test_any_strides_of_the"
SUITE = (
    "test_tf32x3.py::test_torchs_setting_chooses_how_fp32_is_multiplied",
    "test_every_variant.py",
    "test_every_form.py",
    "test_not_a_number.py",
    "test_bad_calls.py",
    "test_key_lengths.py",
    f"{STRIDES}_masks_give_the_same_bits",
    f"{STRIDES}_inputs_give_the_same_bits",
    f"{STRIDES}_incoming_gradient_give_the_same_bits",
    "test_known_bugs_masks.py",
    "test_giants.py",
    "test_known_bugs_shapes.py",
)
# CPU time, which other work on the machine does not use up, far beyond what a survivor takes: only a hang ends here
BUDGET_CPU_S = 900
CLEAN = Fault("no fault", "baseline", "__init__.py", fragment="", replacement="")
BROKEN = Fault("no library", "baseline", "__init__.py", '"""padfree:', 'raise ImportError\n"""padfree:')
DATA = Path(__file__).with_name("result.json")


@dataclass
class Verdict:
    """What became of one fault: killed by which test, or survived."""

    name: str
    kind: str
    file: str
    killed: bool
    by: str
    seconds: float


def run_suite(kernels: str, log: str, suite: Sequence[str]) -> None:
    """In the child: pytest on this copy of the kernels, all output to `log`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # a crash is a kill and needs no core file
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (BUDGET_CPU_S, resource.RLIM_INFINITY))
    os.chdir(ROOT)
    import pytest

    paths = [kernels, *(str(ROOT / folder) for folder in ("model", "bench", "tests"))]
    sys.path[:0] = paths
    options = [
        "-x",
        "-q",
        "--tb=line",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        "-o",
        f"pythonpath={' '.join(paths)}",
    ]
    sys.exit(pytest.main([*options, *(str(ROOT / "tests" / file) for file in suite)]))


def start(fault: Fault, folder: Path, suite: Sequence[str]) -> ForkProcess:
    folder.mkdir()
    kernels = fault.plant(folder)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=run_suite, args=(str(kernels), str(folder / "log"), suite))
    child.start()
    return child


def judge(fault: Fault, log: Path, exit_code: int, seconds: float) -> Verdict:
    text = log.read_text(errors="replace") if log.exists() else ""
    failed = re.search(
        r"^(?:FAILED|ERROR) (?:tests/)?(\S+?\.py(?:::\S[^\n]*?)?)(?: - .*)?$", text, re.MULTILINE
    )
    if exit_code == -signal.SIGXCPU:
        by = f"no end within {BUDGET_CPU_S} s of CPU time"
    elif exit_code < 0:
        by = f"signal {-exit_code}"
    else:
        by = failed[1] if failed else f"exit status {exit_code}"
    return Verdict(
        fault.name, fault.kind, fault.file, exit_code != 0, by if exit_code != 0 else "", round(seconds, 1)
    )


def audit(faults: Sequence[Fault], workers: int = 2, suite: Sequence[str] = SUITE) -> Iterator[Verdict]:
    """The verdict on each fault, as children end."""
    # imported once here, so that no child has to; TRITON_INTERPRET is read when a kernel is decorated
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import torch  # noqa: F401
    import triton  # noqa: F401

    waiting = list(faults)
    running: dict[int, tuple[ForkProcess, Fault, Path, float]] = {}
    with tempfile.TemporaryDirectory(prefix="padfree-faults-") as scratch:
        while waiting or running:
            while waiting and len(running) < workers:
                fault = waiting.pop(0)
                folder = Path(scratch) / str(len(faults) - len(waiting))
                child = start(fault, folder, suite)
                running[child.sentinel] = (child, fault, folder, time.monotonic())
            for sentinel in wait(list(running)):
                child, fault, folder, begun = running.pop(sentinel)
                child.join()
                yield judge(fault, folder / "log", child.exitcode, time.monotonic() - begun)


def check_baseline() -> None:
    """The suite passes on an unchanged copy and fails where the library cannot be imported.

    Raises:
        RuntimeError: otherwise; no verdict would mean anything
    """
    clean, broken = sorted(audit([CLEAN, BROKEN]), key=lambda verdict: verdict.name)
    if clean.killed:
        raise RuntimeError(f"the suite fails without a fault: {clean.by}")
    if not broken.killed:
        raise RuntimeError("the suite does not import the copy that faults are planted in")


def write(verdicts: Sequence[Verdict], path: Path) -> None:
    """Put these verdicts in the file, in place of earlier ones on the same faults; gone faults are dropped."""
    earlier = json.loads(path.read_text())["verdicts"] if path.exists() else []
    from faults import FAULTS

    names = {fault.name for fault in FAULTS}
    by_name = {v["name"]: v for v in [*earlier, *map(asdict, verdicts)] if v["name"] in names}
    killed = sum(verdict["killed"] for verdict in by_name.values())
    result = {
        "killed": killed,
        "total": len(by_name),
        "verdicts": [by_name[name] for name in sorted(by_name)],
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
