"""The gradients of key and value. DESIGN.md, "Backward".

Grid: one program per (tile of BLOCK_N keys, sequence and key head); it owns those rows of dk and dv and walks every query
that sees them. It recomputes the scores from q, k and lse2; sums run in one fixed order, so results repeat bit for bit.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import is_hip

from padfree._triton.arguments import View
from padfree._triton.call import Call
from padfree._triton.configs import Config
from padfree._triton.launch import Launch, launch
from padfree._triton.scores import (
    apply_attn_mask,
    drop,
    dropout_keep,
    dropout_stream,
    hide,
    in_window,
    load_attn_mask,
    mask_of_head,
    scale_add,
)
from padfree._triton.spans import (
    NOTHING,
    load_keep_n,
    visible_keys,
    visible_range,
    walk,
)
from padfree._triton.tiles import (
    at_row,
    load_lse2,
    load_tile,
    mask_offset,
    owned_tile,
    row_offset,
    sequence_of,
    store_tile,
)


class Keys(NamedTuple):
    """A program's keys: their positions, which exist, k and v."""

    n: Any
    in_n: Any
    k: Any
    v: Any


class QueryHead(NamedTuple):
    """A query head: what its rows bring, from the first one on, where it stands in attn_mask, and its dropout stream."""

    q: View
    d_out: View
    lse2_ptr: Any
    delta_ptr: Any
    inverse_ptr: Any
    mask_start: Any
    stream: Any


class Gradients(NamedTuple):
    """dSᵀ @ q and Pᵀ @ d_out so far, [BLOCK_N, BLOCK_D]."""

    dk: Any
    dv: Any


@triton.jit
def accumulate_dkv(grads, keys, head, inputs, start, stop, HIDDEN: tl.constexpr, TILE: tl.constexpr):
    """dv += Pᵀ @ d_out, dk += dSᵀ @ q over the tile of query rows at `start`, scores held as [keys, rows].

    A padded key touches only its own row of dk and dv, so padding needs no mask here: those rows are cleared once at the
    end. Where NOTHING is hidden every row exists. It may still see no key where padding fills this whole tile of keys; then its
    weights are infinite, and the clearing discards what they gave.
    """
    MASKED: tl.constexpr = HIDDEN != NOTHING
    n, in_n, window = keys.n, keys.in_n, inputs.window
    m = start + tl.arange(0, TILE.BLOCK_M)
    if MASKED:
        lse2, live_m = load_lse2(head.lse2_ptr, m, m < stop)
        delta = tl.load(head.delta_ptr + m, mask=live_m, other=0.0)
    elif is_hip() or TILE.BLOCK_M < 64:
        # Triton's passes for AMD fail on joined pointers, and for fewer than 128 numbers the joined load does not pay.
        lse2, live_m, delta = tl.load(head.lse2_ptr + m), None, tl.load(head.delta_ptr + m)
    else:
        # One load of both: given fewer numbers than threads, Triton 3.6.0 loads all of them in every thread, 4 bytes at a time.
        live_m = None
        lse2, delta = tl.split(tl.load(tl.join(head.lse2_ptr + m, head.delta_ptr + m)))
    q = load_tile(head.q, start, live_m, TILE.BLOCK_M, TILE)
    d_out = load_tile(head.d_out, start, live_m, TILE.BLOCK_M, TILE)
    factor, attn_mask = inputs.scale2, None
    if inputs.attn_mask.ptr is not None:
        in_nm = in_n[:, None] & (m < stop)[None, :]
        attn_mask = load_attn_mask(mask_of_head(inputs, head), m[None, :], n[:, None], in_nm)
    scores = tl.dot(keys.k, tl.trans(q), input_precision=TILE.PRECISION)  # [BLOCK_N, BLOCK_M]
    if inputs.attn_mask.ptr is not None:
        scores, factor = apply_attn_mask(scores, factor, attn_mask)
    if MASKED and (window.left is not None or window.right is not None):
        scores = hide(scores, in_window(in_n[:, None], m[None, :], n[:, None], window))
    probs = tl.exp2(scale_add(scores, factor, -lse2[None, :]))
    if head.inverse_ptr is not None:
        probs *= tl.load(head.inverse_ptr + m, mask=m < stop, other=1.0)[None, :]
    d_probs = tl.dot(keys.v, tl.trans(d_out), input_precision=TILE.PRECISION)
    dropped = probs
    if inputs.dropout.seed_ptr is not None:
        kept = dropout_keep(head.stream, m[None, :], n[:, None], inputs.dropout.p)
        dropped = drop(probs, kept, inputs.dropout.p)
        d_probs = drop(d_probs, kept, inputs.dropout.p)
    dv = tl.dot(dropped.to(d_out.dtype), d_out, grads.dv, input_precision=TILE.PRECISION)
    d_scores = probs * (d_probs - delta[None, :])
    dk = tl.dot(d_scores.to(q.dtype), q, grads.dk, input_precision=TILE.PRECISION)
    return Gradients(dk, dv)


@triton.jit
def key_gradient_kernel(inputs, lse2, d_out, delta_ptr, inverse_ptr, dk, dv, TILE: tl.constexpr):
    """One tile of keys: dv = Pᵀ @ d_out and dk = scale * dSᵀ @ q, over every query head that shares them.

    d_out [B,H,M,D]; lse2 and, with its strides, delta and inverse (or None) [B,H,M] fp32; dk and dv [B,H_kv,N,D].
    """
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    BLOCK_D: tl.constexpr = TILE.BLOCK_D
    sizes = inputs.sizes
    tile, b, kv_h = owned_tile(sizes, sizes.keys, sizes.heads // TILE.GROUP, BLOCK_N)
    sequence = sequence_of(sizes, b)

    first, stop, holes = visible_keys(inputs, sequence, TILE)
    n_first = tile * BLOCK_N
    n_last = tl.minimum(n_first + BLOCK_N, sequence.keys) - 1
    n = n_first + tl.arange(0, BLOCK_N)
    in_n = n < sequence.keys
    keep_n = load_keep_n(inputs.padding, b * inputs.padding.strides[0], n, sequence.keys)
    row_first, row_stop, ragged = first * 0, sequence.queries, inputs.attn_mask.ptr is not None
    if TILE.SKIP_QUERIES:
        row_first, row_stop, ragged = first, stop, ragged | holes
    if TILE.ONE_LOOP:
        ragged = False
    row_stop = tl.where((n_first >= stop) | (n_last < first), row_first, row_stop)
    window = inputs.window
    span = visible_range(
        n_first, n_last, row_first, row_stop, ragged, window.right, window.left, TILE.BLOCK_M, TILE
    )

    k = load_tile(at_row(inputs.k, b, kv_h, sequence.k_start, TILE), n_first, keep_n, BLOCK_N, TILE)
    v = load_tile(at_row(inputs.v, b, kv_h, sequence.k_start, TILE), n_first, keep_n, BLOCK_N, TILE)
    keys = Keys(n, in_n, k, v)
    grads = Gradients(
        tl.zeros((BLOCK_N, BLOCK_D), tl.float32),
        tl.zeros((BLOCK_N, BLOCK_D), tl.float32),
    )
    HAS_LEADING_EDGE: tl.constexpr = window.right is not None
    for g in range(TILE.GROUP):
        h = kv_h * TILE.GROUP + g
        first_row = row_offset(lse2, sequence, h)
        head = QueryHead(
            at_row(inputs.q, b, h, sequence.q_start, TILE),
            at_row(d_out, b, h, sequence.q_start, TILE),
            lse2.ptr + first_row,
            delta_ptr + first_row,
            None if inverse_ptr is None else inverse_ptr + first_row,
            mask_offset(inputs, b, h),
            dropout_stream(inputs, b, h),
        )
        grads = walk(
            accumulate_dkv, grads, keys, head, inputs, span, HAS_LEADING_EDGE, False, TILE.BLOCK_M, TILE
        )
    dk_tile = tl.where(keep_n[:, None], grads.dk * inputs.scale, 0.0)
    dv_tile = tl.where(keep_n[:, None], grads.dv, 0.0)
    in_n = n < sequence.key_rows
    store_tile(at_row(dk, b, kv_h, sequence.k_start, TILE), dk_tile, n_first, in_n, BLOCK_N, TILE)
    store_tile(at_row(dv, b, kv_h, sequence.k_start, TILE), dv_tile, n_first, in_n, BLOCK_N, TILE)


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
    """Write dk and dv in one launch, on the current device."""
    tensors = {
        "lse2": lse2, "d_out": d_out, "delta_ptr": delta, "inverse_ptr": inverse, "dk": dk, "dv": dv,
    }  # fmt: skip

    def describe() -> Launch:
        chosen = config or call.config("key_gradient")
        grid = call.grid(call.max_k, chosen.block_n, call.kv_heads)
        return Launch(grid, call.options(chosen, d_out, dk, dv), call.arguments(tensors))

    launch(key_gradient_kernel, describe, call, config, *tensors.values())
