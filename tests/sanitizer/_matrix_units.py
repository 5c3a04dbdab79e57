"""Three TF32 products for one in fp32, summed as the matrix units of NVIDIA GPUs sum them.

Triton's `input_precision="tf32x3"` splits both operands into a big and a small part, x = big + small, and lets the units
add small·big, big·small and big·big to one sum that starts at 0; the dot's own accumulator is added to that in fp32. A
unit adds a few products at a time: it aligns them with the sum so far and cuts off what lies below its last bit.
"""

from typing import NamedTuple

import numpy as np

FP32_FRACTION, FP64_FRACTION = 23, 52
# Below every product of two fp32 numbers, and far above the smallest fp64 number.
LOWEST_EXPONENT = -400


class MatrixUnits(NamedTuple):
    """How many products are added at a time, and how many bits below fp32's last one their sum keeps."""

    products: int
    extra_bits: int


# Measured on an H200: of 0 to 2 extra bits and 4 or 8 products only this gives the errors found there (NOTES.md, 2026-11-28).
HOPPER = MatrixUnits(8, 2)
# Not measured by us: Fasi et al., "Numerical behavior of NVIDIA tensor cores", 2021.
AMPERE = MatrixUnits(4, 1)


def rounded_to_tf32(values: np.ndarray) -> np.ndarray:
    """fp32 values to the nearest of 10 fraction bits, ties away from zero, as cvt.rna.tf32.f32 rounds."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def cut_to_tf32(values: np.ndarray) -> np.ndarray:
    """fp32 values without their last 13 bits, which a matrix unit does not read."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return np.where(np.isfinite(values), (bits & np.uint32(0xFFFFE000)).view(np.float32), values)


def exponents(values: np.ndarray) -> np.ndarray:
    """e of |x| in [2^e, 2^(e + 1)), of fp64 numbers; far below every other one for 0."""
    return ((np.ascontiguousarray(values).view(np.int64) >> FP64_FRACTION) & 0x7FF) - 1023


def accumulate(total: np.ndarray, a: np.ndarray, b: np.ndarray, units: MatrixUnits) -> np.ndarray:
    """total [M, N] + a [M, K] @ b [K, N] of TF32 numbers, all held as fp64."""
    a_exponents, b_exponents = exponents(a), exponents(b)
    for start in range(0, a.shape[1], units.products):
        group = slice(start, start + units.products)
        products = a.T[group, :, None] * b[group, None, :]  # [products, M, N], exact in fp64
        highest = (a_exponents.T[group, :, None] + b_exponents[group, None, :]).max(0)
        highest = np.maximum(np.maximum(highest, exponents(total)), LOWEST_EXPONENT)
        last_bit = highest - FP32_FRACTION - units.extra_bits
        in_units = np.ldexp(1.0, -last_bit)
        aligned = np.trunc(total * in_units) + np.trunc(products * in_units).sum(0)
        aligned *= np.ldexp(1.0, last_bit)
        kept = ~np.uint64((1 << (FP64_FRACTION - FP32_FRACTION)) - 1)
        total = np.where(np.isfinite(aligned), (aligned.view(np.uint64) & kept).view(np.float64), aligned)
    return total


def dot_tf32x3(a: np.ndarray, b: np.ndarray, units: MatrixUnits) -> np.ndarray:
    """a [M, K] @ b [K, N] in fp32, as Triton's "tf32x3" computes it."""
    big_a, big_b = rounded_to_tf32(a), rounded_to_tf32(b)
    with np.errstate(invalid="ignore", over="ignore"):
        small_a, small_b = cut_to_tf32(a - big_a), cut_to_tf32(b - big_b)
        wide = [part.astype(np.float64) for part in (big_a, small_a, big_b, small_b)]
        big_a, small_a, big_b, small_b = wide
        total = np.zeros((a.shape[0], b.shape[1]))
        total = accumulate(accumulate(total, small_a, big_b, units), big_a, small_b, units)
        # An infinite operand has a small part of NaN, which Triton drops.
        total = accumulate(np.where(np.isnan(total), 0.0, total), big_a, big_b, units)
        return total.astype(np.float32)
