"""Gradient of a float attn_mask: dS summed over what the mask was broadcast along. DESIGN.md, "Backward".

Grid: one program per (tile of the mask's own [M, N], its batch and head index); it owns that tile, recomputes dS
for every sequence, head, row and key that read it, and adds in one fixed order. Memory is the gradient itself.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from padfree._triton.call import Call
from padfree._triton.launch import Launch, launch
from padfree._triton.scores import (
    apply_attn_mask,
    drop,
    dropout_keep,
    hide,
    in_window,
    load_attn_mask,
    mask_of_head,
    scale_add,
)
from padfree._triton.spans import load_keep_n
from padfree._triton.tiles import (
    at_row,
    head_of,
    load_lse2,
    load_tile,
    row_offset,
    sequence_of,
)


class MaskGradient(NamedTuple):
    """A contiguous [B or 1, H or 1, M or 1, N or 1]: its pointer and its own sizes, 1 where the mask is broadcast."""

    ptr: Any
    batch: Any
    heads: Any
    rows: Any
    keys: Any


class Rows(NamedTuple):
    """A tile of query rows and what the passes before left for them."""

    m: Any
    live_m: Any
    q: Any
    d_out: Any
    lse2: Any
    delta: Any
    inverse: Any


@triton.jit
def score_gradient(rows, head, mask, inputs, n_first, stop, TILE: tl.constexpr):
    """dS = P * (d_out @ vᵀ - delta), [BLOCK_M, BLOCK_N], of the rows against the tile of keys at n_first."""
    m, n = rows.m, n_first + tl.arange(0, TILE.BLOCK_N)
    keep_n = load_keep_n(inputs.padding, head.padding_start, n, stop)
    k = load_tile(head.k, n_first, keep_n, TILE.BLOCK_N, TILE)
    v = load_tile(head.v, n_first, keep_n, TILE.BLOCK_N, TILE)
    keep = keep_n[None, :] & rows.live_m[:, None]
    scores = tl.dot(rows.q, tl.trans(k), input_precision=TILE.PRECISION)
    # After the dot: the sum is stored in the mask's own layout, and no softmax wants the other.
    attn_mask = load_attn_mask(mask, m[:, None], n[None, :], keep)
    scores, factor = apply_attn_mask(scores, inputs.scale2, attn_mask)
    scores = hide(scores, in_window(keep, m[:, None], n[None, :], inputs.window))
    probs = tl.exp2(scale_add(scores, factor, -rows.lse2[:, None])) * rows.inverse[:, None]
    d_probs = tl.dot(rows.d_out, tl.trans(v), input_precision=TILE.PRECISION)
    if inputs.dropout.seed_ptr is not None:
        kept = dropout_keep(head.stream, m[:, None], n[None, :], inputs.dropout.p)
        d_probs = drop(d_probs, kept, inputs.dropout.p)
    return probs * (d_probs - rows.delta[:, None])


@triton.jit
def attn_mask_gradient_kernel(inputs, lse2, d_out, delta_ptr, inverse_ptr, d_mask, TILE: tl.constexpr):
    """One tile of the mask's gradient; lse2, delta and inverse [B,H,M] fp32, d_out [B,H,M,D]."""
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    sizes = inputs.sizes
    tiles_n = tl.cdiv(d_mask.keys, BLOCK_N)
    tiles_m = tl.cdiv(d_mask.rows, BLOCK_M)
    tile_n = tl.program_id(0) % tiles_n
    tile_m = tl.program_id(0) // tiles_n % tiles_m
    mask_h = tl.program_id(0) // (tiles_n * tiles_m) % d_mask.heads
    mask_b = tl.program_id(0) // (tiles_n * tiles_m) // d_mask.heads
    b_stop = tl.where(d_mask.batch == sizes.sequences, mask_b + 1, sizes.sequences)
    h_stop = tl.where(d_mask.heads == sizes.heads, mask_h + 1, sizes.heads)
    m_stop = tl.where(d_mask.rows == sizes.queries, tile_m * BLOCK_M + 1, sizes.queries)
    n_stop = tl.where(d_mask.keys == sizes.keys, tile_n * BLOCK_N + 1, sizes.keys)

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for b32 in range(mask_b, b_stop):
        for h32 in range(mask_h, h_stop):
            b, h = tl.cast(b32, tl.int64), tl.cast(h32, tl.int64)
            sequence = sequence_of(sizes, b)
            head = head_of(inputs, sequence, h, TILE)
            q_head, d_out_head = at_row(inputs.q, b, h, 0, TILE), at_row(d_out, b, h, 0, TILE)
            mask, first_row = mask_of_head(inputs, head), row_offset(lse2, sequence, h)
            for m_first in range(tile_m * BLOCK_M, m_stop, BLOCK_M):
                m = m_first + tl.arange(0, BLOCK_M)
                row_lse2, live_m = load_lse2(lse2.ptr + first_row, m, m < sizes.queries)
                delta = tl.load(delta_ptr + first_row + m, mask=live_m, other=0.0)
                inverse = tl.load(inverse_ptr + first_row + m, mask=live_m, other=1.0)
                q = load_tile(q_head, m_first, live_m, BLOCK_M, TILE)
                d_out_tile = load_tile(d_out_head, m_first, live_m, BLOCK_M, TILE)
                rows = Rows(m, live_m, q, d_out_tile, row_lse2, delta, inverse)
                for n_first in range(tile_n * BLOCK_N, n_stop, BLOCK_N):
                    total += score_gradient(rows, head, mask, inputs, n_first, sequence.keys, TILE)

    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if d_mask.rows != sizes.queries:
        total = tl.broadcast_to(tl.sum(total, 0)[None, :], (BLOCK_M, BLOCK_N))
    if d_mask.keys != sizes.keys:
        total = tl.broadcast_to(tl.sum(total, 1)[:, None], (BLOCK_M, BLOCK_N))
    base = d_mask.ptr + (mask_b.to(tl.int64) * d_mask.heads + mask_h) * d_mask.rows * d_mask.keys
    ptrs = base + row.to(tl.int64)[:, None] * d_mask.keys + column[None, :]
    in_mask = (row < d_mask.rows)[:, None] & (column < d_mask.keys)[None, :]
    tl.store(ptrs, total.to(d_mask.ptr.dtype.element_ty), mask=in_mask)


def launch_attn_mask_gradient(
    call: Call,
    lse2: Tensor,
    d_out: Tensor,
    delta: Tensor,
    inverse: Tensor,
    d_mask: Tensor,
) -> None:
    """Write the gradient of call.attn_mask, in its own 4-D shape and dtype, into `d_mask`, in one launch."""
    if d_mask.numel() == 0:
        return
    tensors = {"lse2": lse2, "d_out": d_out, "delta_ptr": delta, "inverse_ptr": inverse}

    def describe() -> Launch:
        config = call.config("attn_mask_gradient")
        batch, heads, rows, keys = d_mask.shape
        grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(keys, config.block_n) * batch * heads,)
        gradient = MaskGradient(d_mask, batch, heads, rows, keys)
        return Launch(grid, call.options(config, d_out), call.arguments(tensors) | {"d_mask": gradient})

    launch(attn_mask_gradient_kernel, describe, call, None, *tensors.values(), d_mask)
