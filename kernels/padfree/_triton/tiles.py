"""Device code that every kernel shares: which rows a program owns, which tiles it walks, how a tile is read and written.

Letters: b sequence, h query head, m query row, n key, d head_dim. `keep_*` is True where a key is visible or a row is
computed, `in_*` where it exists. What is absent is None, which the compiler removes.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from padfree._triton.arguments import View
from padfree._triton.scores import LOG2E, dropout_stream

SCAN_BLOCK = tl.constexpr(512)
# What may hide a key of a tile: nothing, the end of the sequence, or any byte of the padding mask.
NOTHING, END, ANYTHING = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class Sequence(NamedTuple):
    """Sequence b: its first query row and key in memory, and how many there are.

    `keys` of the `key_rows` in memory may be visible; the others lie beyond the length that the caller gave.
    """

    b: Any
    q_start: Any
    queries: Any
    k_start: Any
    keys: Any
    key_rows: Any


class Head(NamedTuple):
    """What a query head of a sequence sees: its keys and values from their first row on, and its dropout stream.

    padding_start and mask_start are where its rows of the padding mask and of attn_mask begin, in elements.
    """

    k: View
    v: View
    padding_start: Any
    mask_start: Any
    stream: Any


class Visible(NamedTuple):
    """Keys outside [first, stop) are padding; `holes`: some inside are padding too."""

    first: Any
    stop: Any
    holes: Any


class Span(NamedTuple):
    """What to walk: an edge [lo, full_lo), full tiles [full_lo, full_hi) and an edge [full_hi, hi).

    Nothing at `stop` or later is visible.
    """

    lo: Any
    full_lo: Any
    full_hi: Any
    hi: Any
    stop: Any


# Where a program works


@triton.jit
def owned_tile(sizes, length, heads, BLOCK: tl.constexpr):
    """(tile, sequence, head) of this program.

    The tiles of some heads come before those of the next, so that what they share stays in the L2; among them those with
    the highest rows come first. Only long sequences have such tiles, so long work starts first without a sort.
    """
    tiles = tl.cdiv(length, BLOCK)
    group_first = tl.program_id(0) // (tiles * sizes.together) * sizes.together
    group = tl.minimum(sizes.sequences * heads - group_first, sizes.together)
    place = tl.program_id(0) - group_first * tiles
    bh = group_first + place % group
    return tiles - 1 - place // group, (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)


@triton.jit
def sequence_of(sizes, b):
    """Sequence b of the call."""
    q_start, queries = sequence_rows(sizes.cu_q_ptr, b, sizes.queries)
    k_start, key_rows = sequence_rows(sizes.cu_k_ptr, b, sizes.keys)
    keys = key_rows
    if sizes.key_lengths_ptr is not None:
        keys = tl.minimum(tl.maximum(tl.load(sizes.key_lengths_ptr + b), 0), key_rows)
    return Sequence(b, q_start, queries, k_start, keys, key_rows)


@triton.jit
def sequence_rows(cu_seqlens_ptr, b, length):
    """(first row, number of rows) of sequence b: from cu_seqlens when packed, at most `length`; else all `length` rows."""
    if cu_seqlens_ptr is None:
        return tl.zeros((), tl.int64), length
    else:
        start = tl.load(cu_seqlens_ptr + b)
        return start.to(tl.int64), tl.minimum(tl.load(cu_seqlens_ptr + b + 1) - start, length)


@triton.jit
def at_row(view, b, h, start, TILE: tl.constexpr):
    """The [B,H,S,D] view from row `start` of head h of sequence b on."""
    strides = view.strides
    offset = b * aligned(strides[0], TILE.ALIGN) + h * aligned(strides[1], TILE.ALIGN)
    return View(view.ptr + (offset + start * aligned(strides[2], TILE.ALIGN)), strides)


@triton.jit
def head_of(inputs, sequence, h, TILE: tl.constexpr):
    """Query head h of the sequence. Triton 3.6 can return no None, so offsets and 0 stand for what is absent."""
    b, kv_h = sequence.b, h // TILE.GROUP
    k = at_row(inputs.k, b, kv_h, sequence.k_start, TILE)
    v = at_row(inputs.v, b, kv_h, sequence.k_start, TILE)
    padding_start = b * inputs.padding.strides[0]
    return Head(k, v, padding_start, mask_offset(inputs, b, h), dropout_stream(inputs, b, h))


@triton.jit
def mask_offset(inputs, b, h):
    """Elements from attn_mask's first to those of head h of sequence b."""
    return b * inputs.attn_mask.strides[0] + h * inputs.attn_mask.strides[1]


@triton.jit
def row_offset(view, sequence, h):
    """Elements from the first of a [B,H,M] tensor, such as lse2, to the sequence's first query row of head h."""
    return sequence.b * view.strides[0] + h * view.strides[1] + sequence.q_start


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):
    """The stride, a multiple of ALIGN, in a form that shows it to the compiler and survives inlining."""
    return stride // ALIGN * ALIGN


# Which keys are visible


@triton.jit
def load_keep_n(padding, padding_start, n, stop):
    """[BLOCK] bool: key n of the sequence whose row of the mask begins at padding_start lies before `stop` and is not padding.

    The one reader of the padding mask.
    """
    keep_n = n < stop
    if padding.ptr is not None:
        ptrs = padding.ptr + padding_start + n.to(tl.int64) * padding.strides[1]
        keep_n = keep_n & (tl.load(ptrs, mask=keep_n, other=1) == 0)
    return keep_n


@triton.jit
def visible_in_tile(inputs, head, n, stop, HIDDEN: tl.constexpr):
    """[BLOCK] bool: which keys n of a tile are visible, where HIDDEN says that not all are."""
    if HIDDEN == END:
        return n < stop
    else:
        return load_keep_n(inputs.padding, head.padding_start, n, stop)


@triton.jit
def visible_keys(inputs, sequence):
    """What the sequence's padding leaves Visible: known beforehand, or found in the mask."""
    if inputs.padding.ptr is None:
        return Visible(sequence.keys * 0, sequence.keys, sequence.keys < 0)
    elif inputs.spans_ptr is None:
        return find_visible(inputs.padding, sequence.b * inputs.padding.strides[0], sequence.keys)
    else:
        span = inputs.spans_ptr + sequence.b * 3
        # The caller may have made them: no key is read that is not there.
        first = tl.minimum(tl.maximum(tl.load(span), 0), sequence.keys)
        stop = tl.maximum(tl.minimum(tl.load(span + 1), sequence.keys), first)
        return Visible(first, stop, tl.load(span + 2) != 0)


@triton.jit
def find_visible(padding, padding_start, num_keys):
    """What a row of the padding mask leaves Visible."""
    stops, backs = tl.zeros((SCAN_BLOCK,), tl.int32), tl.zeros((SCAN_BLOCK,), tl.int32)
    counts = tl.zeros((SCAN_BLOCK,), tl.int32)
    for start in range(0, num_keys, SCAN_BLOCK):
        n = start + tl.arange(0, SCAN_BLOCK)
        keep_n = load_keep_n(padding, padding_start, n, num_keys)
        stops = tl.where(keep_n, n + 1, stops)
        backs = tl.where(keep_n, tl.maximum(backs, num_keys - n), backs)
        counts += keep_n.to(tl.int32)
    stop, count = tl.max(stops, 0), tl.sum(counts, 0)
    first = num_keys * 0
    # Right padding leaves as many visible keys as there are before `stop`. The branch also parts this from the loops over
    # tiles: without one Triton 3.7.1 keeps up to 90 more registers there (NOTES.md, 2026-11-28).
    if count < stop:
        first = num_keys - tl.max(backs, 0)
    return Visible(first, stop, count < stop - first)


@triton.jit
def store_visible(spans_ptr, b, visible, chosen):
    """Keep what a program found in the mask for the passes that follow: `chosen` is one program of each sequence."""
    span = spans_ptr + b * 3
    tl.store(span, visible.first, mask=chosen)
    tl.store(span + 1, visible.stop, mask=chosen)
    tl.store(span + 2, visible.holes.to(tl.int32), mask=chosen)


@triton.jit
def keys_of_rows(inputs, sequence, visible, m_first, m_last, TILE: tl.constexpr):
    """The Span of keys that rows m_first..m_last see: one edge alone where padding leaves holes between visible keys."""
    window = inputs.window
    first, stop, holes = visible
    span = visible_range(m_first, m_last, first, stop, holes, window.left, window.right, TILE.BLOCK_N, TILE)
    # A packed sequence may be shorter than the grid; rows that are padding may be skipped.
    real = m_first <= m_last
    if TILE.SKIP_QUERIES:
        real = real & (m_first < stop) & (m_last >= first)
    hi = tl.where(real, span.hi, span.lo)
    return Span(span.lo, tl.minimum(span.full_lo, hi), tl.minimum(span.full_hi, hi), hi, stop)


@triton.jit
def visible_range(
    own_first, own_last, first, stop, ragged, before, after, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """The Span of [first, stop), in tiles of BLOCK, that positions own_first..own_last see; i sees i - before .. i + after.

    Each of own_first..own_last sees all of [full_lo, full_hi), which is empty if the range is `ragged`; in ONE_LOOP these
    are all tiles, and each of them masks what its rows do not see. Tiles start at `first`, so that a sequence padded on the left is cut into the same tiles as when it is padded on the right. It serves
    the keys of a tile of rows and, with the window's sides swapped, the rows of a tile of keys.
    """
    lo, full_lo, full_stop, hi = first, first, stop, stop
    if before is not None:
        lo = first + tl.maximum(own_first - before - first, 0) // BLOCK * BLOCK
        full_lo = first + tl.cdiv(tl.maximum(own_last - before - first, 0), BLOCK) * BLOCK
    if after is not None:
        hi = tl.minimum(stop, own_last + after + 1)
        full_stop = tl.minimum(stop, own_first + after + 1)
    full_hi = first + tl.maximum(full_stop - first, 0) // BLOCK * BLOCK
    hi = tl.maximum(hi, lo)
    if TILE.ONE_LOOP:
        full_lo, full_hi = lo, hi
    none_full = ragged | (full_hi <= full_lo)
    return Span(lo, tl.where(none_full, lo, full_lo), tl.where(none_full, lo, full_hi), hi, hi)


@triton.jit
def walk(
    step: tl.constexpr, state, own, head, inputs, span,
    LEADING_EDGE: tl.constexpr, LAST_EDGE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`state` after `step` has met every tile of the span: masked at the edges, unmasked and pipelined between them.

    `own` holds the program's own rows or keys and `head` what it walks over. Only a window leaves an edge before the full
    tiles. In ONE_LOOP the last edge is walked where padding leaves holes, since the pipelined loop reads no mask.
    """
    IN_FULL_TILES: tl.constexpr = END if TILE.ONE_LOOP else NOTHING
    if LEADING_EDGE and not TILE.ONE_LOOP:
        for start in tl.range(span.lo, span.full_lo, BLOCK, num_stages=1):
            state = step(state, own, head, inputs, start, span.stop, ANYTHING, TILE)
    for start in tl.range(span.full_lo, span.full_hi, BLOCK):
        state = step(state, own, head, inputs, start, span.stop, IN_FULL_TILES, TILE)
    if LAST_EDGE or not TILE.ONE_LOOP:
        for start in tl.range(span.full_hi, span.hi, BLOCK, num_stages=1):
            state = step(state, own, head, inputs, start, span.stop, ANYTHING, TILE)
    return state


# Reading and writing


@triton.jit
def tile_offsets(start, strides, ROWS: tl.constexpr, TILE: tl.constexpr):
    """[ROWS, BLOCK_D] offsets of rows start.. of one head, in 64 bits."""
    stride_r = aligned(strides[2], TILE.ALIGN)
    r = tl.arange(0, ROWS)[:, None].to(tl.int64)
    d = tl.arange(0, TILE.BLOCK_D)[None, :].to(tl.int64)
    return tl.cast(start, tl.int64) * stride_r + (r * stride_r + d * strides[3])


@triton.jit
def load_tile(view, start, keep_r, ROWS: tl.constexpr, TILE: tl.constexpr):
    """[ROWS, BLOCK_D] rows start.. of one head; rows not in keep_r (None: all are) read 0."""
    ptrs = view.ptr + tile_offsets(start, view.strides, ROWS, TILE)
    in_d = tl.arange(0, TILE.BLOCK_D)[None, :] < TILE.HEAD_DIM
    if TILE.HEAD_DIM == TILE.BLOCK_D and keep_r is None:
        tile = tl.load(ptrs)
    elif TILE.HEAD_DIM == TILE.BLOCK_D:
        tile = tl.load(ptrs, mask=keep_r[:, None], other=0.0)
    elif keep_r is None:
        tile = tl.load(ptrs, mask=in_d, other=0.0)
    else:
        tile = tl.load(ptrs, mask=keep_r[:, None] & in_d, other=0.0)
    return tile


@triton.jit
def store_tile(view, tile, start, in_r, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Store [ROWS, BLOCK_D] at rows start.. of one head, rows in_r only."""
    ptrs = view.ptr + tile_offsets(start, view.strides, ROWS, TILE)
    in_d = tl.arange(0, TILE.BLOCK_D)[None, :] < TILE.HEAD_DIM
    tl.store(ptrs, tile.to(view.ptr.dtype.element_ty), mask=in_r[:, None] & in_d)


@triton.jit
def load_lse2(lse2_ptr, m, in_m):
    """(lse2, live_m) of rows m. A row that sees no key gets +inf, so that its probabilities are 0."""
    lse2 = tl.load(lse2_ptr + m, mask=in_m, other=float("-inf"))
    live_m = lse2 != float("-inf")
    return tl.where(live_m, lse2, float("inf")), live_m


@triton.jit
def load_d_lse(d_lse2, sequence, h, m, live_m):
    """The gradient of the natural LSE of rows m, from that of the LSE in base 2; 0 where none was given."""
    d_lse = tl.zeros(m.shape, tl.float32)
    if d_lse2.ptr is not None:
        stride_b, stride_h, stride_m = d_lse2.strides[0], d_lse2.strides[1], d_lse2.strides[2]
        ptrs = d_lse2.ptr + (sequence.b * stride_b + h * stride_h + sequence.q_start * stride_m)
        d_lse = LOG2E * tl.load(ptrs + m.to(tl.int64) * stride_m, mask=live_m, other=0.0)
    return d_lse
