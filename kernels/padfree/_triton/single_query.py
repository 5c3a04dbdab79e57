"""One query per sequence (M = 1, a CLS row against its sequence): vector arithmetic, no matrix tile to waste.

Grid: one program per (sequence, head); forward and backward are one launch each, a float attn_mask's gradient one more.
Every key slot (lane) of a tile keeps a softmax of its own over the keys it has met; the lanes are joined once at the end. The backward owns every row
of dk and dv of its head, and its dq. DESIGN.md, "One query".
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from padfree._triton.call import Call, on_device
from padfree._triton.launch import Launch, launch
from padfree._triton.scores import (
    apply_attn_mask,
    drop,
    dropout_keep,
    hide,
    in_window,
    load_attn_mask,
    mask_of_head,
    refine,
)
from padfree._triton.spans import (
    load_keep_n,
    store_visible,
    visible_keys,
)
from padfree._triton.tiles import (
    at_row,
    head_of,
    load_d_lse,
    load_lse2,
    load_tile,
    row_offset,
    sequence_of,
    store_tile,
)


class Query(NamedTuple):
    """The only row of a head: q and d_out [1, BLOCK_D] fp32, lse2 [1]."""

    q: Any
    d_out: Any
    lse2: Any


@triton.jit
def owned_head(sizes):
    """(sequence, head) of this program."""
    bh = tl.program_id(0)
    return sequence_of(sizes, (bh // sizes.heads).to(tl.int64)), (bh % sizes.heads).to(tl.int64)


@triton.jit
def load_row(view, keep, TILE: tl.constexpr):
    """[1, BLOCK_D] fp32: the row the view stands at."""
    return load_tile(view, 0, keep, 1, TILE).to(tl.float32)


@triton.jit
def key_scores(q, head, inputs, sequence, start, TILE: tl.constexpr):
    """(scores2 [BLOCK_N, 1] with hidden keys at -inf, k [BLOCK_N, BLOCK_D] fp32, keep_n) of the tile at `start`."""
    n = start + tl.arange(0, TILE.BLOCK_N)
    keep_n = load_keep_n(inputs.padding, head.padding_start, n, sequence.keys)
    k = load_tile(head.k, start, keep_n, TILE.BLOCK_N, TILE).to(tl.float32)
    scores, factor = tl.sum(k * q, 1)[:, None], inputs.scale2
    keep = in_window(keep_n[:, None] & (sequence.queries > 0), 0, n[:, None], inputs.window)
    if inputs.attn_mask.ptr is not None:
        attn_mask = load_attn_mask(mask_of_head(inputs, head), n[:, None] * 0, n[:, None], keep)
        scores, factor = apply_attn_mask(scores, factor, attn_mask)
    return hide(scores * factor, keep), k, keep_n


@triton.jit
def single_query_forward_kernel(inputs, out, lse2, found_ptr, TILE: tl.constexpr):
    """out and lse2 of one head's only query; arguments as in `attention_forward_kernel`, with M = 1."""
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    BLOCK_D: tl.constexpr = TILE.BLOCK_D
    sequence, h = owned_head(inputs.sizes)
    b, q_start = sequence.b, sequence.q_start
    head = head_of(inputs, sequence, h, TILE)
    in_m = tl.arange(0, 1) < sequence.queries
    q = load_row(at_row(inputs.q, b, h, q_start, TILE), in_m, TILE)
    lane_max2 = tl.full((BLOCK_N, 1), float("-inf"), tl.float32)
    lane_sum = tl.zeros((BLOCK_N, 1), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # From the first visible key on, so that padding on the left has the lanes of padding on the right.
    visible = visible_keys(inputs, sequence, TILE)
    if found_ptr is not None:
        store_visible(found_ptr, b, visible, h == 0)
    for start in range(visible.first, visible.stop, BLOCK_N):
        scores2, _k, keep_n = key_scores(q, head, inputs, sequence, start, TILE)
        new_max2 = tl.maximum(lane_max2, scores2)
        shift = tl.where(new_max2 == float("-inf"), 0.0, new_max2)
        probs, rescale = tl.exp2(scores2 - shift), tl.exp2(lane_max2 - shift)
        lane_max2, lane_sum = new_max2, lane_sum * rescale + probs
        if inputs.dropout.seed_ptr is not None:
            n = start + tl.arange(0, BLOCK_N)[:, None]
            probs = tl.where(dropout_keep(head.stream, n * 0, n, inputs.dropout.p), probs, 0.0)
        values = load_tile(head.v, start, keep_n, BLOCK_N, TILE).to(tl.float32)
        acc = acc * rescale + probs * values

    row_max2 = tl.max(lane_max2, 0)
    weight = tl.exp2(lane_max2 - tl.where(row_max2 == float("-inf"), 0.0, row_max2)[None, :])
    row_sum = tl.sum(lane_sum * weight, 0)
    # As in the forward: a NaN leaves no maximum, but a sum, and must not pass for a row that sees no key.
    live = row_sum != 0.0
    row_sum = tl.where(live, row_sum, 1.0)
    keep_probability = 1.0 if inputs.dropout.seed_ptr is None else 1.0 - inputs.dropout.p
    result = tl.sum(acc * weight, 0)[None, :] / (row_sum * keep_probability)[:, None]
    store_tile(at_row(out, b, h, q_start, TILE), result, 0, in_m, 1, TILE)
    row_lse2 = tl.where(live, row_max2 + tl.log2(row_sum), float("-inf"))
    tl.store(lse2.ptr + row_offset(lse2, sequence, h) + tl.arange(0, 1), row_lse2, mask=in_m)


@triton.jit
def recompute_weights(query, head, inputs, sequence, start, TILE: tl.constexpr):
    """(probs, what dropout left of them, d_probs, each [BLOCK_N, 1], and k) of the tile at `start`."""
    scores2, k, keep_n = key_scores(query.q, head, inputs, sequence, start, TILE)
    v = load_tile(head.v, start, keep_n, TILE.BLOCK_N, TILE).to(tl.float32)
    probs = tl.exp2(scores2 - query.lse2[None, :])
    dropped, d_probs = probs, tl.sum(v * query.d_out, 1)[:, None]
    if inputs.dropout.seed_ptr is not None:
        n = start + tl.arange(0, TILE.BLOCK_N)[:, None]
        kept = dropout_keep(head.stream, n * 0, n, inputs.dropout.p)
        dropped = drop(probs, kept, inputs.dropout.p)
        d_probs = drop(d_probs, kept, inputs.dropout.p)
    return probs, dropped, d_probs, k


@triton.jit
def single_query_backward_kernel(
    inputs, out, lse2, d_out, d_lse2, delta_ptr, inverse_ptr, dq, dk, dv, TILE: tl.constexpr
):
    """dq, dk and dv of one head's only query; scores are recomputed once, twice for fp32 or attn_mask's gradient.

    Arguments as in the backward, with M = 1 and as many key heads as query heads. delta and inverse are written for
    attn_mask's gradient, None where that is not wanted.
    """
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    BLOCK_D: tl.constexpr = TILE.BLOCK_D
    sequence, h = owned_head(inputs.sizes)
    b, q_start = sequence.b, sequence.q_start
    head = head_of(inputs, sequence, h, TILE)
    in_m = tl.arange(0, 1) < sequence.queries
    own_row = row_offset(lse2, sequence, h) + tl.arange(0, 1)
    row_lse2, live = load_lse2(lse2.ptr, own_row, in_m)
    d_out_row = load_row(at_row(d_out, b, h, q_start, TILE), live, TILE)
    query = Query(load_row(at_row(inputs.q, b, h, q_start, TILE), live, TILE), d_out_row, row_lse2)
    d_lse = load_d_lse(d_lse2, sequence, h, tl.arange(0, 1), live)
    delta = tl.sum(load_row(at_row(out, b, h, q_start, TILE), live, TILE) * d_out_row, 1) - d_lse

    inverse = tl.full((1,), 1.0, tl.float32)
    IS_FP32: tl.constexpr = inputs.q.ptr.dtype.element_ty == tl.float32
    if IS_FP32 or inverse_ptr is not None:
        prob_sum, d_score_sum = tl.zeros((BLOCK_N, 1), tl.float32), tl.zeros((BLOCK_N, 1), tl.float32)
        for start in range(0, sequence.keys, BLOCK_N):
            probs, _dropped, d_probs, _k = recompute_weights(query, head, inputs, sequence, start, TILE)
            prob_sum += probs
            d_score_sum += probs * (d_probs - delta[None, :])
        fit, drift = refine(tl.sum(prob_sum, 0), tl.sum(d_score_sum, 0), d_lse, live)
        if inverse_ptr is not None:
            tl.store(delta_ptr + own_row, delta + drift, mask=in_m)
            tl.store(inverse_ptr + own_row, fit, mask=in_m)
        if IS_FP32:
            inverse, delta = fit, delta + drift

    dq_lanes = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dk, dv = at_row(dk, b, h, sequence.k_start, TILE), at_row(dv, b, h, sequence.k_start, TILE)
    for start in range(0, sequence.key_rows, BLOCK_N):
        probs, dropped, d_probs, keys = recompute_weights(query, head, inputs, sequence, start, TILE)
        d_scores = probs * inverse[None, :] * (d_probs - delta[None, :])
        dq_lanes += d_scores * keys
        dk_tile, dv_tile = d_scores * query.q * inputs.scale, dropped * inverse[None, :] * query.d_out
        in_n = start + tl.arange(0, BLOCK_N) < sequence.key_rows
        store_tile(dk, dk_tile, start, in_n, BLOCK_N, TILE)
        store_tile(dv, dv_tile, start, in_n, BLOCK_N, TILE)
    dq_row = (tl.sum(dq_lanes, 0) * inputs.scale)[None, :]
    store_tile(at_row(dq, b, h, q_start, TILE), dq_row, 0, in_m, 1, TILE)


def launch_single_query_forward(call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """`launch_forward` of a call with max_q = 1."""
    out, lse2, found = call.empty_like(call.query), call.empty_lse2(), call.empty_spans()
    if call.is_empty:
        return out, lse2, found
    tensors = {"out": out, "lse2": lse2, "found_ptr": found}

    def describe() -> Launch:
        options = call.options(call.config("single_query"), out)
        return Launch(call.grid(1, 1, call.heads), options, call.arguments(tensors))

    with on_device(call.query):
        launch(single_query_forward_kernel, describe, call, None, *tensors.values())
    return out, lse2, found


def launch_single_query_backward(
    call: Call,
    out: Tensor,
    lse2: Tensor,
    d_out: Tensor,
    d_lse2: Tensor | None,
    delta: Tensor | None,
    inverse: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write dq, dk and dv of a call with max_q = 1 and no grouped heads and, where given, delta and inverse, in one launch."""
    tensors = {
        "out": out, "lse2": lse2, "d_out": d_out, "d_lse2": d_lse2, "delta_ptr": delta, "inverse_ptr": inverse,
        **dict(zip(("dq", "dk", "dv"), grads, strict=True)),
    }  # fmt: skip

    def describe() -> Launch:
        options = call.options(call.config("single_query"), out, d_out, *grads)
        return Launch(call.grid(1, 1, call.heads), options, call.arguments(tensors))

    launch(single_query_backward_kernel, describe, call, None, *tensors.values())
