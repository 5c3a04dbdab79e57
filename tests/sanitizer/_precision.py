"""Floating-point arithmetic the Triton interpreter gets wrong or ignores: bfloat16 and TF32.

The interpreter keeps bfloat16 as raw uint16 bits and multiplies, adds and compares those bits. Here every operation
widens to float32, computes, and rounds back to nearest even, as the hardware does.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

from ._matrix_units import HOPPER, dot_tf32x3

BF16_NAN = np.uint16(0x7FC0)

_cast_impl = InterpreterBuilder.cast_impl
_create_fp_to_fp = InterpreterBuilder.create_fp_to_fp
_binary_op = InterpreterBuilder.binary_op
_unary_op = InterpreterBuilder.unary_op
_ternary_op = InterpreterBuilder.ternary_op
_create_fma = InterpreterBuilder.create_fma
_create_dot = InterpreterBuilder.create_dot
_create_masked_load = InterpreterBuilder.create_masked_load
_create_masked_store = InterpreterBuilder.create_masked_store
_create_atomic_rmw = InterpreterBuilder.create_atomic_rmw

COMPARISONS = frozenset(
    {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal},
)


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    """The float32 values of raw bfloat16 bits (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Raw bfloat16 bits (uint16) of float32 values, rounded to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), BF16_NAN, rounded)


def fp32_to_tf32(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to nearest even at TF32's 10 mantissa bits."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x0FFF + ((bits >> 13) & 1))) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def _holds_bf16(handle: TensorHandle) -> bool:
    # a comparison of the original interpreter labels its booleans with the operands' type
    return handle.data.dtype == np.uint16 and handle.dtype.scalar == tl.bfloat16


def _as_fp32(handle: TensorHandle) -> np.ndarray:
    return bf16_to_fp32(handle.data) if _holds_bf16(handle) else handle.data.astype(np.float32)


def _widened(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(bf16_to_fp32(handle.data), tl.float32) if _holds_bf16(handle) else handle


def _bf16_handle(values: np.ndarray) -> TensorHandle:
    return TensorHandle(fp32_to_bf16(values), tl.bfloat16)


def get_bf16(self: InterpreterBuilder, value: float) -> TensorHandle:
    return _bf16_handle(np.array([value], dtype=np.float32))


def cast_impl(self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
    if dst_type.scalar == tl.bfloat16:
        return src if _holds_bf16(src) else _bf16_handle(_as_fp32(src))
    if _holds_bf16(src):
        return TensorHandle(bf16_to_fp32(src.data).astype(_get_np_dtype(dst_type)), dst_type.scalar)
    return _cast_impl(self, src, dst_type)


def create_fp_to_fp(
    self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype, rounding: Any
) -> TensorHandle:
    if dst_type.scalar == tl.bfloat16:
        wide = src if src.dtype.scalar == tl.float32 else self.create_fp_to_fp(src, tl.float32, rounding)
        if rounding == ir.ROUNDING_MODE.RTZ:
            truncated = (np.ascontiguousarray(wide.data).view(np.uint32) >> 16).astype(np.uint16)
            return TensorHandle(np.where(np.isnan(wide.data), BF16_NAN, truncated), tl.bfloat16)
        return _bf16_handle(wide.data)
    if _holds_bf16(src):
        wide = _widened(src)
        return wide if dst_type.scalar == tl.float32 else _create_fp_to_fp(self, wide, dst_type, rounding)
    return _create_fp_to_fp(self, src, dst_type, rounding)


def binary_op(
    self: InterpreterBuilder, lhs: TensorHandle, rhs: TensorHandle, op: Callable[..., np.ndarray]
) -> TensorHandle:
    if not (_holds_bf16(lhs) or _holds_bf16(rhs)):
        return _binary_op(self, lhs, rhs, op)
    result = op(_as_fp32(lhs), _as_fp32(rhs))
    return TensorHandle(result, tl.int1) if op in COMPARISONS else _bf16_handle(result)


def unary_op(self: InterpreterBuilder, arg: TensorHandle, op: Callable[..., np.ndarray]) -> TensorHandle:
    return _bf16_handle(op(_as_fp32(arg))) if _holds_bf16(arg) else _unary_op(self, arg, op)


def ternary_op(
    self: InterpreterBuilder,
    lhs: TensorHandle,
    rhs: TensorHandle,
    other: TensorHandle,
    op: Callable[..., np.ndarray],
) -> TensorHandle:
    # np.where selects whole bit patterns, so only arithmetic needs the values
    if op is np.where or not _holds_bf16(other):
        return _ternary_op(self, lhs, rhs, other, op)
    return _bf16_handle(op(_as_fp32(lhs), _as_fp32(rhs), _as_fp32(other)))


def create_fma(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    if not _holds_bf16(z):
        return _create_fma(self, x, y, z)
    return _bf16_handle(_as_fp32(x) * _as_fp32(y) + _as_fp32(z))


def create_dot(
    self: InterpreterBuilder,
    a: TensorHandle,
    b: TensorHandle,
    d: TensorHandle,
    precision: Any,
    imprecise: Any,
) -> TensorHandle:
    a, b = _widened(a), _widened(b)
    if _holds_bf16(d):
        wide = _create_dot(self, a, b, _widened(d), precision, imprecise)
        return _bf16_handle(wide.data)
    if d.data.dtype == np.float32 and a.data.dtype in (np.float32, np.float16):
        # numpy sums A @ B and its transpose in different orders, as no GPU does: round the exact sum once instead
        exact = a.data.astype(np.float64) @ b.data.astype(np.float64)
        return TensorHandle(exact.astype(np.float32) + d.data, d.dtype.scalar)
    return _create_dot(self, a, b, d, precision, imprecise)


def create_dot_with_tf32(
    self: InterpreterBuilder,
    a: TensorHandle,
    b: TensorHandle,
    d: TensorHandle,
    precision: Any,
    imprecise: Any,
) -> TensorHandle:
    if precision == ir.INPUT_PRECISION.TF32x3 and a.dtype.scalar == tl.float32:
        return TensorHandle(dot_tf32x3(a.data, b.data, HOPPER) + d.data, d.dtype.scalar)
    if precision == ir.INPUT_PRECISION.TF32 and a.dtype.scalar == tl.float32:
        a, b = (TensorHandle(fp32_to_tf32(side.data), tl.float32) for side in (a, b))
    return create_dot(self, a, b, d, precision, imprecise)


def create_atomic_rmw(
    self: InterpreterBuilder,
    operation: Any,
    ptr: TensorHandle,
    val: TensorHandle,
    mask: TensorHandle,
    sem: Any,
    scope: Any,
) -> TensorHandle:
    if not _holds_bf16(val):
        return _create_atomic_rmw(self, operation, ptr, val, mask, sem, scope)
    if operation != ir.ATOMIC_OP.FADD:
        raise NotImplementedError("the only bfloat16 atomic emulated is add")
    old = np.zeros_like(val.data)
    for lane in np.ndindex(val.data.shape):
        # one lane after the other, so that lanes sharing an address all count
        at = TensorHandle(ptr.data[lane].reshape(1), ptr.dtype)
        active = TensorHandle(np.array([mask.data[lane]]), tl.int1)
        before = _create_masked_load(self, at, active, None, None, None, False)
        after = binary_op(self, before, TensorHandle(val.data[lane].reshape(1), tl.bfloat16), np.add)
        _create_masked_store(self, at, after, active, None, None)
        old[lane] = before.data[0]
    return TensorHandle(old, tl.bfloat16)


BF16_HOOKS: list[tuple[object, str, Callable[..., TensorHandle]]] = [
    (InterpreterBuilder, hook.__name__, hook)
    for hook in (
        get_bf16,
        cast_impl,
        create_fp_to_fp,
        binary_op,
        unary_op,
        ternary_op,
        create_fma,
        create_dot,
        create_atomic_rmw,
    )
]
