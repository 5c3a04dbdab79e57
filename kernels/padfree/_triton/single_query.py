"""One query per sequence (M = 1, a CLS row against its sequence): vector arithmetic, no matrix tile to waste.

Grid: one program per (sequence, head), forward and backward one launch each. Every lane of a key tile keeps a
softmax of its own over the keys it has met; the lanes are joined once at the end. The backward owns every row
of dk and dv of its head, and its dq. DESIGN.md, "One query".
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from padfree._triton.attn_mask_gradient import launch_attn_mask_gradient
from padfree._triton.call import Call, on_device
from padfree._triton.configs import Config
from padfree._triton.tiles import (
    LOG2E,
    apply_attn_mask,
    drop,
    dropout_keep,
    dropout_stream,
    head_offset,
    hide,
    in_window,
    load_attn_mask,
    load_keep_n,
    load_lse2,
    load_tile,
    refine,
    sequence_rows,
    store_tile,
    visible_span,
)


@triton.jit
def key_scores(
    q, k_ptr, mask_ptr, attn_mask_ptr, k_strides, mask_stride_n, attn_mask_strides,
    start, keys, rows, scale2, window_left, window_right,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, IS_BIAS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """(scores2 [BLOCK_N, 1] with hidden keys at -inf, k [BLOCK_N, BLOCK_D] fp32, keep_n) of the tile at `start`."""
    n = start + tl.arange(0, BLOCK_N)
    keep_n = load_keep_n(mask_ptr, mask_stride_n, n, keys)
    k = load_tile(k_ptr, start, k_strides, keep_n, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN).to(tl.float32)
    scores = tl.sum(k * q, 1)[:, None]
    factor = scale2
    keep = in_window(keep_n[:, None] & (rows > 0), 0, n[:, None], window_left, window_right)
    if attn_mask_ptr is not None:
        attn_mask = load_attn_mask(
            attn_mask_ptr, attn_mask_strides, n[:, None] * 0, n[:, None], keep, IS_BIAS
        )
        scores, factor = apply_attn_mask(scores, factor, attn_mask, IS_BIAS)
    return hide(scores * factor, keep), k, keep_n


@triton.jit
def single_query_forward_kernel(
    # Tensors, strides and sizes as in `attention_forward_kernel`, with M = 1
    q_ptr, k_ptr, v_ptr, mask_ptr, attn_mask_ptr, seed_ptr, cu_q_ptr, cu_k_ptr, out_ptr, lse2_ptr,
    q_strides, k_strides, v_strides, mask_strides, attn_mask_strides, out_strides, lse2_strides,
    sequences, heads, num_queries, num_keys, scale, scale2, dropout_p, window_left, window_right,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr, SKIP_QUERIES: tl.constexpr, IS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """out and lse2 of one head's only query."""
    bh = tl.program_id(0)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    q_start, rows = sequence_rows(cu_q_ptr, b, num_queries)
    k_start, keys = sequence_rows(cu_k_ptr, b, num_keys)
    k_ptr += head_offset(k_strides, b, h // GROUP, k_start, ALIGN)
    v_ptr += head_offset(v_strides, b, h // GROUP, k_start, ALIGN)
    if mask_ptr is not None:
        mask_ptr += b * mask_strides[0]
    if attn_mask_ptr is not None:
        attn_mask_ptr += b * attn_mask_strides[0] + h * attn_mask_strides[1]
    stream = None if seed_ptr is None else dropout_stream(seed_ptr, bh)

    in_m = tl.arange(0, 1) < rows
    q_ptr += head_offset(q_strides, b, h, q_start, ALIGN)
    q = load_tile(q_ptr, 0, q_strides, in_m, HEAD_DIM, 1, BLOCK_D, ALIGN).to(tl.float32)
    lane_max2 = tl.full((BLOCK_N, 1), float("-inf"), tl.float32)
    lane_sum = tl.zeros((BLOCK_N, 1), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # From the first visible key on, so that padding on the left has the lanes of padding on the right.
    first, stop, _has_holes = visible_span(mask_ptr, mask_strides[1], keys)
    for start in range(first, stop, BLOCK_N):
        scores2, _k, keep_n = key_scores(
            q, k_ptr, mask_ptr, attn_mask_ptr, k_strides, mask_strides[1], attn_mask_strides,
            start, keys, rows, scale2, window_left, window_right, HEAD_DIM, BLOCK_D, BLOCK_N, IS_BIAS, ALIGN,
        )  # fmt: skip
        new_max2 = tl.maximum(lane_max2, scores2)
        shift = tl.where(new_max2 == float("-inf"), 0.0, new_max2)
        probs, rescale = tl.exp2(scores2 - shift), tl.exp2(lane_max2 - shift)
        lane_max2, lane_sum = new_max2, lane_sum * rescale + probs
        if stream is not None:
            n = start + tl.arange(0, BLOCK_N)[:, None]
            probs = tl.where(dropout_keep(stream, n * 0, n, dropout_p), probs, 0.0)
        v = load_tile(v_ptr, start, v_strides, keep_n, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN).to(tl.float32)
        acc = acc * rescale + probs * v

    row_max2 = tl.max(lane_max2, 0)
    weight = tl.exp2(lane_max2 - tl.where(row_max2 == float("-inf"), 0.0, row_max2)[None, :])
    row_sum = tl.sum(lane_sum * weight, 0)
    # As in the forward: a NaN leaves no maximum, but a sum, and must not pass for a row that sees no key.
    live = row_sum != 0.0
    row_sum = tl.where(live, row_sum, 1.0)
    kept = 1.0 if seed_ptr is None else 1.0 - dropout_p
    out = tl.sum(acc * weight, 0)[None, :] / (row_sum * kept)[:, None]
    out_ptr += head_offset(out_strides, b, h, q_start, ALIGN)
    store_tile(out_ptr, out, 0, out_strides, in_m, HEAD_DIM, 1, BLOCK_D, ALIGN)
    lse2 = tl.where(live, row_max2 + tl.log2(row_sum), float("-inf"))
    lse2_ptr += b * lse2_strides[0] + h * lse2_strides[1] + q_start
    tl.store(lse2_ptr + tl.arange(0, 1), lse2, mask=in_m)


@triton.jit
def key_gradients(
    q, d_out, lse2, k_ptr, v_ptr, mask_ptr, attn_mask_ptr, stream,
    k_strides, v_strides, mask_stride_n, attn_mask_strides,
    start, keys, rows, scale2, dropout_p, window_left, window_right,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, IS_BIAS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """(probs, what dropout left of them, d_probs, each [BLOCK_N, 1], and k) of the tile at `start`."""
    scores2, k, keep_n = key_scores(
        q, k_ptr, mask_ptr, attn_mask_ptr, k_strides, mask_stride_n, attn_mask_strides,
        start, keys, rows, scale2, window_left, window_right, HEAD_DIM, BLOCK_D, BLOCK_N, IS_BIAS, ALIGN,
    )  # fmt: skip
    v = load_tile(v_ptr, start, v_strides, keep_n, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN).to(tl.float32)
    probs = tl.exp2(scores2 - lse2[None, :])
    dropped, d_probs = probs, tl.sum(v * d_out, 1)[:, None]
    if stream is not None:
        n = start + tl.arange(0, BLOCK_N)[:, None]
        kept = dropout_keep(stream, n * 0, n, dropout_p)
        dropped = drop(probs, kept, dropout_p)
        d_probs = drop(d_probs, kept, dropout_p)
    return probs, dropped, d_probs, k


@triton.jit
def single_query_backward_kernel(
    # As in the backward, with M = 1 and as many key heads as query heads; delta and inverse only if attn_mask asks
    q_ptr, k_ptr, v_ptr, mask_ptr, attn_mask_ptr, seed_ptr, cu_q_ptr, cu_k_ptr,
    out_ptr, lse2_ptr, d_out_ptr, d_lse2_ptr, delta_ptr, inverse_ptr, dq_ptr, dk_ptr, dv_ptr,
    q_strides, k_strides, v_strides, mask_strides, attn_mask_strides,
    out_strides, lse2_strides, d_out_strides, d_lse2_strides, dq_strides, dk_strides, dv_strides,
    sequences, heads, num_queries, num_keys, scale, scale2, dropout_p, window_left, window_right,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr, SKIP_QUERIES: tl.constexpr, IS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of one head's only query; scores are recomputed once, for fp32 twice."""
    bh = tl.program_id(0)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    q_start, rows = sequence_rows(cu_q_ptr, b, num_queries)
    k_start, keys = sequence_rows(cu_k_ptr, b, num_keys)
    q_ptr += head_offset(q_strides, b, h, q_start, ALIGN)
    k_ptr += head_offset(k_strides, b, h, k_start, ALIGN)
    v_ptr += head_offset(v_strides, b, h, k_start, ALIGN)
    out_ptr += head_offset(out_strides, b, h, q_start, ALIGN)
    d_out_ptr += head_offset(d_out_strides, b, h, q_start, ALIGN)
    dq_ptr += head_offset(dq_strides, b, h, q_start, ALIGN)
    dk_ptr += head_offset(dk_strides, b, h, k_start, ALIGN)
    dv_ptr += head_offset(dv_strides, b, h, k_start, ALIGN)
    if mask_ptr is not None:
        mask_ptr += b * mask_strides[0]
    if attn_mask_ptr is not None:
        attn_mask_ptr += b * attn_mask_strides[0] + h * attn_mask_strides[1]
    stream = None if seed_ptr is None else dropout_stream(seed_ptr, bh)

    in_m = tl.arange(0, 1) < rows
    rows_offset = b * lse2_strides[0] + h * lse2_strides[1] + q_start + tl.arange(0, 1)
    lse2, live = load_lse2(lse2_ptr, rows_offset, in_m)
    q = load_tile(q_ptr, 0, q_strides, live, HEAD_DIM, 1, BLOCK_D, ALIGN).to(tl.float32)
    out = load_tile(out_ptr, 0, out_strides, live, HEAD_DIM, 1, BLOCK_D, ALIGN).to(tl.float32)
    d_out = load_tile(d_out_ptr, 0, d_out_strides, live, HEAD_DIM, 1, BLOCK_D, ALIGN).to(tl.float32)
    d_lse = tl.zeros((1,), tl.float32)
    if d_lse2_ptr is not None:
        d_lse2_ptr += b * d_lse2_strides[0] + h * d_lse2_strides[1] + q_start * d_lse2_strides[2]
        d_lse = LOG2E * tl.load(d_lse2_ptr + tl.arange(0, 1), mask=live, other=0.0)
    delta = tl.sum(out * d_out, 1) - d_lse

    inverse = tl.full((1,), 1.0, tl.float32)
    IS_FP32: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    if IS_FP32 or inverse_ptr is not None:
        prob_sum, d_score_sum = tl.zeros((BLOCK_N, 1), tl.float32), tl.zeros((BLOCK_N, 1), tl.float32)
        for start in range(0, keys, BLOCK_N):
            probs, _dropped, d_probs, _k = key_gradients(
                q, d_out, lse2, k_ptr, v_ptr, mask_ptr, attn_mask_ptr, stream,
                k_strides, v_strides, mask_strides[1], attn_mask_strides,
                start, keys, rows, scale2, dropout_p, window_left, window_right,
                HEAD_DIM, BLOCK_D, BLOCK_N, IS_BIAS, ALIGN,
            )  # fmt: skip
            prob_sum += probs
            d_score_sum += probs * (d_probs - delta[None, :])
        fit, drift = refine(tl.sum(prob_sum, 0), tl.sum(d_score_sum, 0), d_lse, live)
        if inverse_ptr is not None:
            tl.store(delta_ptr + rows_offset, delta + drift, mask=in_m)
            tl.store(inverse_ptr + rows_offset, fit, mask=in_m)
        if IS_FP32:
            inverse, delta = fit, delta + drift

    dq = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, keys, BLOCK_N):
        probs, dropped, d_probs, k = key_gradients(
            q, d_out, lse2, k_ptr, v_ptr, mask_ptr, attn_mask_ptr, stream,
            k_strides, v_strides, mask_strides[1], attn_mask_strides,
            start, keys, rows, scale2, dropout_p, window_left, window_right,
            HEAD_DIM, BLOCK_D, BLOCK_N, IS_BIAS, ALIGN,
        )  # fmt: skip
        d_scores = probs * inverse[None, :] * (d_probs - delta[None, :])
        dq += d_scores * k
        dk, dv = d_scores * q * scale, dropped * inverse[None, :] * d_out
        in_n = start + tl.arange(0, BLOCK_N) < keys
        store_tile(dk_ptr, dk, start, dk_strides, in_n, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN)
        store_tile(dv_ptr, dv, start, dv_strides, in_n, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN)
    store_tile(dq_ptr, (tl.sum(dq, 0) * scale)[None, :], 0, dq_strides, in_m, HEAD_DIM, 1, BLOCK_D, ALIGN)


def launch_single_query_forward(call: Call, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """(out like query, lse2) of a call with max_q = 1."""
    query = call.query
    out, lse2 = call.empty_like(query), call.empty_lse2()
    if call.is_empty:
        return out, lse2
    config = config or call.config("single_query")
    with on_device(query):
        single_query_forward_kernel[call.grid(1, 1, call.heads)](
            out_ptr=out,
            lse2_ptr=lse2,
            out_strides=call.strides(out),
            lse2_strides=call.strides(lse2),
            **call.kernel_args(config, out),
        )
    return out, lse2


def launch_single_query_backward(
    call: Call,
    out: Tensor,
    lse2: Tensor,
    d_out: Tensor,
    d_lse2: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    d_attn_mask: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """Write dq, dk and dv of a call with max_q = 1 and no grouped heads, in one launch, and attn_mask's gradient."""
    dq, dk, dv = grads
    query = call.query
    delta = inverse = None
    if d_attn_mask is not None:
        delta, inverse = torch.empty_like(lse2), torch.empty_like(lse2)
    config = config or call.config("single_query")
    with on_device(query):
        single_query_backward_kernel[call.grid(1, 1, call.heads)](
            out_ptr=out,
            lse2_ptr=lse2,
            d_out_ptr=d_out,
            d_lse2_ptr=d_lse2,
            delta_ptr=delta,
            inverse_ptr=inverse,
            dq_ptr=dq,
            dk_ptr=dk,
            dv_ptr=dv,
            out_strides=call.strides(out),
            lse2_strides=call.strides(lse2),
            d_out_strides=call.strides(d_out),
            d_lse2_strides=(0, 0, 0) if d_lse2 is None else call.strides(d_lse2),
            dq_strides=call.strides(dq),
            dk_strides=call.strides(dk),
            dv_strides=call.strides(dv),
            **call.kernel_args(config, out, d_out, *grads),
        )
        if d_attn_mask is not None and delta is not None and inverse is not None:
            launch_attn_mask_gradient(call, lse2, d_out, delta, inverse, d_attn_mask)
