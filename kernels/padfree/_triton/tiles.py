"""Device code that every kernel shares: where a sequence lies, which keys are visible, how a tile is read.

Letters: b sequence, h query head, m query row, n key, d head_dim. Scores and the softmax state are fp32 and in
base 2: `scores2 = scale * log2(e) * q·k + log2(e) * bias`. `keep` is True where a query may see a key.
An absent tensor or window side is None, which the compiler removes.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Philox-2x32 (Salmon et al. 2011): the fewest rounds that pass BigCrush, multiplier and key step
PHILOX_ROUNDS, PHILOX_M, PHILOX_W = tl.constexpr(7), tl.constexpr(0xD256D193), tl.constexpr(0x9E3779B9)
SCAN_BLOCK = tl.constexpr(512)


@triton.jit
def sequence_rows(cu_seqlens_ptr, b, length):
    """(first row, number of rows) of sequence b: from cu_seqlens when packed, at most `length`; else all `length` rows."""
    if cu_seqlens_ptr is None:
        return tl.zeros((), tl.int64), length
    else:
        start = tl.load(cu_seqlens_ptr + b)
        return start.to(tl.int64), tl.minimum(tl.load(cu_seqlens_ptr + b + 1) - start, length)


@triton.jit
def visible_span(mask_ptr, stride_n, num_keys):
    """(first, stop, holes): keys outside [first, stop) are padding; `holes`: some inside are padding too."""
    first, stop, holes = num_keys * 0, num_keys, num_keys < 0
    if mask_ptr is not None:
        stops, visible = tl.zeros((SCAN_BLOCK,), tl.int32), tl.zeros((SCAN_BLOCK,), tl.int32)
        for start in range(0, num_keys, SCAN_BLOCK):
            n = start + tl.arange(0, SCAN_BLOCK)
            keep_n = load_keep_n(mask_ptr, stride_n, n, num_keys)
            stops = tl.where(keep_n, n + 1, stops)
            visible += keep_n.to(tl.int32)
        stop, count = tl.max(stops, 0), tl.sum(visible, 0)
        # Right padding has no gap before `stop` and is done; the rest look for their first key.
        if count < stop:
            firsts = tl.full((SCAN_BLOCK,), 0, tl.int32) + stop
            for start in range(0, stop, SCAN_BLOCK):
                n = start + tl.arange(0, SCAN_BLOCK)
                keep_n = load_keep_n(mask_ptr, stride_n, n, stop)
                firsts = tl.where(keep_n, tl.minimum(firsts, n), firsts)
            first = tl.min(firsts, 0)
        holes = count < stop - first
    return first, stop, holes


@triton.jit
def load_keep_n(mask_ptr, stride_n, n, stop):
    """[BLOCK] bool: key n lies before `stop` and is not padding. The one reader of the padding mask."""
    keep_n = n < stop
    if mask_ptr is not None:
        keep_n = keep_n & (tl.load(mask_ptr + n.to(tl.int64) * stride_n, mask=keep_n, other=1) == 0)
    return keep_n


@triton.jit
def visible_range(own_first, own_last, first, stop, ragged, before, after, BLOCK: tl.constexpr):
    """(lo, full_lo, full_hi, hi): which of [first, stop) see positions own_first..own_last, in tiles of BLOCK.

    A position i sees i - before .. i + after. Every one of [full_lo, full_hi) sees all of own_first..own_last,
    unless the range is `ragged`. Tiles start at `first`, so a sequence padded on the left has the tiles of the
    same one padded on the right. Serves keys of a row tile, and with the window's sides swapped rows of a key tile.
    """
    lo, full_lo, full_stop, hi = first, first, stop, stop
    if before is not None:
        lo = first + tl.maximum(own_first - before - first, 0) // BLOCK * BLOCK
        full_lo = first + tl.cdiv(tl.maximum(own_last - before - first, 0), BLOCK) * BLOCK
    if after is not None:
        hi = tl.minimum(stop, own_last + after + 1)
        full_stop = tl.minimum(stop, own_first + after + 1)
    full_hi = first + tl.maximum(full_stop - first, 0) // BLOCK * BLOCK
    none_full = ragged | (full_hi <= full_lo)
    return lo, tl.where(none_full, lo, full_lo), tl.where(none_full, lo, full_hi), tl.maximum(hi, lo)


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):
    """The stride, a multiple of ALIGN, in a form that shows it to the compiler and survives inlining."""
    return stride // ALIGN * ALIGN


@triton.jit
def keys_of_rows(
    m_first, m_last, mask_ptr, mask_stride_n, num_keys, window_left, window_right,
    BLOCK_N: tl.constexpr, SKIP_QUERIES: tl.constexpr,
):  # fmt: skip
    """(stop, lo, full_lo, full_hi, hi): what rows m_first..m_last walk.

    The edge [lo, full_lo), the full tiles [full_lo, full_hi) and the edge [full_hi, hi), which is all where padding
    leaves holes between visible keys. No key at or beyond `stop` is visible.
    """
    first, stop, holes = visible_span(mask_ptr, mask_stride_n, num_keys)
    lo, full_lo, full_hi, hi = visible_range(
        m_first, m_last, first, stop, holes, window_left, window_right, BLOCK_N
    )
    # A packed sequence may be shorter than the grid; rows that are padding may be skipped.
    real = m_first <= m_last
    if SKIP_QUERIES:
        real = real & (m_first < stop) & (m_last >= first)
    hi = tl.where(real, hi, lo)
    return stop, lo, tl.minimum(full_lo, hi), tl.minimum(full_hi, hi), hi


@triton.jit
def head_offset(strides, b, h, start, ALIGN: tl.constexpr):
    """Elements from a [B,H,S,D] tensor's first to row `start` of head h of sequence b."""
    return (
        b * aligned(strides[0], ALIGN) + h * aligned(strides[1], ALIGN) + start * aligned(strides[2], ALIGN)
    )


@triton.jit
def load_lse2(lse2_ptr, m, in_m):
    """(lse2, live_m) of rows m. A row that sees no key gets +inf, so that its probabilities are 0."""
    lse2 = tl.load(lse2_ptr + m, mask=in_m, other=float("-inf"))
    live_m = lse2 != float("-inf")
    return tl.where(live_m, lse2, float("inf")), live_m


@triton.jit
def refine(prob_sum, d_score_sum, d_lse, live_m):
    """(inverse, drift) of rows: exactly, P sums to 1 and dS to d_lse. DESIGN.md, "fp32 gradients".

    Rounded, they do not: P * inverse does, and dS does with delta + drift.
    """
    inverse = 1.0 / tl.where(live_m, prob_sum, 1.0)
    return inverse, tl.where(live_m, d_score_sum * inverse - d_lse, 0.0)


@triton.jit
def tile_offsets(start, strides, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr):
    """[BLOCK_R, BLOCK_D] offsets of rows start.. of one head, in 64 bits."""
    stride_r = aligned(strides[2], ALIGN)
    r = tl.arange(0, BLOCK_R)[:, None].to(tl.int64)
    d = tl.arange(0, BLOCK_D)[None, :].to(tl.int64)
    return tl.cast(start, tl.int64) * stride_r + (r * stride_r + d * strides[3])


@triton.jit
def load_tile(
    ptr, start, strides, keep_r,
    HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_D] rows start.. of one head; rows not in keep_r (None: all are) read 0."""
    ptrs = ptr + tile_offsets(start, strides, BLOCK_R, BLOCK_D, ALIGN)
    in_d = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
    if HEAD_DIM == BLOCK_D and keep_r is None:
        tile = tl.load(ptrs)
    elif HEAD_DIM == BLOCK_D:
        tile = tl.load(ptrs, mask=keep_r[:, None], other=0.0)
    elif keep_r is None:
        tile = tl.load(ptrs, mask=in_d, other=0.0)
    else:
        tile = tl.load(ptrs, mask=keep_r[:, None] & in_d, other=0.0)
    return tile


@triton.jit
def store_tile(
    ptr, tile, start, strides, in_r,
    HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Store [BLOCK_R, BLOCK_D] at rows start.. of one head, rows in_r only."""
    ptrs = ptr + tile_offsets(start, strides, BLOCK_R, BLOCK_D, ALIGN)
    in_d = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=in_r[:, None] & in_d)


@triton.jit
def in_window(keep, m, n, window_left, window_right):
    """keep and m - left <= n <= m + right. m and n broadcast against keep, in either orientation."""
    if window_left is not None:
        keep = keep & (n >= m - window_left)
    if window_right is not None:
        keep = keep & (n <= m + window_right)
    return keep


@triton.jit
def hide(scores, keep):
    """-inf where not keep: a selection, so that NaN does not survive it."""
    return tl.where(keep, scores, float("-inf"))


@triton.jit
def hide_keys(scores, keep_n, m, n, window_left, window_right):
    """scores [BLOCK_M, BLOCK_N] with hidden keys at -inf; without a window one register a column decides."""
    if window_left is None and window_right is None:
        cap = tl.where(keep_n, float("inf"), float("-inf"))
        scores = tl.minimum(scores, cap[None, :])
    else:
        scores = hide(scores, in_window(keep_n[None, :], m[:, None], n[None, :], window_left, window_right))
    return scores


@triton.jit
def load_attn_mask(attn_mask_ptr, strides, m, n, in_mn, IS_BIAS: tl.constexpr):
    """attn_mask at rows m and keys n as it is stored; hidden outside in_mn.

    Where a softmax follows, to be read before the dot: of two layouts that meet in a tile the compiler keeps that of the
    later one, and both, with every exponent computed twice, where the mask's comes last.
    """
    ptrs = attn_mask_ptr + m.to(tl.int64) * strides[2] + n.to(tl.int64) * strides[3]
    return tl.load(ptrs, mask=in_mn, other=float("-inf") if IS_BIAS else 1)


@triton.jit
def scale_add(scores, factor, addend):
    """scores * factor + addend, rounded once.

    Spelled out, because kernels must agree about a weight to the last bit: the compiler fuses a product and a sum only where
    no change of layout comes between, which is in some kernels and not in others (NOTES.md, 2026-11-27).
    """
    return tl.fma(scores, tl.full(scores.shape, factor, tl.float32), tl.broadcast_to(addend, scores.shape))


@triton.jit
def apply_attn_mask(scores, factor, attn_mask, IS_BIAS: tl.constexpr):
    """(scores, factor) after a tile of attn_mask: a bool hides, a float is added in base 2.

    The factor that turns scores into scores2 is spent when a bias is added. A finite bias stays finite.
    """
    if IS_BIAS:
        bias = attn_mask.to(tl.float32)
        # No maximum: on a GPU that of NaN and a number is the number, and the NaN would hide its key without a word.
        bias2 = bias * LOG2E
        bias2 = tl.where((bias2 < LOWEST) & (bias > float("-inf")), LOWEST, bias2)
        scores = scale_add(scores, factor, bias2)
        factor = 1.0
    else:
        scores = hide(scores, attn_mask == 0)
    return scores, factor


@triton.jit
def score_tile(
    q, k_ptr, attn_mask_ptr, k_strides, attn_mask_strides, start, stop, m, live_m, n, keep_n, factor,
    window_left, window_right,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, IS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """(scores [BLOCK_M, BLOCK_N] with hidden keys at -inf, the factor that makes them scores2, k)."""
    k = load_tile(k_ptr, start, k_strides, keep_n, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN)
    attn_mask = None
    if attn_mask_ptr is not None:
        in_mn = live_m[:, None] & (n < stop)[None, :]
        attn_mask = load_attn_mask(attn_mask_ptr, attn_mask_strides, m[:, None], n[None, :], in_mn, IS_BIAS)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if attn_mask_ptr is not None:
        scores, factor = apply_attn_mask(scores, factor, attn_mask, IS_BIAS)
    if keep_n is not None:
        scores = hide_keys(scores, keep_n, m, n, window_left, window_right)
    return scores, factor, k


@triton.jit
def dropout_stream(seed_ptr, bh):
    """The 32-bit key that the weights of head b·H + h are dropped by: a hash of it and the call's seed."""
    stream, _, _, _ = tl.philox(tl.load(seed_ptr), bh, bh * 0, bh * 0, bh * 0)
    return stream


@triton.jit
def dropout_keep(stream, m, n, dropout_p):
    """True where a weight stays: Philox-2x32 at counter (n, m), so the same forward and backward in tiles of any size.

    m and n broadcast; two instructions a round and weight, where 4x32 takes four for words nobody reads.
    """
    key, word, other = stream, n.to(tl.uint32), m.to(tl.uint32)
    for _ in tl.static_range(PHILOX_ROUNDS):
        word, other = tl.umulhi(word, PHILOX_M) ^ other ^ key, word * PHILOX_M
        key += PHILOX_W
    return word >= tl.cast(dropout_p * 4294967296.0, tl.uint32)


@triton.jit
def drop(values, stays, dropout_p):
    """The values that stay, scaled up to the same mean, and 0 for the others."""
    return tl.where(stays, values * (1.0 / (1.0 - dropout_p)), 0.0)


@triton.jit
def online_softmax_step(
    row_max, row_sum, scores, factor, SOME_HIDDEN: tl.constexpr, IS_FP32: tl.constexpr
):  # fmt: skip
    """One tile of the running softmax: (probs, row_max, row_sum, rescale), with probs = exp2(factor * (scores - row_max)).

    factor > 0, so that it can be taken out of the maximum and, in half precision, folded into one multiply-add with the
    exponent. That leaves the product's rounding in every weight of a row, which fp32 would show: it subtracts first.
    Only where scores may be hidden can a row still have no maximum.
    """
    row_max_new = tl.maximum(row_max, tl.max(scores, 1))
    shift = row_max_new
    if SOME_HIDDEN:
        shift = tl.where(row_max_new == float("-inf"), 0.0, row_max_new)
    if IS_FP32:
        probs = tl.exp2((scores - shift[:, None]) * factor)
    else:
        probs = tl.exp2(scale_add(scores, factor, -(shift * factor)[:, None]))
    rescale = tl.exp2((row_max - shift) * factor)
    return probs, row_max_new, row_sum * rescale + tl.sum(probs, 1), rescale
