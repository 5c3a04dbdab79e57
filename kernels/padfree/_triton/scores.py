"""Device code for a tile of scores: masks, the steps of the softmax, dropout.

Scores and the softmax's state are fp32 and in base 2: `scores2 = scale * log2(e) * q·k + log2(e) * bias`. A score that is
not yet scaled goes with the `factor` that makes it a score2. `keep` is True where a query may see a key.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from padfree._triton.arguments import View

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Philox-2x32 (Salmon et al. 2011): the fewest rounds that pass BigCrush, multiplier and key step
PHILOX_ROUNDS, PHILOX_M, PHILOX_W = tl.constexpr(7), tl.constexpr(0xD256D193), tl.constexpr(0x9E3779B9)


class Softmax(NamedTuple):
    """The running softmax of a tile of rows: weights @ v so far, the maximum of the scores, the sum of the weights."""

    acc: Any
    row_max: Any
    row_sum: Any


@triton.jit
def score_tile(rows, k, head, inputs, n, keep_n, stop, TILE: tl.constexpr):
    """(scores [BLOCK_M, BLOCK_N] with hidden keys at -inf, their factor): `rows` against the keys n, held in k.

    keep_n is None where every row sees every key, but for what attn_mask hides.
    """
    factor = inputs.scale2
    attn_mask = None
    if inputs.attn_mask.ptr is not None:
        in_mn = rows.live_m[:, None] & (n < stop)[None, :]
        attn_mask = load_attn_mask(mask_of_head(inputs, head), rows.m[:, None], n[None, :], in_mn)
    scores = tl.dot(rows.q, tl.trans(k), input_precision=TILE.PRECISION)
    if inputs.attn_mask.ptr is not None:
        scores, factor = apply_attn_mask(scores, factor, attn_mask)
    if keep_n is not None:
        scores = hide_keys(scores, keep_n, rows.m, n, inputs.window)
    return scores, factor


@triton.jit
def hide(scores, keep):
    """-inf where not keep: a selection, so that NaN does not survive it."""
    return tl.where(keep, scores, float("-inf"))


@triton.jit
def hide_keys(scores, keep_n, m, n, window):
    """scores [BLOCK_M, BLOCK_N] with hidden keys at -inf; without a window one register a column decides."""
    if window.left is None and window.right is None:
        cap = tl.where(keep_n, float("inf"), float("-inf"))
        scores = tl.minimum(scores, cap[None, :])
    else:
        scores = hide(scores, in_window(keep_n[None, :], m[:, None], n[None, :], window))
    return scores


@triton.jit
def in_window(keep, m, n, window):
    """keep and m - left <= n <= m + right. m and n broadcast against keep, in either orientation."""
    if window.left is not None:
        keep = keep & (n >= m - window.left)
    if window.right is not None:
        keep = keep & (n <= m + window.right)
    return keep


@triton.jit
def mask_of_head(inputs, head):
    """The View of attn_mask from its first row for this head on."""
    return View(inputs.attn_mask.ptr + head.mask_start, inputs.attn_mask.strides)


@triton.jit
def load_attn_mask(attn_mask, m, n, in_mn):
    """A head's attn_mask at rows m and keys n as it is stored; hidden outside in_mn.

    Load it before the dot if a softmax follows. Where it is loaded last, the compiler keeps its layout beside that of the
    dot and computes every exponential twice.
    """
    ptrs = attn_mask.ptr + m.to(tl.int64) * attn_mask.strides[2] + n.to(tl.int64) * attn_mask.strides[3]
    return tl.load(ptrs, mask=in_mn, other=1 if attn_mask.ptr.dtype.element_ty == tl.uint8 else float("-inf"))


@triton.jit
def apply_attn_mask(scores, factor, attn_mask):
    """(scores, factor) after a tile of attn_mask: bytes that are not 0 hide, a float is added in base 2.

    Adding a bias applies the factor, which becomes 1. A finite bias stays finite.
    """
    if attn_mask.dtype == tl.uint8:
        scores = hide(scores, attn_mask == 0)
    else:
        bias = attn_mask.to(tl.float32)
        # Not tl.maximum: on a GPU the maximum of NaN and a number is the number, which would hide a NaN in the bias.
        bias2 = bias * LOG2E
        bias2 = tl.where((bias2 < LOWEST) & (bias > float("-inf")), LOWEST, bias2)
        scores = scale_add(scores, factor, bias2)
        factor = 1.0
    return scores, factor


@triton.jit
def scale_add(scores, factor, addend):
    """scores * factor + addend, rounded once.

    Spelled out, because kernels must agree about a weight to the last bit: the compiler fuses a product and a sum only where
    no change of layout comes between, which is in some kernels and not in others (NOTES.md, 2026-11-27).
    """
    return tl.fma(scores, tl.full(scores.shape, factor, tl.float32), tl.broadcast_to(addend, scores.shape))


@triton.jit
def softmax_step(state, scores, factor, SOME_HIDDEN: tl.constexpr, IS_FP32: tl.constexpr):
    """One tile of the running softmax: (probs, row_max, row_sum, rescale), with probs = exp2(factor * (scores - row_max)).

    factor > 0, so that it can be taken out of the maximum and, in half precision, folded into one multiply-add with the
    exponent. That leaves the product's rounding in every weight of a row, which fp32 would show: it subtracts first.
    Only where scores may be hidden can a row still have no maximum.
    """
    row_max = tl.maximum(state.row_max, tl.max(scores, 1))
    shift = row_max
    if SOME_HIDDEN:
        shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    if IS_FP32:
        probs = tl.exp2((scores - shift[:, None]) * factor)
    else:
        probs = tl.exp2(scale_add(scores, factor, -(shift * factor)[:, None]))
    rescale = tl.exp2((state.row_max - shift) * factor)
    return probs, row_max, state.row_sum * rescale + tl.sum(probs, 1), rescale


@triton.jit
def refine(prob_sum, d_score_sum, d_lse, live_m):
    """(inverse, drift) of rows: exactly, P sums to 1 and dS to d_lse. DESIGN.md, "fp32 gradients".

    Rounded, they do not: P * inverse does, and dS does with delta + drift.
    """
    inverse = 1.0 / tl.where(live_m, prob_sum, 1.0)
    return inverse, tl.where(live_m, d_score_sum * inverse - d_lse, 0.0)


@triton.jit
def dropout_stream(inputs, b, h):
    """The 32-bit key that head h of sequence b drops weights by, a hash of both and the call's seed; 0 without dropout."""
    if inputs.dropout.seed_ptr is None:
        return tl.zeros((), tl.uint32)
    else:
        bh = (b * inputs.sizes.heads + h).to(tl.int32)
        stream, _, _, _ = tl.philox(tl.load(inputs.dropout.seed_ptr), bh, bh * 0, bh * 0, bh * 0)
        return stream


@triton.jit
def dropout_keep(stream, m, n, dropout_p):
    """True where a weight is kept: Philox-2x32 at counter (n, m), so the same forward and backward in tiles of any size.

    m and n broadcast; two instructions a round and weight, where 4x32 takes four for words nobody reads.
    """
    key, word, other = stream, n.to(tl.uint32), m.to(tl.uint32)
    for _ in tl.static_range(PHILOX_ROUNDS):
        word, other = tl.umulhi(word, PHILOX_M) ^ other ^ key, word * PHILOX_M
        key += PHILOX_W
    return word >= tl.cast(dropout_p * 4294967296.0, tl.uint32)


@triton.jit
def drop(values, kept, dropout_p):
    """The values that are kept, scaled up to the same mean, and 0 for the others."""
    return tl.where(kept, values * (1.0 / (1.0 - dropout_p)), 0.0)
