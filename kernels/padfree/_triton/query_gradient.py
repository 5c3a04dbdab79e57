"""The gradient of the query, and what the passes after it read. DESIGN.md, "Backward".

Grid as in the forward: a program owns its rows of dq and of delta = rowsum(out * d_out) - log2(e) * d_lse2. For fp32, and
for attn_mask's gradient, also those of `inverse`, one over the row's recomputed weights (DESIGN.md, "fp32 gradients"). It recomputes the scores from q, k and lse2; sums run in one fixed order, so results repeat bit for bit.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from padfree._triton.call import Call
from padfree._triton.configs import Config
from padfree._triton.launch import Launch, launch
from padfree._triton.scores import drop, dropout_keep, refine, scale_add, score_tile
from padfree._triton.spans import (
    NOTHING,
    keys_of_rows,
    visible_in_tile,
    visible_keys,
    walk,
)
from padfree._triton.tiles import (
    at_row,
    head_of,
    load_d_lse,
    load_lse2,
    load_tile,
    owned_tile,
    row_offset,
    sequence_of,
    store_tile,
)


class Rows(NamedTuple):
    """A program's query rows: as in the forward, what the forward left for them, and where sums of theirs go."""

    m: Any
    live_m: Any
    q: Any
    d_out: Any
    lse2: Any
    delta: Any
    inverse_ptr: Any
    corrected_delta_ptr: Any


class Sums(NamedTuple):
    """So far: dS @ k; the row sums of P and dS, used where `inverse` is wanted; P @ k, used where dq is refined."""

    dq: Any
    probs: Any
    d_scores: Any
    weighted_k: Any


@triton.jit
def accumulate_dq(sums, rows, head, inputs, start, stop, HIDDEN: tl.constexpr, TILE: tl.constexpr):
    """dq += dS @ k over the tile of keys at `start`, with dS = P * (d_out @ vᵀ - delta)."""
    n = start + tl.arange(0, TILE.BLOCK_N)
    keep_n = None if HIDDEN == NOTHING else visible_in_tile(inputs, head, n, stop, HIDDEN)
    v = load_tile(head.v, start, keep_n, TILE.BLOCK_N, TILE)
    k = load_tile(head.k, start, keep_n, TILE.BLOCK_N, TILE)
    scores, factor = score_tile(rows, k, head, inputs, n, keep_n, stop, TILE)
    probs = tl.exp2(scale_add(scores, factor, -rows.lse2[:, None]))
    d_probs = tl.dot(rows.d_out, tl.trans(v), input_precision=TILE.PRECISION)
    if inputs.dropout.seed_ptr is not None:
        kept = dropout_keep(head.stream, rows.m[:, None], n[None, :], inputs.dropout.p)
        d_probs = drop(d_probs, kept, inputs.dropout.p)
    d_scores = probs * (d_probs - rows.delta[:, None])
    dq = tl.dot(d_scores.to(k.dtype), k, sums.dq, input_precision=TILE.PRECISION)
    prob_sum, d_score_sum, weighted_k = sums.probs, sums.d_scores, sums.weighted_k
    if rows.inverse_ptr is not None:
        prob_sum += tl.sum(probs, 1)
        d_score_sum += tl.sum(d_scores, 1)
        if rows.corrected_delta_ptr is None:
            weighted_k = tl.dot(probs, k, weighted_k, input_precision=TILE.PRECISION)
    return Sums(dq, prob_sum, d_score_sum, weighted_k)


@triton.jit
def query_gradient_kernel(
    inputs, out, lse2, d_out, d_lse2, delta_ptr, inverse_ptr, corrected_delta_ptr, dq, TILE: tl.constexpr
):
    """One tile of query rows: delta and dq = scale * dS @ k.

    out, d_out and dq [B,H,M,D]; lse2 and, with its strides, delta, inverse and corrected_delta [B,H,M] fp32. d_lse2, inverse
    and corrected_delta may be None. With `inverse` delta and dq are corrected for the rounding of the recomputed weights;
    with `corrected_delta`, in half precision, only the delta that attn_mask's gradient reads is.
    """
    ROW_SUMS: tl.constexpr = inverse_ptr is not None
    REFINE: tl.constexpr = inverse_ptr is not None and corrected_delta_ptr is None
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
    span = keys_of_rows(inputs, sequence, visible_keys(inputs, sequence, TILE), m_first, m_last, TILE)

    first_row = row_offset(lse2, sequence, h)
    row_lse2, live_m = load_lse2(lse2.ptr + first_row, m, in_m)
    q = load_tile(at_row(inputs.q, b, h, sequence.q_start, TILE), m_first, live_m, BLOCK_M, TILE)
    d_out_tile = load_tile(at_row(d_out, b, h, sequence.q_start, TILE), m_first, live_m, BLOCK_M, TILE)
    out_tile = load_tile(at_row(out, b, h, sequence.q_start, TILE), m_first, live_m, BLOCK_M, TILE)
    d_lse = load_d_lse(d_lse2, sequence, h, m, live_m)
    delta = tl.sum(out_tile.to(tl.float32) * d_out_tile.to(tl.float32), 1) - d_lse
    if not REFINE:
        tl.store(delta_ptr + first_row + m, delta, mask=in_m)

    sums = Sums(
        tl.zeros((BLOCK_M, BLOCK_D), tl.float32),
        tl.zeros((BLOCK_M,), tl.float32),
        tl.zeros((BLOCK_M,), tl.float32),
        tl.zeros((BLOCK_M, BLOCK_D), tl.float32),
    )
    rows = Rows(m, live_m, q, d_out_tile, row_lse2, delta, inverse_ptr, corrected_delta_ptr)
    HAS_LEFT_EDGE: tl.constexpr = inputs.window.left is not None
    HAS_MASK: tl.constexpr = inputs.padding.ptr is not None
    sums = walk(accumulate_dq, sums, rows, head, inputs, span, HAS_LEFT_EDGE, HAS_MASK, TILE.BLOCK_N, TILE)
    result = sums.dq
    if ROW_SUMS:
        inverse, drift = refine(sums.probs, sums.d_scores, d_lse, live_m)
        tl.store(inverse_ptr + first_row + m, inverse, mask=in_m)
        if REFINE:
            result = (result - drift[:, None] * sums.weighted_k) * inverse[:, None]
        tl.store((delta_ptr if REFINE else corrected_delta_ptr) + first_row + m, delta + drift, mask=in_m)
    result = tl.where(live_m[:, None], result * inputs.scale, 0.0)
    store_tile(at_row(dq, b, h, sequence.q_start, TILE), result, m_first, in_m, BLOCK_M, TILE)


def launch_query_gradient(
    call: Call,
    out: Tensor,
    lse2: Tensor,
    d_out: Tensor,
    d_lse2: Tensor | None,
    delta: Tensor,
    inverse: Tensor | None,
    corrected_delta: Tensor | None,
    dq: Tensor,
    config: Config | None = None,
) -> None:
    """Write dq, delta and, where given, inverse and corrected_delta, in one launch on the current device."""
    tensors = {
        "out": out, "lse2": lse2, "d_out": d_out, "d_lse2": d_lse2, "delta_ptr": delta, "inverse_ptr": inverse,
        "corrected_delta_ptr": corrected_delta, "dq": dq,
    }  # fmt: skip

    def describe() -> Launch:
        chosen = config or call.config("query_gradient")
        grid = call.grid(call.max_q, chosen.block_m, call.heads)
        return Launch(grid, call.options(chosen, out, d_out, dq), call.arguments(tensors))

    launch(query_gradient_kernel, describe, call, config, *tensors.values())
