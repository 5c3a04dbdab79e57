"""Forward kernel: out = softmax(scale * q @ kᵀ + attn_mask) @ v, and its LSE in base 2. DESIGN.md, "Forward".

Grid: one program per (tile of BLOCK_M query rows, sequence and head); it owns those rows of out and lse2.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from padfree._triton.call import Call, on_device
from padfree._triton.configs import Config
from padfree._triton.launch import Launch, launch
from padfree._triton.scores import Softmax, dropout_keep, score_tile, softmax_step
from padfree._triton.spans import (
    NOTHING,
    keys_of_rows,
    load_keep_n,
    store_visible,
    visible_in_tile,
    visible_keys,
    walk,
)
from padfree._triton.tiles import (
    at_row,
    head_of,
    load_tile,
    owned_tile,
    row_offset,
    sequence_of,
    store_tile,
)


class Rows(NamedTuple):
    """A program's query rows: their positions, which are computed, and q."""

    m: Any
    live_m: Any
    q: Any


@triton.jit
def attend(state, rows, head, inputs, start, stop, HIDDEN: tl.constexpr, TILE: tl.constexpr):
    """The softmax's state after the rows have seen the tile of keys at `start`; HIDDEN says what may hide some of them."""
    n = start + tl.arange(0, TILE.BLOCK_N)
    keep_n = None if HIDDEN == NOTHING else visible_in_tile(inputs, head, n, stop, HIDDEN)
    k = load_tile(head.k, start, keep_n, TILE.BLOCK_N, TILE)
    scores, factor = score_tile(rows, k, head, inputs, n, keep_n, stop, TILE)
    probs, row_max, row_sum, rescale = softmax_step(
        state,
        scores,
        factor,
        HIDDEN != NOTHING or inputs.attn_mask.ptr is not None,
        rows.q.dtype == tl.float32,
    )
    # The sum is that of all weights: dropout leaves the softmax's denominator alone.
    if inputs.dropout.seed_ptr is not None:
        kept = dropout_keep(head.stream, rows.m[:, None], n[None, :], inputs.dropout.p)
        probs = tl.where(kept, probs, 0.0)
    v = load_tile(head.v, start, keep_n, TILE.BLOCK_N, TILE)
    acc = tl.dot(probs.to(v.dtype), v, state.acc * rescale[:, None], input_precision=TILE.PRECISION)
    return Softmax(acc, row_max, row_sum)


@triton.jit
def attention_forward_kernel(inputs, out, lse2, found_ptr, TILE: tl.constexpr):
    """One tile of query rows against every key it may see; out [B,H,M,D], lse2 [B,H,M].

    found_ptr, [B,3] int32 or None, takes what was found in the padding mask, for the backward's passes.
    """
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_D: tl.constexpr = TILE.BLOCK_D
    sizes = inputs.sizes
    tile, b, h = owned_tile(sizes, sizes.queries, sizes.heads, BLOCK_M)
    sequence = sequence_of(sizes, b)
    head = head_of(inputs, sequence, h, TILE)

    m_first = tile * BLOCK_M
    m_last = tl.minimum(m_first + BLOCK_M, sequence.queries) - 1
    m = m_first + tl.arange(0, BLOCK_M)
    in_m = m < sequence.queries
    live_m = load_keep_n(inputs.padding, head.padding_start, m, sequence.keys) if TILE.SKIP_QUERIES else in_m
    visible = visible_keys(inputs, sequence, TILE)
    if found_ptr is not None:
        store_visible(found_ptr, b, visible, (tile == 0) & (h == 0))
    span = keys_of_rows(inputs, sequence, visible, m_first, m_last, TILE)

    q = load_tile(at_row(inputs.q, b, h, sequence.q_start, TILE), m_first, live_m, BLOCK_M, TILE)
    state = Softmax(
        tl.zeros((BLOCK_M, BLOCK_D), tl.float32),
        tl.full((BLOCK_M,), float("-inf"), tl.float32),
        tl.zeros((BLOCK_M,), tl.float32),
    )
    HAS_LEFT_EDGE: tl.constexpr = inputs.window.left is not None
    HAS_MASK: tl.constexpr = inputs.padding.ptr is not None
    rows = Rows(m, live_m, q)
    state = walk(attend, state, rows, head, inputs, span, HAS_LEFT_EDGE, HAS_MASK, TILE.BLOCK_N, TILE)

    # NaN in a row's scores leaves it without a maximum, but not without a sum: it must come out NaN, not 0.
    live_m = live_m & (state.row_sum != 0.0)
    row_sum = tl.where(live_m, state.row_sum, 1.0)
    keep_probability = 1.0 if inputs.dropout.seed_ptr is None else 1.0 - inputs.dropout.p
    # One reciprocal a row, where a division an element costs four instructions each.
    result = tl.where(live_m[:, None], state.acc, 0.0) * (1.0 / (row_sum * keep_probability))[:, None]
    store_tile(at_row(out, b, h, sequence.q_start, TILE), result, m_first, in_m, BLOCK_M, TILE)
    factor = inputs.scale2
    if inputs.attn_mask.ptr is not None and inputs.attn_mask.ptr.dtype.element_ty != tl.uint8:
        factor = 1.0
    row_lse2 = tl.where(live_m, state.row_max * factor + tl.log2(row_sum), float("-inf"))
    tl.store(lse2.ptr + row_offset(lse2, sequence, h) + m, row_lse2, mask=in_m)


def launch_forward(call: Call, config: Config | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out like query, lse2 [B,H,M] fp32, what was found in the mask [B,3] int32 or None) in one launch."""
    out, lse2, found = call.empty_like(call.query), call.empty_lse2(), call.empty_spans()
    if call.is_empty:
        return out, lse2, found
    tensors = {"out": out, "lse2": lse2, "found_ptr": found}

    def describe() -> Launch:
        chosen = config or call.config("forward")
        grid = call.grid(call.max_q, chosen.block_m, call.heads)
        return Launch(grid, call.options(chosen, out), call.arguments(tensors))

    with on_device(call.query):
        launch(attention_forward_kernel, describe, call, config, *tensors.values())
    return out, lse2, found
