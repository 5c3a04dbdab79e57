"""The gradient of the query, and what the passes after it read. DESIGN.md, "Backward".

Grid as in the forward: a program owns its rows of dq, and of delta = rowsum(out * d_out) - log2(e) * d_lse2 and, for
fp32, `inverse`. It recomputes the scores from q, k and lse2; sums run in one fixed order, so results repeat bit for bit.
"""

import triton
import triton.language as tl
from torch import Tensor

from padfree._triton.call import Call
from padfree._triton.configs import Config
from padfree._triton.tiles import (
    LOG2E,
    drop,
    dropout_keep,
    dropout_stream,
    head_offset,
    keys_of_rows,
    load_keep_n,
    load_lse2,
    load_tile,
    refine,
    scale_add,
    score_tile,
    sequence_rows,
    store_tile,
)


@triton.jit
def accumulate_dq(
    dq, prob_sum, d_score_sum, weighted_k, q, d_out, lse2, delta, k_ptr, v_ptr, mask_ptr, attn_mask_ptr, stream,
    k_strides, v_strides, mask_stride_n, attn_mask_strides,
    lo, hi, stop, m, live_m, factor, dropout_p, window_left, window_right,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, IS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr, ROW_SUMS: tl.constexpr, REFINE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq += dS @ k over the keys of [lo, hi), of which some may be hidden if MASKED, with dS = P * (d_out @ vᵀ - delta).

    With ROW_SUMS also the row sums of P and dS, with REFINE also P @ k.
    """
    for start in tl.range(lo, hi, BLOCK_N, num_stages=1 if MASKED else None):
        n = start + tl.arange(0, BLOCK_N)
        keep_n = load_keep_n(mask_ptr, mask_stride_n, n, stop) if MASKED else None
        v = load_tile(v_ptr, start, v_strides, keep_n, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN)
        scores, tile_factor, k = score_tile(
            q, k_ptr, attn_mask_ptr, k_strides, attn_mask_strides, start, stop, m, live_m, n, keep_n, factor,
            window_left, window_right, HEAD_DIM, BLOCK_D, BLOCK_N, IS_BIAS, PRECISION, ALIGN,
        )  # fmt: skip
        probs = tl.exp2(scale_add(scores, tile_factor, -lse2[:, None]))
        d_probs = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        if stream is not None:
            kept = dropout_keep(stream, m[:, None], n[None, :], dropout_p)
            d_probs = drop(d_probs, kept, dropout_p)
        d_scores = probs * (d_probs - delta[:, None])
        dq = tl.dot(d_scores.to(k.dtype), k, dq, input_precision=PRECISION)
        if ROW_SUMS:
            prob_sum += tl.sum(probs, 1)
            d_score_sum += tl.sum(d_scores, 1)
        if REFINE:
            weighted_k = tl.dot(probs, k, weighted_k, input_precision=PRECISION)
    return dq, prob_sum, d_score_sum, weighted_k


@triton.jit
def query_gradient_kernel(
    # Tensors as in the forward; d_out and dq [B,H,M,D], the others [B,H,M] fp32; d_lse2, inverse and refined may be None
    q_ptr, k_ptr, v_ptr, mask_ptr, attn_mask_ptr, seed_ptr, cu_q_ptr, cu_k_ptr,
    out_ptr, lse2_ptr, d_out_ptr, d_lse2_ptr, delta_ptr, inverse_ptr, refined_ptr, dq_ptr,
    # Strides; delta, inverse and refined share lse2's
    q_strides, k_strides, v_strides, mask_strides, attn_mask_strides,
    out_strides, lse2_strides, d_out_strides, d_lse2_strides, dq_strides,
    # Sizes and scalars
    sequences, heads, num_queries, num_keys, scale, scale2, dropout_p, window_left, window_right,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr, SKIP_QUERIES: tl.constexpr, IS_BIAS: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One tile of query rows: delta and dq = scale * dS @ k; for fp32 both made to fit the recomputed weights.

    With refined_ptr only what it receives, delta for attn_mask's gradient, is made to fit.
    """
    ROW_SUMS: tl.constexpr = inverse_ptr is not None
    REFINE: tl.constexpr = inverse_ptr is not None and refined_ptr is None
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
    d_out_ptr += head_offset(d_out_strides, b, h, q_start, ALIGN)
    dq_ptr += head_offset(dq_strides, b, h, q_start, ALIGN)
    rows_offset = b * lse2_strides[0] + h * lse2_strides[1] + q_start
    if d_lse2_ptr is not None:
        d_lse2_ptr += b * d_lse2_strides[0] + h * d_lse2_strides[1] + q_start * d_lse2_strides[2]
    if mask_ptr is not None:
        mask_ptr += b * mask_strides[0]
    if attn_mask_ptr is not None:
        attn_mask_ptr += b * attn_mask_strides[0] + h * attn_mask_strides[1]
    stream = None if seed_ptr is None else dropout_stream(seed_ptr, bh)

    m_first = tile * BLOCK_M
    m_last = tl.minimum(m_first + BLOCK_M, rows) - 1
    m = m_first + tl.arange(0, BLOCK_M)
    in_m = m < rows
    stop, lo, full_lo, full_hi, hi = keys_of_rows(
        m_first, m_last, mask_ptr, mask_strides[1], keys, window_left, window_right, BLOCK_N, SKIP_QUERIES
    )

    lse2, live_m = load_lse2(lse2_ptr + rows_offset, m, in_m)
    q = load_tile(q_ptr, m_first, q_strides, live_m, HEAD_DIM, BLOCK_M, BLOCK_D, ALIGN)
    d_out = load_tile(d_out_ptr, m_first, d_out_strides, live_m, HEAD_DIM, BLOCK_M, BLOCK_D, ALIGN)
    out = load_tile(out_ptr, m_first, out_strides, live_m, HEAD_DIM, BLOCK_M, BLOCK_D, ALIGN)
    d_lse = tl.zeros((BLOCK_M,), tl.float32)
    if d_lse2_ptr is not None:
        d_lse = LOG2E * tl.load(d_lse2_ptr + m.to(tl.int64) * d_lse2_strides[2], mask=live_m, other=0.0)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1) - d_lse
    if not REFINE:
        tl.store(delta_ptr + rows_offset + m, delta, mask=in_m)

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    prob_sum = tl.zeros((BLOCK_M,), tl.float32)
    d_score_sum = tl.zeros((BLOCK_M,), tl.float32)
    weighted_k = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if window_left is not None:
        dq, prob_sum, d_score_sum, weighted_k = accumulate_dq(
            dq, prob_sum, d_score_sum, weighted_k, q, d_out, lse2, delta, k_ptr, v_ptr, mask_ptr, attn_mask_ptr, stream,
            k_strides, v_strides, mask_strides[1], attn_mask_strides,
            lo, full_lo, stop, m, live_m, scale2, dropout_p, window_left, window_right,
            HEAD_DIM, BLOCK_D, BLOCK_N, IS_BIAS, PRECISION, ALIGN, ROW_SUMS, REFINE, MASKED=True,
        )  # fmt: skip
    dq, prob_sum, d_score_sum, weighted_k = accumulate_dq(
        dq, prob_sum, d_score_sum, weighted_k, q, d_out, lse2, delta, k_ptr, v_ptr, mask_ptr, attn_mask_ptr, stream,
        k_strides, v_strides, mask_strides[1], attn_mask_strides,
        full_lo, full_hi, stop, m, live_m, scale2, dropout_p, window_left, window_right,
        HEAD_DIM, BLOCK_D, BLOCK_N, IS_BIAS, PRECISION, ALIGN, ROW_SUMS, REFINE, MASKED=False,
    )  # fmt: skip
    dq, prob_sum, d_score_sum, weighted_k = accumulate_dq(
        dq, prob_sum, d_score_sum, weighted_k, q, d_out, lse2, delta, k_ptr, v_ptr, mask_ptr, attn_mask_ptr, stream,
        k_strides, v_strides, mask_strides[1], attn_mask_strides,
        full_hi, hi, stop, m, live_m, scale2, dropout_p, window_left, window_right,
        HEAD_DIM, BLOCK_D, BLOCK_N, IS_BIAS, PRECISION, ALIGN, ROW_SUMS, REFINE, MASKED=True,
    )  # fmt: skip
    if ROW_SUMS:
        inverse, drift = refine(prob_sum, d_score_sum, d_lse, live_m)
        tl.store(inverse_ptr + rows_offset + m, inverse, mask=in_m)
        if REFINE:
            dq = (dq - drift[:, None] * weighted_k) * inverse[:, None]
            tl.store(delta_ptr + rows_offset + m, delta + drift, mask=in_m)
        else:
            tl.store(refined_ptr + rows_offset + m, delta + drift, mask=in_m)
    dq = tl.where(live_m[:, None], dq * scale, 0.0)
    store_tile(dq_ptr, dq, m_first, dq_strides, in_m, HEAD_DIM, BLOCK_M, BLOCK_D, ALIGN)


def launch_query_gradient(
    call: Call,
    out: Tensor,
    lse2: Tensor,
    d_out: Tensor,
    d_lse2: Tensor | None,
    delta: Tensor,
    inverse: Tensor | None,
    refined: Tensor | None,
    dq: Tensor,
    config: Config | None = None,
) -> None:
    """Write dq, delta and, where given, inverse and refined, in one launch."""
    config = config or call.config("query_gradient")
    query_gradient_kernel[call.grid(call.max_q, config.block_m, call.heads)](
        out_ptr=out,
        d_out_ptr=d_out,
        d_lse2_ptr=d_lse2,
        lse2_ptr=lse2,
        delta_ptr=delta,
        inverse_ptr=inverse,
        refined_ptr=refined,
        dq_ptr=dq,
        out_strides=call.strides(out),
        lse2_strides=call.strides(lse2),
        d_out_strides=call.strides(d_out),
        d_lse2_strides=(0, 0, 0) if d_lse2 is None else call.strides(d_lse2),
        dq_strides=call.strides(dq),
        **call.kernel_args(config, out, d_out, dq),
    )
