"""What a GPU makes of fp32 arithmetic and numpy does not: a product and a sum in one rounding, maxima that drop NaN."""

from typing import Any

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def create_fmul(self: InterpreterBuilder, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
    product = self.binary_op(lhs, rhs, np.multiply)
    if product.data.dtype == np.float32:
        product.factors = lhs.data, rhs.data
    return product


def _contracted(self: InterpreterBuilder, lhs: TensorHandle, rhs: TensorHandle, op: np.ufunc) -> TensorHandle:
    """lhs ± rhs, in fp32 as one fused multiply-add where either is a product, which is what ptxas makes of it."""
    if lhs.data.dtype != np.float32 or not (hasattr(lhs, "factors") or hasattr(rhs, "factors")):
        return self.binary_op(lhs, rhs, op)
    product = lhs if hasattr(lhs, "factors") else rhs
    exact = np.multiply(*product.factors, dtype=np.float64)
    sides = (exact, rhs.data) if product is lhs else (lhs.data, exact)
    # inf - inf and sums beyond fp32 are results here, not accidents
    with np.errstate(invalid="ignore", over="ignore"):
        return TensorHandle(op(*sides, dtype=np.float64).astype(np.float32), lhs.dtype.scalar)


def create_fadd(self: InterpreterBuilder, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
    return _contracted(self, lhs, rhs, np.add)


def create_fsub(self: InterpreterBuilder, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
    return _contracted(self, lhs, rhs, np.subtract)


def create_maxnumf(self: InterpreterBuilder, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
    """Of NaN and a number the number, as max.f32 has it."""
    return self.binary_op(lhs, rhs, np.fmax)


def create_minnumf(self: InterpreterBuilder, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
    return self.binary_op(lhs, rhs, np.fmin)


CONTRACTION_HOOKS: list[tuple[object, str, Any]] = [
    (InterpreterBuilder, hook.__name__, hook)
    for hook in (create_fmul, create_fadd, create_fsub, create_maxnumf, create_minnumf)
]
