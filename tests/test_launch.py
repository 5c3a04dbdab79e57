"""Direct launches reach the driver as Triton's own do, under every Triton at hand; `launches.py` makes them."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import triton

from faults.fault import KERNELS, Fault
from test_aot import COMPILERS

TESTS = Path(__file__).parent

launch = partial(Fault, kind="launch", file="_triton/launch.py")
# {the check that must notice it: the faults}
FAULTS = {
    "alike": [
        launch("alignment is left out", fragment=", pointer % 16 == 0)", replacement=", True)"),
        launch("strides are left out", fragment="tensor.stride(), pointer", replacement="pointer"),
        launch("shapes are left out", fragment="tensor.shape, tensor.stride()", replacement="tensor.stride()"),
        launch("dtypes are left out", fragment="(tensor.dtype, ", replacement="("),
        launch(
            "the launch's own tensors are left out",
            fragment=", own.layouts)", replacement=")",
        ),
        launch("the configuration is left out", fragment="device, config, call.scalars", replacement="device, call.scalars"),
        launch("the device is left out", fragment="kernel.fn, device, config", replacement="kernel.fn, config"),
        launch("options are left out", fragment="config, call.scalars, ", replacement="config, "),
        launch(
            "the precision is left out", file="_triton/call.py",
            fragment="self.skip_padded_queries,\n            self.precision,",
            replacement="self.skip_padded_queries,",
        ),
        launch(
            "the pointers of another call are handed on",
            fragment="kept.fill(pointers, ", replacement="kept.fill(launch.__dict__.setdefault(key, pointers), ",
        ),
    ],
    "hooks": [
        launch(
            "hooks are passed by",
            fragment="return bool(hook.calls) if isinstance(hook, knobs.HookChain) else hook is not None", replacement="return False",
        ),
        launch("pre-run hooks are passed by", fragment="not (kernel.pre_run_hooks or ", replacement="not ("),
    ],
    "memory": [
        launch("launches are kept without end", fragment="if len(kept) >= MOST_KEPT:", replacement="if False:"),
        launch("constants hold the tensors", fragment="_filler(source), constants)", replacement="_filler(source), [*constants, described])"),
    ],
}  # fmt: skip


def run_check(check: str, version: str, kernels: Path = KERNELS) -> subprocess.CompletedProcess[str]:
    """One of the checks of `launches.py` in a process that compiles, by this Triton."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folders = [COMPILERS[version], kernels, TESTS]
    environment["PYTHONPATH"] = os.pathsep.join(str(folder) for folder in folders if folder)
    command = [sys.executable, str(TESTS / "launches.py"), check]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("version", COMPILERS)
@pytest.mark.parametrize("check", ["alike", "hooks", "memory", "threads"])
def test_direct_launches_are_those_of_triton(check: str, version: str) -> None:
    done = run_check(check, version)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr[-3000:]


@pytest.mark.parametrize(
    "check, fault",
    [pytest.param(check, fault, id=fault.name) for check, faults in FAULTS.items() for fault in faults],
)
def test_a_planted_fault_is_noticed(check: str, fault: Fault, tmp_path: Path) -> None:
    done = run_check(check, triton.__version__, fault.plant(tmp_path))
    assert "AssertionError" in done.stderr, done.stderr[-3000:] or done.stdout
