"""The sanitizer's own test: every planted fault is reported, no clean twin is."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from _planted_faults import FAR_PROGRAM, PLANTED, copy, copy_kernel, nothing_kernel
from known_bugs import assert_same_bits, kernel_results
from padfree.testing import Results, make_inputs
from sanitizer import SanitizerError, poison_empty, sanitize, without_shortcuts
from sanitizer._memory import zero_cells

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="the sanitizer checks interpreted kernels only"
)


@pytest.fixture(autouse=True)
def sanitizer_report() -> None:
    """Replaces the plugin's fixture: these tests switch the sanitizer on and off themselves."""


def far_only(kernel: str, grid: tuple[int, int, int]) -> list[tuple[int, int, int]] | None:
    """Only the last program of the grid too long to run, all programs of the others."""
    return [FAR_PROGRAM] if kernel == "far_kernel" else None


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_reported_with_its_kind_and_line(name: str) -> None:
    run, kind = PLANTED[name]
    with sanitize(seed=1, programs=far_only) as report, pytest.raises(SanitizerError, match=kind):
        run(True)
    assert kind in {finding.kind for finding in report.findings}
    place = "launch" if kind == "grid limit" else "_planted_faults.py:"
    assert all(finding.where.startswith(place) for finding in report.findings), str(report)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PLANTED)
def test_the_clean_twin_of_a_planted_fault_passes(name: str, seed: int) -> None:
    run, _ = PLANTED[name]
    with sanitize(seed=seed, programs=far_only) as report:
        run(False)
    assert not report.findings
    assert report.total["launches"] == 1 and report.total["programs"] >= 1


@pytest.mark.parametrize(
    "options",
    [{}, {"window": (20, 3), "skip_padded_queries": True}, {"dropout_p": 0.3}],
    ids=["padding", "window", "dropout"],
)
def test_what_is_skipped_for_speed_changes_no_bit(dtype: torch.dtype, options: dict[str, Any]) -> None:
    inputs = make_inputs(2, 2, 70, 70, 24, kv_heads=1, dtype=dtype, padding="holes", lse_gradient=True)

    def results() -> Results:
        torch.manual_seed(5)
        return kernel_results(inputs, **options)

    with sanitize() as report:
        short = results()
        with without_shortcuts():
            assert_same_bits(short, results())
    launches = {name: counts["launches"] for name, counts in report.kernels.items()}
    assert launches and not any(n % 2 for n in launches.values())


@triton.jit
def exp2_kernel(x_ptr, out_ptr):
    i = tl.arange(0, 4)
    tl.store(out_ptr + i, tl.exp2(tl.load(x_ptr + i)))


def test_a_dtype_the_compiler_refuses_is_refused() -> None:
    x = torch.ones(4, dtype=torch.float16)
    with sanitize(), pytest.raises(InterpreterError, match="Expected dtype"):
        exp2_kernel[(1,)](x, x.clone())


@triton.jit
def signed_shift_kernel(x_ptr, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr) >> tl.full((), 32, tl.uint64))


@triton.jit
def unsigned_shift_kernel(x_ptr, out_ptr):
    tl.store(out_ptr, (tl.load(x_ptr).to(tl.uint64) >> 32).to(tl.int64))


def test_a_constant_is_what_it_was_after_a_shift_by_it() -> None:
    x, out = torch.tensor([2**40]), torch.zeros(1, dtype=torch.int64)
    with sanitize():
        signed_shift_kernel[(1,)](x, out)
        unsigned_shift_kernel[(1,)](x, out)
    assert out == 2**8


@triton.jit
def sum_kernel(x_ptr, out_ptr, n, OTHER: tl.constexpr):
    i = tl.arange(0, 16)
    x = tl.load(x_ptr + i, mask=i < n, other=0) if OTHER else tl.load(x_ptr + i, mask=i < n)
    tl.store(out_ptr, tl.sum(x.to(tl.float32), 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8])
def test_a_masked_off_lane_without_other_spoils_what_it_reaches(dtype: torch.dtype) -> None:
    x, out = torch.ones(13, dtype=dtype), torch.zeros(1)
    with sanitize():
        sum_kernel[(1,)](x, out, 13, True)
        assert out.item() == 13
        sum_kernel[(1,)](x, out, 13, False)
    assert not out.item() <= 13 + 3


@triton.jit
def scalar_kernel(x_ptr, out_ptr, n, OTHER: tl.constexpr):
    i = tl.program_id(0)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0) if OTHER else tl.load(x_ptr + i, mask=i < n)
    tl.store(out_ptr + i, x)


def test_a_scalar_other_of_zero_counts_as_given() -> None:
    x, out = torch.ones(2), torch.ones(3)
    with sanitize():
        scalar_kernel[(3,)](x, out, 2, True)
        assert out.tolist() == [1, 1, 0]
        scalar_kernel[(3,)](x, out, 2, False)
    assert out[2].isnan()


def test_uninitialised_memory_of_library_code_is_poisoned_and_of_others_is_not() -> None:
    library: dict[str, object] = {"__name__": "padfree._triton.operators", "torch": torch}
    calls = ["torch.empty(3)", "torch.empty_like(x)", "x.new_empty(2)", "torch.empty_strided((2, 2), (2, 1))"]
    with poison_empty() as count:
        for call in calls:
            assert eval(call, {**library, "x": torch.zeros(3)}).isnan().all()
        assert eval("torch.empty(3, dtype=torch.int32)", library).tolist() == [2**31 - 1] * 3
        assert eval("torch.empty(2**29, dtype=torch.int8)", library).numel() == 2**29
        eval("torch.empty(3)", {"__name__": "elsewhere", "torch": torch})
    assert (count.filled, count.too_large) == (len(calls) + 1, 1)


def test_an_output_left_unwritten_keeps_its_poison() -> None:
    allocate = {"__name__": "padfree._triton.operators", "torch": torch}
    with sanitize(), poison_empty():
        for rows, survivors in ((13, 0), (12, 1)):
            out = eval("torch.empty(13)", allocate)
            copy_kernel[(1,)](torch.ones(13), out, rows, LOAD_EXTRA=0, STORE_EXTRA=0, MASK_STORE=True)
            assert out.isnan().sum() == survivors


@triton.jit
def order_kernel(out_ptr, clock_ptr):
    tl.store(out_ptr + tl.program_id(0), tl.atomic_add(clock_ptr, 1))


def program_order(seed: int) -> list[int]:
    out = torch.zeros(16, dtype=torch.int32)
    with sanitize(seed=seed):
        order_kernel[(16,)](out, torch.zeros(1, dtype=torch.int32))
    return out.tolist()


def test_programs_run_in_an_order_the_seed_decides() -> None:
    assert program_order(1) == program_order(1) != program_order(2)
    assert sorted(program_order(1)) == list(range(16))


def test_only_the_chosen_programs_run() -> None:
    with sanitize(programs=[(3, 0, 0), (2**30, 0, 0)]) as report:
        nothing_kernel[(2**31 - 1,)](torch.zeros(1))
    assert report.total["programs"] == 2


def test_a_swallowed_finding_stays_in_the_report_and_the_memory_stays_whole() -> None:
    storage = torch.zeros(40)
    with sanitize() as report:
        for _ in range(2):
            with pytest.raises(SanitizerError):
                copy_kernel[(1,)](
                    torch.ones(13), storage[:13], 13, LOAD_EXTRA=3, STORE_EXTRA=3, MASK_STORE=True
                )
    assert storage.sum() == 13
    assert [f.times for f in report.findings] == [2, 2]
    assert "3 lanes, the first 4 bytes past the end of `x_ptr` of shape [13]" in str(report)


def test_a_finding_names_the_lines_from_the_device_function_out_to_the_kernel() -> None:
    with sanitize() as report, pytest.raises(SanitizerError):
        PLANTED["tensor in a tuple"][0](True)
    lines = [line.split(":") for line in report.findings[0].where.split(" < ")]
    assert [name for name, _ in lines] == ["_planted_faults.py"] * 2
    assert int(lines[0][1]) < int(lines[1][1])  # load_pair stands above the kernel that calls it


def test_a_nested_sanitizer_reports_to_itself_and_everything_is_restored() -> None:
    before = vars(triton.runtime.interpreter.InterpreterBuilder).copy()
    with sanitize() as outer:
        with sanitize() as inner, pytest.raises(SanitizerError):
            copy(LOAD_EXTRA=1)
        copy()
    assert inner.findings and not outer.findings
    assert outer.total["launches"] == 1
    assert vars(triton.runtime.interpreter.InterpreterBuilder) == before


def test_shadow_cells_of_a_huge_tensor_are_mapped_lazily() -> None:
    cells = zero_cells(2**33)
    cells[2**33 - 1] = 5
    assert cells[2**33 - 1] == 5 and cells[0] == 0


PLUGIN_USERS = """
import pytest
from _planted_faults import copy

def test_clean(sanitizer_report):
    copy()
    assert sanitizer_report.total["launches"] == 1

def test_faulty():
    copy(LOAD_EXTRA=1)

def test_fault_swallowed():
    with pytest.raises(AssertionError):
        copy(STORE_EXTRA=1)
"""


def test_the_plugin_fails_every_test_with_a_finding_and_sums_the_counts(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["sanitizer.plugin"]')
    (tmp_path / "test_users.py").write_text(PLUGIN_USERS)
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stdout + run.stderr
    for expected in (
        "FAILED test_users.py::test_faulty",
        "ERROR test_users.py::test_fault_swallowed",
        "1 failed, 2 passed, 1 error",
        "sanitizer: 3 launches, 3 programs, 3 loads, 3 stores, 0 atomics, 0 dots, 2 findings",
    ):
        assert expected in run.stdout, run.stdout
