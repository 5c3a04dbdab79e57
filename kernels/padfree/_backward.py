"""Backward kernels: dq, dk and dv in two launches, without atomics. DESIGN.md, "Backward".

`query_gradient_kernel`, grid as in the forward: a program owns its rows of dq, and of what later launches read,
delta = rowsum(out * d_out) - log2(e) * d_lse2 and, for fp32, `inverse`. `key_gradient_kernel`, one program per (tile of BLOCK_N keys,
sequence and key head): it owns those rows of dk and dv and walks every query that sees them. Both recompute the
scores from q, k and lse2; sums run in one fixed order, so results repeat bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from padfree._attn_mask_gradient import launch_attn_mask_gradient
from padfree._configs import Config
from padfree._launch import Call, on_device
from padfree._tiles import (
    EDGE,
    FULL,
    HOLES,
    LOG2E,
    apply_attn_mask,
    dropout_keep,
    head_offset,
    hide,
    in_window,
    keys_of_rows,
    load_keep_n,
    load_lse2,
    load_tile,
    refine,
    score_tile,
    sequence_rows,
    store_tile,
    visible_range,
    visible_span,
)


@triton.jit
def accumulate_dq(
    dq, prob_sum, d_score_sum, weighted_k, q, d_out, lse2, delta, k_ptr, v_ptr, mask_ptr, attn_mask_ptr, seed,
    k_strides, v_strides, mask_stride_n, attn_mask_strides,
    lo, hi, stop, m, live_m, bh, factor, dropout_p, window_left, window_right,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, IS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr, ROW_SUMS: tl.constexpr, REFINE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """dq += dS @ k over the keys of [lo, hi), as visible as TILES says, with dS = P * (d_out @ vᵀ - delta).

    With ROW_SUMS also the row sums of P and dS, with REFINE also P @ k.
    """
    for start in tl.range(lo, hi, BLOCK_N, num_stages=None if TILES == FULL else 1):
        n = start + tl.arange(0, BLOCK_N)
        keep_n = n < stop
        if TILES == HOLES:
            keep_n = load_keep_n(mask_ptr, mask_stride_n, n, stop)
        if TILES != HOLES or tl.max(keep_n.to(tl.int32), 0) > 0:
            v_keep = None if TILES == FULL else keep_n
            v = load_tile(v_ptr, start, v_strides, v_keep, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN)
            scores, tile_factor, k = score_tile(
                q, k_ptr, attn_mask_ptr, k_strides, attn_mask_strides, start, stop, m, live_m, n, keep_n, factor,
                window_left, window_right, HEAD_DIM, BLOCK_D, BLOCK_N, IS_BIAS, PRECISION, ALIGN, TILES,
            )  # fmt: skip
            probs = tl.exp2(scores * tile_factor - lse2[:, None])
            d_probs = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
            if seed is not None:
                kept = dropout_keep(seed, bh, m[:, None], n[None, :], dropout_p)
                d_probs = tl.where(kept, d_probs / (1.0 - dropout_p), 0.0)
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
    seed = None if seed_ptr is None else tl.load(seed_ptr)

    m_first = tile * BLOCK_M
    m_last = tl.minimum(m_first + BLOCK_M, rows) - 1
    m = m_first + tl.arange(0, BLOCK_M)
    in_m = m < rows
    stop, lo, holes_hi, full_lo, full_hi, hi = keys_of_rows(
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
    if mask_ptr is not None:
        dq, prob_sum, d_score_sum, weighted_k = accumulate_dq(
            dq, prob_sum, d_score_sum, weighted_k, q, d_out, lse2, delta, k_ptr, v_ptr, mask_ptr, attn_mask_ptr, seed,
            k_strides, v_strides, mask_strides[1], attn_mask_strides,
            lo, holes_hi, stop, m, live_m, bh, scale2, dropout_p, window_left, window_right,
            HEAD_DIM, BLOCK_D, BLOCK_N, IS_BIAS, PRECISION, ALIGN, ROW_SUMS, REFINE, TILES=HOLES,
        )  # fmt: skip
    if window_left is not None:
        dq, prob_sum, d_score_sum, weighted_k = accumulate_dq(
            dq, prob_sum, d_score_sum, weighted_k, q, d_out, lse2, delta, k_ptr, v_ptr, mask_ptr, attn_mask_ptr, seed,
            k_strides, v_strides, mask_strides[1], attn_mask_strides,
            lo, full_lo, stop, m, live_m, bh, scale2, dropout_p, window_left, window_right,
            HEAD_DIM, BLOCK_D, BLOCK_N, IS_BIAS, PRECISION, ALIGN, ROW_SUMS, REFINE, TILES=EDGE,
        )  # fmt: skip
    dq, prob_sum, d_score_sum, weighted_k = accumulate_dq(
        dq, prob_sum, d_score_sum, weighted_k, q, d_out, lse2, delta, k_ptr, v_ptr, mask_ptr, attn_mask_ptr, seed,
        k_strides, v_strides, mask_strides[1], attn_mask_strides,
        full_lo, full_hi, stop, m, live_m, bh, scale2, dropout_p, window_left, window_right,
        HEAD_DIM, BLOCK_D, BLOCK_N, IS_BIAS, PRECISION, ALIGN, ROW_SUMS, REFINE, TILES=FULL,
    )  # fmt: skip
    dq, prob_sum, d_score_sum, weighted_k = accumulate_dq(
        dq, prob_sum, d_score_sum, weighted_k, q, d_out, lse2, delta, k_ptr, v_ptr, mask_ptr, attn_mask_ptr, seed,
        k_strides, v_strides, mask_strides[1], attn_mask_strides,
        full_hi, hi, stop, m, live_m, bh, scale2, dropout_p, window_left, window_right,
        HEAD_DIM, BLOCK_D, BLOCK_N, IS_BIAS, PRECISION, ALIGN, ROW_SUMS, REFINE, TILES=EDGE,
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


@triton.jit
def accumulate_dkv(
    dk, dv, k, v, q_ptr, d_out_ptr, lse2_ptr, delta_ptr, inverse_ptr, attn_mask_ptr, seed,
    q_strides, d_out_strides, attn_mask_strides,
    lo, hi, n, in_n, bh, factor, dropout_p, window_left, window_right,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, IS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dv += Pᵀ @ d_out, dk += dSᵀ @ q over the query rows of [lo, hi), scores held as [keys, rows].

    A padded key touches only its own row of dk and dv, so padding needs no mask here: those rows are
    cleared once at the end. Without MASKED every row lies in range and sees a key.
    """
    for start in tl.range(lo, hi, BLOCK_M, num_stages=1 if MASKED else None):
        m = start + tl.arange(0, BLOCK_M)
        if MASKED:
            lse2, live_m = load_lse2(lse2_ptr, m, m < hi)
            delta = tl.load(delta_ptr + m, mask=live_m, other=0.0)
        else:
            lse2, live_m, delta = tl.load(lse2_ptr + m), None, tl.load(delta_ptr + m)
        q = load_tile(q_ptr, start, q_strides, live_m, HEAD_DIM, BLOCK_M, BLOCK_D, ALIGN)
        d_out = load_tile(d_out_ptr, start, d_out_strides, live_m, HEAD_DIM, BLOCK_M, BLOCK_D, ALIGN)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        tile_factor = factor
        if attn_mask_ptr is not None:
            scores, tile_factor = apply_attn_mask(
                scores, factor, attn_mask_ptr, attn_mask_strides, m[None, :], n[:, None],
                in_n[:, None] & (m < hi)[None, :], IS_BIAS,
            )  # fmt: skip
        if MASKED and (window_left is not None or window_right is not None):
            scores = hide(scores, in_window(in_n[:, None], m[None, :], n[:, None], window_left, window_right))
        probs = tl.exp2(scores * tile_factor - lse2[None, :])
        if inverse_ptr is not None:
            probs *= tl.load(inverse_ptr + m, mask=m < hi, other=1.0)[None, :]
        d_probs = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
        dropped = probs
        if seed is not None:
            kept = dropout_keep(seed, bh, m[None, :], n[:, None], dropout_p)
            dropped = tl.where(kept, probs / (1.0 - dropout_p), 0.0)
            d_probs = tl.where(kept, d_probs / (1.0 - dropout_p), 0.0)
        dv = tl.dot(dropped.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
        d_scores = probs * (d_probs - delta[None, :])
        dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def key_gradient_kernel(
    # Tensors as in the forward; d_out [B,H,M,D], lse2, delta and inverse (or None) [B,H,M] fp32, dk and dv [B,H_kv,N,D]
    q_ptr, k_ptr, v_ptr, mask_ptr, attn_mask_ptr, seed_ptr, cu_q_ptr, cu_k_ptr,
    lse2_ptr, d_out_ptr, delta_ptr, inverse_ptr, dk_ptr, dv_ptr,
    # Strides; delta and inverse share lse2's
    q_strides, k_strides, v_strides, mask_strides, attn_mask_strides,
    lse2_strides, d_out_strides, dk_strides, dv_strides,
    # Sizes and scalars
    sequences, heads, num_queries, num_keys, scale, scale2, dropout_p, window_left, window_right,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr, SKIP_QUERIES: tl.constexpr, IS_BIAS: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One tile of keys: dv = Pᵀ @ d_out and dk = scale * dSᵀ @ q, over every query head that shares them."""
    kv_heads = heads // GROUP
    tile = tl.cdiv(num_keys, BLOCK_N) - 1 - tl.program_id(0) // (sequences * kv_heads)
    b = (tl.program_id(0) % (sequences * kv_heads) // kv_heads).to(tl.int64)
    kv_h = (tl.program_id(0) % kv_heads).to(tl.int64)
    q_start, rows = sequence_rows(cu_q_ptr, b, num_queries)
    k_start, keys = sequence_rows(cu_k_ptr, b, num_keys)
    k_ptr += head_offset(k_strides, b, kv_h, k_start, ALIGN)
    v_ptr += head_offset(v_strides, b, kv_h, k_start, ALIGN)
    dk_ptr += head_offset(dk_strides, b, kv_h, k_start, ALIGN)
    dv_ptr += head_offset(dv_strides, b, kv_h, k_start, ALIGN)
    if mask_ptr is not None:
        mask_ptr += b * mask_strides[0]
    seed = None if seed_ptr is None else tl.load(seed_ptr)

    first, stop, holes = visible_span(mask_ptr, mask_strides[1], keys)
    n_first = tile * BLOCK_N
    n_last = tl.minimum(n_first + BLOCK_N, keys) - 1
    n = n_first + tl.arange(0, BLOCK_N)
    in_n = n < keys
    keep_n = load_keep_n(mask_ptr, mask_strides[1], n, keys)
    row_first, row_stop, ragged = first * 0, rows, attn_mask_ptr is not None
    if SKIP_QUERIES:
        row_first, row_stop, ragged = first, stop, ragged | holes
    row_stop = tl.where((n_first >= stop) | (n_last < first), row_first, row_stop)
    lo, full_lo, full_hi, hi = visible_range(
        n_first, n_last, row_first, row_stop, ragged, window_right, window_left, BLOCK_M
    )

    k = load_tile(k_ptr, n_first, k_strides, keep_n, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN)
    v = load_tile(v_ptr, n_first, v_strides, keep_n, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for g in range(GROUP):
        h = kv_h * GROUP + g
        q_head = q_ptr + head_offset(q_strides, b, h, q_start, ALIGN)
        d_out_head = d_out_ptr + head_offset(d_out_strides, b, h, q_start, ALIGN)
        rows_offset = b * lse2_strides[0] + h * lse2_strides[1] + q_start
        lse2_head, delta_head = lse2_ptr + rows_offset, delta_ptr + rows_offset
        inverse_head = inverse_ptr
        if inverse_ptr is not None:
            inverse_head = inverse_ptr + rows_offset
        mask_head = attn_mask_ptr
        if attn_mask_ptr is not None:
            mask_head = attn_mask_ptr + b * attn_mask_strides[0] + h * attn_mask_strides[1]
        bh = (b * heads + h).to(tl.int32)
        if window_right is not None:
            dk, dv = accumulate_dkv(
                dk, dv, k, v, q_head, d_out_head, lse2_head, delta_head, inverse_head, mask_head, seed,
                q_strides, d_out_strides, attn_mask_strides,
                lo, full_lo, n, in_n, bh, scale2, dropout_p, window_left, window_right,
                HEAD_DIM, BLOCK_D, BLOCK_M, IS_BIAS, PRECISION, ALIGN, MASKED=True,
            )  # fmt: skip
        dk, dv = accumulate_dkv(
            dk, dv, k, v, q_head, d_out_head, lse2_head, delta_head, inverse_head, mask_head, seed,
            q_strides, d_out_strides, attn_mask_strides,
            full_lo, full_hi, n, in_n, bh, scale2, dropout_p, window_left, window_right,
            HEAD_DIM, BLOCK_D, BLOCK_M, IS_BIAS, PRECISION, ALIGN, MASKED=False,
        )  # fmt: skip
        dk, dv = accumulate_dkv(
            dk, dv, k, v, q_head, d_out_head, lse2_head, delta_head, inverse_head, mask_head, seed,
            q_strides, d_out_strides, attn_mask_strides,
            full_hi, hi, n, in_n, bh, scale2, dropout_p, window_left, window_right,
            HEAD_DIM, BLOCK_D, BLOCK_M, IS_BIAS, PRECISION, ALIGN, MASKED=True,
        )  # fmt: skip
    dk = tl.where(keep_n[:, None], dk * scale, 0.0)
    dv = tl.where(keep_n[:, None], dv, 0.0)
    store_tile(dk_ptr, dk, n_first, dk_strides, in_n, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN)
    store_tile(dv_ptr, dv, n_first, dv_strides, in_n, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN)


def launch_backward(
    call: Call,
    out: Tensor,
    lse2: Tensor,
    d_out: Tensor,
    d_lse2: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    d_attn_mask: Tensor | None = None,
    query_config: Config | None = None,
    key_config: Config | None = None,
    mask_config: Config | None = None,
) -> None:
    """Write dq, dk, dv and attn_mask's gradient into the tensors given, of any strides, in a launch for each pass."""
    dq, dk, dv = grads
    query, no_keys = call.query, call.max_k == 0 or call.key.shape[2] == 0
    if call.is_empty:
        for grad in (dk, dv) if d_attn_mask is None else (dk, dv, d_attn_mask):
            grad.zero_()
        return
    # In half precision the LSE's rounding is nothing beside that of the weights, but sums over a whole row show it.
    is_fp32, wants_mask = query.dtype == torch.float32, d_attn_mask is not None
    delta = torch.empty_like(lse2)
    inverse = torch.empty_like(lse2) if is_fp32 or wants_mask else None
    refined = torch.empty_like(lse2) if wants_mask and not is_fp32 else None
    with on_device(query):
        config = query_config or call.config("query_gradient")
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
        if not no_keys:
            config = key_config or call.config("key_gradient")
            key_gradient_kernel[call.grid(call.max_k, config.block_n, call.kv_heads)](
                lse2_ptr=lse2,
                d_out_ptr=d_out,
                delta_ptr=delta,
                inverse_ptr=inverse if is_fp32 else None,
                dk_ptr=dk,
                dv_ptr=dv,
                lse2_strides=call.strides(lse2),
                d_out_strides=call.strides(d_out),
                dk_strides=call.strides(dk),
                dv_strides=call.strides(dv),
                **call.kernel_args(config, d_out, dk, dv),
            )
        if d_attn_mask is not None and inverse is not None:
            fitting = delta if refined is None else refined
            launch_attn_mask_gradient(call, lse2, d_out, fitting, inverse, d_attn_mask, mask_config)
