"""Forward kernel: out = softmax(scale * q @ kᵀ + attn_mask) @ v, and its LSE in base 2. DESIGN.md, "Forward".

Grid: one program per (tile of BLOCK_M query rows, sequence and head); it owns those rows of out and lse2.
Tiles with the highest rows come first: only long sequences have them, so long work starts first without a sort.
"""

import triton
import triton.language as tl
from torch import Tensor

from padfree._triton.call import Call, on_device
from padfree._triton.configs import Config
from padfree._triton.tiles import (
    dropout_keep,
    dropout_stream,
    head_offset,
    keys_of_rows,
    load_keep_n,
    load_tile,
    online_softmax_step,
    score_tile,
    sequence_rows,
    store_tile,
)


@triton.jit
def attend(
    acc, row_max, row_sum, q, k_ptr, v_ptr, mask_ptr, attn_mask_ptr, stream,
    k_strides, v_strides, mask_stride_n, attn_mask_strides,
    lo, hi, stop, m, live_m, factor, dropout_p, window_left, window_right,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, IS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Let rows m see the keys of [lo, hi), tile by tile; with MASKED some may be hidden."""
    for start in tl.range(lo, hi, BLOCK_N, num_stages=1 if MASKED else None):
        n = start + tl.arange(0, BLOCK_N)
        keep_n = load_keep_n(mask_ptr, mask_stride_n, n, stop) if MASKED else None
        scores, tile_factor, _ = score_tile(
            q, k_ptr, attn_mask_ptr, k_strides, attn_mask_strides, start, stop, m, live_m, n, keep_n, factor,
            window_left, window_right, HEAD_DIM, BLOCK_D, BLOCK_N, IS_BIAS, PRECISION, ALIGN,
        )  # fmt: skip
        probs, row_max, row_sum, rescale = online_softmax_step(
            row_max, row_sum, scores, tile_factor, MASKED or attn_mask_ptr is not None,
            q.dtype == tl.float32,
        )  # fmt: skip
        if stream is not None:
            probs = tl.where(dropout_keep(stream, m[:, None], n[None, :], dropout_p), probs, 0.0)
        v = load_tile(v_ptr, start, v_strides, keep_n, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN)
        acc = tl.dot(probs.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, row_max, row_sum


@triton.jit
def attention_forward_kernel(
    # Tensors: [B,H,M,D], [B,H_kv,N,D] x2, [B,N], [B,H,M,N], [1], [B+1] x2; out [B,H,M,D], lse2 [B,H,M]
    q_ptr, k_ptr, v_ptr, mask_ptr, attn_mask_ptr, seed_ptr, cu_q_ptr, cu_k_ptr, out_ptr, lse2_ptr,
    # Strides, one tuple a tensor
    q_strides, k_strides, v_strides, mask_strides, attn_mask_strides, out_strides, lse2_strides,
    # Sizes and scalars
    sequences, heads, num_queries, num_keys, scale, scale2, dropout_p, window_left, window_right,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr, SKIP_QUERIES: tl.constexpr, IS_BIAS: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One tile of query rows against every key it may see."""
    tile = tl.cdiv(num_queries, BLOCK_M) - 1 - tl.program_id(0) // (sequences * heads)
    bh = tl.program_id(0) % (sequences * heads)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    kv_h = h // GROUP
    q_start, rows = sequence_rows(cu_q_ptr, b, num_queries)
    k_start, keys = sequence_rows(cu_k_ptr, b, num_keys)
    q_ptr += head_offset(q_strides, b, h, q_start, ALIGN)
    k_ptr += head_offset(k_strides, b, kv_h, k_start, ALIGN)
    v_ptr += head_offset(v_strides, b, kv_h, k_start, ALIGN)
    out_ptr += head_offset(out_strides, b, h, q_start, ALIGN)
    lse2_ptr += b * lse2_strides[0] + h * lse2_strides[1] + q_start
    if mask_ptr is not None:
        mask_ptr += b * mask_strides[0]
    if attn_mask_ptr is not None:
        attn_mask_ptr += b * attn_mask_strides[0] + h * attn_mask_strides[1]
    stream = None if seed_ptr is None else dropout_stream(seed_ptr, bh)

    m_first = tile * BLOCK_M
    m_last = tl.minimum(m_first + BLOCK_M, rows) - 1
    m = m_first + tl.arange(0, BLOCK_M)
    in_m = m < rows
    live_m = load_keep_n(mask_ptr, mask_strides[1], m, rows) if SKIP_QUERIES else in_m
    stop, lo, full_lo, full_hi, hi = keys_of_rows(
        m_first, m_last, mask_ptr, mask_strides[1], keys, window_left, window_right, BLOCK_N, SKIP_QUERIES
    )

    q = load_tile(q_ptr, m_first, q_strides, live_m, HEAD_DIM, BLOCK_M, BLOCK_D, ALIGN)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    if window_left is not None:
        acc, row_max, row_sum = attend(
            acc, row_max, row_sum, q, k_ptr, v_ptr, mask_ptr, attn_mask_ptr, stream,
            k_strides, v_strides, mask_strides[1], attn_mask_strides,
            lo, full_lo, stop, m, live_m, scale2, dropout_p, window_left, window_right,
            HEAD_DIM, BLOCK_D, BLOCK_N, IS_BIAS, PRECISION, ALIGN, MASKED=True,
        )  # fmt: skip
    acc, row_max, row_sum = attend(
        acc, row_max, row_sum, q, k_ptr, v_ptr, mask_ptr, attn_mask_ptr, stream,
        k_strides, v_strides, mask_strides[1], attn_mask_strides,
        full_lo, full_hi, stop, m, live_m, scale2, dropout_p, window_left, window_right,
        HEAD_DIM, BLOCK_D, BLOCK_N, IS_BIAS, PRECISION, ALIGN, MASKED=False,
    )  # fmt: skip
    acc, row_max, row_sum = attend(
        acc, row_max, row_sum, q, k_ptr, v_ptr, mask_ptr, attn_mask_ptr, stream,
        k_strides, v_strides, mask_strides[1], attn_mask_strides,
        full_hi, hi, stop, m, live_m, scale2, dropout_p, window_left, window_right,
        HEAD_DIM, BLOCK_D, BLOCK_N, IS_BIAS, PRECISION, ALIGN, MASKED=True,
    )  # fmt: skip

    # NaN in a row's scores leaves it without a maximum, but not without a sum: it must come out NaN, not 0.
    live_m = live_m & (row_sum != 0.0)
    kept = 1.0 if seed_ptr is None else 1.0 - dropout_p
    row_sum = tl.where(live_m, row_sum, 1.0)
    # One reciprocal a row, where a division an element costs four instructions each.
    out = tl.where(live_m[:, None], acc, 0.0) * (1.0 / (row_sum * kept))[:, None]
    store_tile(out_ptr, out, m_first, out_strides, in_m, HEAD_DIM, BLOCK_M, BLOCK_D, ALIGN)
    factor = 1.0 if attn_mask_ptr is not None and IS_BIAS else scale2
    lse2 = tl.where(live_m, row_max * factor + tl.log2(row_sum), float("-inf"))
    tl.store(lse2_ptr + m, lse2, mask=in_m)


def launch_forward(call: Call, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """(out like query, lse2 [B,H,M] fp32) in one launch."""
    query = call.query
    out, lse2 = call.empty_like(query), call.empty_lse2()
    if call.is_empty:
        return out, lse2
    config = config or call.config("forward")
    with on_device(query):
        attention_forward_kernel[call.grid(call.max_q, config.block_m, call.heads)](
            out_ptr=out,
            lse2_ptr=lse2,
            out_strides=call.strides(out),
            lse2_strides=call.strides(lse2),
            **call.kernel_args(config, out),
        )
    return out, lse2
