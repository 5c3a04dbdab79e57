"""On a GPU machine the kernels' tests hand the kernel tensors of the GPU: seen by a stand-in that refuses the CPU's."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
# Those in which most calls of the kernel by name stand, and which the stand-in gets through in seconds.
FILES = (
    "test_backward.py",
    "test_every_form.py",
    "test_every_variant.py",
    "test_forward.py",
    "test_known_bugs_masks.py",
    "test_known_bugs_shapes.py",
    "test_not_a_number.py",
)


def run_on_the_standin(*files: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PADFREE_STANDIN_GPU": "1", "TRITON_INTERPRET": "0"}
    # Of another worker's process: its own would claim this one's results.
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
    return subprocess.run(
        command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False
    )


def test_the_kernels_tests_use_tensors_of_the_device_they_test() -> None:
    done = run_on_the_standin(*(str(TESTS / name) for name in FILES))
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_standin_refuses_tensors_of_the_cpu() -> None:
    probe = TESTS / f"test_probe_{os.getpid()}.py"
    probe.write_text(
        "from known_bugs import kernel_results\nfrom padfree.testing import make_inputs\n"
        "def test_cpu(): kernel_results(make_inputs(1, 1, 3, 3, 8, device='cpu'))\n"
        "def test_gpu(): kernel_results(make_inputs(1, 1, 3, 3, 8))\n"
    )
    try:
        done = run_on_the_standin(str(probe))
    finally:
        probe.unlink()
    assert "1 failed, 1 passed" in done.stdout and "no GPU: tensors are on cpu" in done.stdout, done.stdout
