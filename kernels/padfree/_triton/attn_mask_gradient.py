"""Gradient of a float attn_mask: dS summed over what the mask was broadcast along. DESIGN.md, "Backward".

Grid: one program per (tile of the mask's own [M, N], its batch and head index); it owns that tile, recomputes dS
for every sequence, head, row and key that read it, and adds in one fixed order. Memory is the gradient itself.
"""

import triton
import triton.language as tl
from torch import Tensor

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
)


@triton.jit
def attn_mask_gradient_kernel(
    # Tensors as in the backward; d_mask is a contiguous [B or 1, H or 1, M or 1, N or 1]
    q_ptr, k_ptr, v_ptr, mask_ptr, attn_mask_ptr, seed_ptr, cu_q_ptr, cu_k_ptr,
    lse2_ptr, d_out_ptr, delta_ptr, inverse_ptr, d_mask_ptr,
    q_strides, k_strides, v_strides, mask_strides, attn_mask_strides, lse2_strides, d_out_strides,
    # Sizes: the mask's own, 1 where it is broadcast
    mask_batch, mask_heads, mask_rows, mask_keys,
    sequences, heads, num_queries, num_keys, scale, scale2, dropout_p, window_left, window_right,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr, SKIP_QUERIES: tl.constexpr, IS_BIAS: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One tile of the mask's gradient."""
    tiles_n = tl.cdiv(mask_keys, BLOCK_N)
    tiles_m = tl.cdiv(mask_rows, BLOCK_M)
    tile_n = tl.program_id(0) % tiles_n
    tile_m = tl.program_id(0) // tiles_n % tiles_m
    mask_h = tl.program_id(0) // (tiles_n * tiles_m) % mask_heads
    mask_b = tl.program_id(0) // (tiles_n * tiles_m) // mask_heads
    b_stop = tl.where(mask_batch == sequences, mask_b + 1, sequences)
    h_stop = tl.where(mask_heads == heads, mask_h + 1, heads)
    m_stop = tl.where(mask_rows == num_queries, tile_m * BLOCK_M + 1, num_queries)
    n_stop = tl.where(mask_keys == num_keys, tile_n * BLOCK_N + 1, num_keys)

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for b32 in range(mask_b, b_stop):
        for h32 in range(mask_h, h_stop):
            b, h = tl.cast(b32, tl.int64), tl.cast(h32, tl.int64)
            stream = None if seed_ptr is None else dropout_stream(seed_ptr, (b * heads + h).to(tl.int32))
            q_head = q_ptr + head_offset(q_strides, b, h, 0, ALIGN)
            k_head = k_ptr + head_offset(k_strides, b, h // GROUP, 0, ALIGN)
            v_head = v_ptr + head_offset(v_strides, b, h // GROUP, 0, ALIGN)
            d_out_head = d_out_ptr + head_offset(d_out_strides, b, h, 0, ALIGN)
            rows_offset = b * lse2_strides[0] + h * lse2_strides[1]
            attn_mask_head = attn_mask_ptr + b * attn_mask_strides[0] + h * attn_mask_strides[1]
            padding = mask_ptr
            if mask_ptr is not None:
                padding = mask_ptr + b * mask_strides[0]
            for m_first in range(tile_m * BLOCK_M, m_stop, BLOCK_M):
                m = m_first + tl.arange(0, BLOCK_M)
                lse2, live_m = load_lse2(lse2_ptr + rows_offset, m, m < num_queries)
                delta = tl.load(delta_ptr + rows_offset + m, mask=live_m, other=0.0)
                inverse = tl.load(inverse_ptr + rows_offset + m, mask=live_m, other=1.0)
                q = load_tile(q_head, m_first, q_strides, live_m, HEAD_DIM, BLOCK_M, BLOCK_D, ALIGN)
                d_out = load_tile(
                    d_out_head, m_first, d_out_strides, live_m, HEAD_DIM, BLOCK_M, BLOCK_D, ALIGN
                )
                for n_first in range(tile_n * BLOCK_N, n_stop, BLOCK_N):
                    n = n_first + tl.arange(0, BLOCK_N)
                    keep_n = load_keep_n(padding, mask_strides[1], n, num_keys)
                    k = load_tile(k_head, n_first, k_strides, keep_n, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN)
                    v = load_tile(v_head, n_first, v_strides, keep_n, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN)
                    keep = keep_n[None, :] & live_m[:, None]
                    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                    # After the dot: the sum is stored in the mask's own layout, and no softmax wants the other.
                    attn_mask = load_attn_mask(
                        attn_mask_head, attn_mask_strides, m[:, None], n[None, :], keep, IS_BIAS
                    )
                    scores, factor = apply_attn_mask(scores, scale2, attn_mask, IS_BIAS)
                    scores = hide(scores, in_window(keep, m[:, None], n[None, :], window_left, window_right))
                    d_probs = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
                    if stream is not None:
                        kept = dropout_keep(stream, m[:, None], n[None, :], dropout_p)
                        d_probs = drop(d_probs, kept, dropout_p)
                    probs = tl.exp2(scale_add(scores, factor, -lse2[:, None]))
                    probs *= inverse[:, None]
                    total += probs * (d_probs - delta[:, None])

    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if mask_rows != num_queries:
        total = tl.broadcast_to(tl.sum(total, 0)[None, :], (BLOCK_M, BLOCK_N))
    if mask_keys != num_keys:
        total = tl.broadcast_to(tl.sum(total, 1)[:, None], (BLOCK_M, BLOCK_N))
    base = d_mask_ptr + (mask_b.to(tl.int64) * mask_heads + mask_h) * mask_rows * mask_keys
    ptrs = base + row.to(tl.int64)[:, None] * mask_keys + column[None, :]
    tl.store(
        ptrs,
        total.to(d_mask_ptr.dtype.element_ty),
        mask=(row < mask_rows)[:, None] & (column < mask_keys)[None, :],
    )


def launch_attn_mask_gradient(
    call: Call,
    lse2: Tensor,
    d_out: Tensor,
    delta: Tensor,
    inverse: Tensor,
    d_mask: Tensor,
    config: Config | None = None,
) -> None:
    """Write the gradient of call.attn_mask, in its own 4-D shape and dtype, into `d_mask`, in one launch."""
    if d_mask.numel() == 0:
        return
    config = config or call.config("attn_mask_gradient")
    batch, heads, rows, keys = d_mask.shape
    grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(keys, config.block_n) * batch * heads,)
    attn_mask_gradient_kernel[grid](
        lse2_ptr=lse2,
        d_out_ptr=d_out,
        delta_ptr=delta,
        inverse_ptr=inverse,
        d_mask_ptr=d_mask,
        lse2_strides=lse2.stride(),
        d_out_strides=d_out.stride(),
        mask_batch=batch,
        mask_heads=heads,
        mask_rows=rows,
        mask_keys=keys,
        **call.kernel_args(config, d_out),
    )
