"""The gradients of key and value. DESIGN.md, "Backward".

One program per (tile of BLOCK_N keys, sequence and key head): it owns those rows of dk and dv and walks every query that
sees them. It recomputes the scores from q, k and lse2; sums run in one fixed order, so results repeat bit for bit.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import is_hip

from padfree._triton.call import Call
from padfree._triton.configs import Config
from padfree._triton.tiles import (
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
    scale_add,
    sequence_rows,
    store_tile,
    visible_range,
    visible_span,
)


@triton.jit
def accumulate_dkv(
    dk, dv, k, v, q_ptr, d_out_ptr, lse2_ptr, delta_ptr, inverse_ptr, attn_mask_ptr, stream,
    q_strides, d_out_strides, attn_mask_strides,
    lo, hi, n, in_n, factor, dropout_p, window_left, window_right,
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
        elif is_hip() or BLOCK_M < 64:
            # Triton's passes for AMD fail on pointers joined, and fewer than 128 numbers are not worth it (below).
            lse2, live_m, delta = tl.load(lse2_ptr + m), None, tl.load(delta_ptr + m)
        else:
            # One load of both: of fewer numbers than threads Triton 3.6.0 hands all to every thread, 4 bytes at a time.
            live_m = None
            lse2, delta = tl.split(tl.load(tl.join(lse2_ptr + m, delta_ptr + m)))
        q = load_tile(q_ptr, start, q_strides, live_m, HEAD_DIM, BLOCK_M, BLOCK_D, ALIGN)
        d_out = load_tile(d_out_ptr, start, d_out_strides, live_m, HEAD_DIM, BLOCK_M, BLOCK_D, ALIGN)
        tile_factor, attn_mask = factor, None
        if attn_mask_ptr is not None:
            in_nm = in_n[:, None] & (m < hi)[None, :]
            attn_mask = load_attn_mask(
                attn_mask_ptr, attn_mask_strides, m[None, :], n[:, None], in_nm, IS_BIAS
            )
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        if attn_mask_ptr is not None:
            scores, tile_factor = apply_attn_mask(scores, factor, attn_mask, IS_BIAS)
        if MASKED and (window_left is not None or window_right is not None):
            scores = hide(scores, in_window(in_n[:, None], m[None, :], n[:, None], window_left, window_right))
        probs = tl.exp2(scale_add(scores, tile_factor, -lse2[None, :]))
        if inverse_ptr is not None:
            probs *= tl.load(inverse_ptr + m, mask=m < hi, other=1.0)[None, :]
        d_probs = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
        dropped = probs
        if stream is not None:
            kept = dropout_keep(stream, m[None, :], n[:, None], dropout_p)
            dropped = drop(probs, kept, dropout_p)
            d_probs = drop(d_probs, kept, dropout_p)
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
        stream = None if seed_ptr is None else dropout_stream(seed_ptr, (b * heads + h).to(tl.int32))
        if window_right is not None:
            dk, dv = accumulate_dkv(
                dk, dv, k, v, q_head, d_out_head, lse2_head, delta_head, inverse_head, mask_head, stream,
                q_strides, d_out_strides, attn_mask_strides,
                lo, full_lo, n, in_n, scale2, dropout_p, window_left, window_right,
                HEAD_DIM, BLOCK_D, BLOCK_M, IS_BIAS, PRECISION, ALIGN, MASKED=True,
            )  # fmt: skip
        dk, dv = accumulate_dkv(
            dk, dv, k, v, q_head, d_out_head, lse2_head, delta_head, inverse_head, mask_head, stream,
            q_strides, d_out_strides, attn_mask_strides,
            full_lo, full_hi, n, in_n, scale2, dropout_p, window_left, window_right,
            HEAD_DIM, BLOCK_D, BLOCK_M, IS_BIAS, PRECISION, ALIGN, MASKED=False,
        )  # fmt: skip
        dk, dv = accumulate_dkv(
            dk, dv, k, v, q_head, d_out_head, lse2_head, delta_head, inverse_head, mask_head, stream,
            q_strides, d_out_strides, attn_mask_strides,
            full_hi, hi, n, in_n, scale2, dropout_p, window_left, window_right,
            HEAD_DIM, BLOCK_D, BLOCK_M, IS_BIAS, PRECISION, ALIGN, MASKED=True,
        )  # fmt: skip
    dk = tl.where(keep_n[:, None], dk * scale, 0.0)
    dv = tl.where(keep_n[:, None], dv, 0.0)
    store_tile(dk_ptr, dk, n_first, dk_strides, in_n, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN)
    store_tile(dv_ptr, dv, n_first, dv_strides, in_n, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN)


def launch_key_gradient(
    call: Call,
    lse2: Tensor,
    d_out: Tensor,
    delta: Tensor,
    inverse: Tensor | None,
    dk: Tensor,
    dv: Tensor,
    config: Config | None = None,
) -> None:
    """Write dk and dv in one launch."""
    config = config or call.config("key_gradient")
    key_gradient_kernel[call.grid(call.max_k, config.block_n, call.kv_heads)](
        lse2_ptr=lse2,
        d_out_ptr=d_out,
        delta_ptr=delta,
        inverse_ptr=inverse,
        dk_ptr=dk,
        dv_ptr=dv,
        lse2_strides=call.strides(lse2),
        d_out_strides=call.strides(d_out),
        dk_strides=call.strides(dk),
        dv_strides=call.strides(dv),
        **call.kernel_args(config, d_out, dk, dv),
    )
