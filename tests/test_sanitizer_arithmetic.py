"""bfloat16, TF32 and reductions of the sanitized interpreter against PyTorch."""

import os

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from sanitizer import emulate_bf16, sanitize
from sanitizer._precision import bf16_to_fp32, fp32_to_bf16, fp32_to_tf32

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="the sanitizer checks interpreted kernels only"
)


@pytest.fixture(autouse=True)
def sanitizer_report() -> None:
    """Replaces the plugin's fixture: these tests switch the sanitizer on and off themselves."""


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr):
    i = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + i, tl.dot(tl.load(a_ptr + i), tl.load(b_ptr + i), input_precision=PRECISION))


def dot_error(dtype: torch.dtype, precision: str) -> float:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 16, 16, generator=generator).to(dtype)
    out = torch.zeros(16, 16)
    dot_kernel[(1,)](a, b, out, precision)
    return (out.double() - a.double() @ b.double()).abs().max().item()


def test_a_tf32_dot_differs_from_an_ieee_dot() -> None:
    with sanitize() as report:
        assert dot_error(torch.float32, "ieee") < 1e-5
        assert 1e-4 < dot_error(torch.float32, "tf32") < 1e-2
    assert report.kernels["dot_kernel"] == {"launches": 2, "programs": 2, "loads": 4, "stores": 2, "dots": 2}


def test_a_bf16_dot_is_exact_only_under_the_emulation() -> None:
    assert not dot_error(torch.bfloat16, "ieee") < 1, "the interpreter no longer needs the bf16 emulation"
    with sanitize():
        assert dot_error(torch.bfloat16, "ieee") < 1e-5
    with emulate_bf16():
        assert dot_error(torch.bfloat16, "ieee") < 1e-5
    assert not dot_error(torch.bfloat16, "ieee") < 1


@triton.jit
def bf16_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr):
    i = tl.arange(0, 16)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    if OP == "multiply-add":
        z = x * y + x
    elif OP == "divide":
        z = x / y
    elif OP == "maximum":
        z = tl.maximum(x, y)
    elif OP == "select":
        z = tl.where(x < y, x, y * 2.5)
    elif OP == "absolute":
        z = tl.abs(-x)
    elif OP == "compare":
        z = (x > y).to(tl.bfloat16)
    elif OP == "clamp":
        z = tl.clamp(x, -0.5, 0.5)
    elif OP == "round":
        z = (x.to(tl.float32) * 1.7).to(tl.bfloat16)
    elif OP == "sum":
        z = x * 0 + tl.sum(x, 0)
    elif OP == "integer":
        z = (x * 100).to(tl.int32).to(tl.bfloat16)
    tl.store(out_ptr + i, z)


BF16_TRUTH = {
    "multiply-add": lambda x, y: x * y + x,
    "divide": lambda x, y: x / y,
    "maximum": torch.maximum,
    "select": lambda x, y: torch.where(x < y, x, y * 2.5),
    "absolute": lambda x, y: x.abs(),
    "compare": lambda x, y: (x > y).bfloat16(),
    "clamp": lambda x, y: x.clamp(-0.5, 0.5),
    "round": lambda x, y: (x.float() * 1.7).bfloat16(),
    "sum": lambda x, y: x * 0 + x.float().sum(),
    "integer": lambda x, y: (x * 100).int().bfloat16(),
}


@pytest.mark.parametrize("operation", BF16_TRUTH)
def test_bf16_arithmetic_of_the_interpreter_equals_torch(operation: str) -> None:
    x, y = torch.randn(2, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    out = torch.zeros_like(x)
    with sanitize():
        bf16_kernel[(1,)](x, y, out, operation)
    torch.testing.assert_close(out, BF16_TRUTH[operation](x, y), rtol=2**-8, atol=0)
    if operation not in ("multiply-add", "sum"):
        assert torch.equal(out, BF16_TRUTH[operation](x, y))


@triton.jit
def first_last_count(first_a, last_a, count_a, first_b, last_b, count_b):
    return tl.minimum(first_a, first_b), tl.maximum(last_a, last_b), count_a + count_b


@triton.jit
def reduce_kernel(x_ptr, out_ptr, AXIS: tl.constexpr):
    i = tl.arange(0, 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    x = tl.load(x_ptr + i)
    low, high, total = tl.reduce((x, x, x), AXIS, first_last_count)
    if AXIS is None:
        tl.store(out_ptr, low)
        tl.store(out_ptr + 1, high)
        tl.store(out_ptr + 2, total)
    else:
        j = tl.arange(0, 4)
        tl.store(out_ptr + j, low)
        tl.store(out_ptr + 4 + j, high)
        tl.store(out_ptr + 8 + j, total)


@pytest.mark.parametrize("axis", [0, 1, None])
def test_a_user_defined_reduction_gives_the_interpreters_own_result(axis: int | None) -> None:
    x = torch.randperm(16, generator=torch.Generator().manual_seed(0)).int()
    plain, sanitized = torch.zeros(2, 12, dtype=torch.int32)
    if axis is not None:  # the interpreter's own form fails over all axes
        reduce_kernel[(1,)](x, plain, axis)
    else:
        plain[:3] = torch.stack([x.min(), x.max(), x.sum()])
    with sanitize():
        reduce_kernel[(1,)](x, sanitized, axis)
    assert torch.equal(sanitized, plain)


def test_rounding_to_bf16_and_tf32_is_to_nearest_even_for_every_class_of_value() -> None:
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11]
    values = np.concatenate([np.random.default_rng(0).normal(size=4096) * 10, special]).astype(np.float32)
    expected = torch.from_numpy(values).bfloat16()
    assert np.array_equal(bf16_to_fp32(fp32_to_bf16(values)), expected.float().numpy(), equal_nan=True)
    finite = values[np.isfinite(values) & (values != 0) & (np.abs(values) > 1e-30)]
    assert (np.abs(fp32_to_tf32(finite) / finite - 1) <= 2**-11).all()
    ties = fp32_to_tf32(np.array([1 + 2**-11, 1 + 3 * 2**-11], dtype=np.float32))
    assert ties.tolist() == [1.0, 1 + 2**-9]


@triton.jit
def contraction_kernel(x_ptr, y_ptr, z_ptr, out_ptr):
    i = tl.arange(0, 16)
    x, y, z = tl.load(x_ptr + i), tl.load(y_ptr + i), tl.load(z_ptr + i)
    tl.store(out_ptr + i, x * y - z)
    tl.store(out_ptr + 16 + i, z + x * y)
    tl.store(out_ptr + 32 + i, tl.maximum(x, y))
    tl.store(out_ptr + 48 + i, tl.minimum(x, y))


def test_a_product_and_a_sum_are_rounded_once_and_maxima_drop_nan() -> None:
    """So does compiled code: fma.rn.f32, max.f32, min.f32. The interpreter alone rounds twice and keeps NaN."""
    x, y = torch.rand(2, 16) + 1
    z, out = x * y, torch.zeros(64)
    with sanitize():
        contraction_kernel[(1,)](x, y, z, out)
    exact = x.double() * y.double()
    assert torch.equal(out[:16], (exact - z.double()).float()) and out[:16].abs().max() > 0
    assert torch.equal(out[16:32], (exact + z.double()).float())
    x[3], y[5] = float("nan"), float("nan")
    with sanitize():
        contraction_kernel[(1,)](x, y, z, out)
    assert torch.equal(out[32:48], torch.fmax(x, y)) and torch.equal(out[48:], torch.fmin(x, y))
