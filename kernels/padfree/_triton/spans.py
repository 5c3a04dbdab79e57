"""Device code that every kernel shares: which keys padding and a window leave visible, and the walk over their tiles.

Letters as in `tiles`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# What may hide a key of a tile: nothing, the end of the sequence, or any byte of the padding mask.
NOTHING, END, ANYTHING = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Keys of a padding mask that a thread reads at a time: their bytes are one load.
SCANNED = tl.constexpr(4)


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


# What padding leaves


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
def visible_keys(inputs, sequence, TILE: tl.constexpr):
    """What the sequence's padding leaves Visible: known beforehand, or found in the mask."""
    if inputs.padding.ptr is None:
        return Visible(sequence.keys * 0, sequence.keys, sequence.keys < 0)
    elif inputs.spans_ptr is None:
        return find_visible(inputs.padding, sequence.b * inputs.padding.strides[0], sequence.keys, TILE)
    else:
        span = inputs.spans_ptr + sequence.b * 3
        # The caller may have made them: no key is read that is not there.
        first = tl.minimum(tl.maximum(tl.load(span), 0), sequence.keys)
        stop = tl.maximum(tl.minimum(tl.load(span + 1), sequence.keys), first)
        return Visible(first, stop, tl.load(span + 2) != 0)


@triton.jit
def find_visible(padding, padding_start, num_keys, TILE: tl.constexpr):
    """What a row of the padding mask leaves Visible."""
    # A thread joins the keys of a load at once, so that it carries three numbers and not three for each of them.
    SCAN_BLOCK: tl.constexpr = TILE.SCAN_BLOCK
    LOADS: tl.constexpr = SCAN_BLOCK // SCANNED
    lasts, counts = tl.full((LOADS,), -1, tl.int32), tl.zeros((LOADS,), tl.int32)
    firsts = counts + num_keys
    for start in range(0, num_keys, SCAN_BLOCK):
        n = start + tl.arange(0, SCAN_BLOCK)
        keep_n = tl.reshape(load_keep_n(padding, padding_start, n, num_keys), (LOADS, SCANNED))
        n = tl.reshape(n, (LOADS, SCANNED))
        lasts = tl.maximum(lasts, tl.max(tl.where(keep_n, n, -1), 1))
        firsts = tl.minimum(firsts, tl.min(tl.where(keep_n, n, num_keys), 1))
        counts += tl.sum(keep_n.to(tl.int32), 1)
    stop, count = tl.max(lasts, 0) + 1, tl.sum(counts, 0)
    first = num_keys * 0
    # Right padding leaves as many visible keys as there are before `stop`. The branch also parts this from the loops over
    # tiles: without one Triton 3.7.1 keeps up to 90 more registers there (NOTES.md, 2026-11-28).
    if count < stop:
        first = tl.min(firsts, 0)
    return Visible(first, stop, count < stop - first)


@triton.jit
def store_visible(spans_ptr, b, visible, chosen):
    """Keep what a program found in the mask for the passes that follow: `chosen` is one program of each sequence."""
    span = spans_ptr + b * 3
    tl.store(span, visible.first, mask=chosen)
    tl.store(span + 1, visible.stop, mask=chosen)
    tl.store(span + 2, visible.holes.to(tl.int32), mask=chosen)


# What a program walks


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
    are all tiles, and each of them masks what its rows do not see. Tiles start at `first`, so that a sequence padded on the
    left is cut into the same tiles as when it is padded on the right. It serves the keys of a tile of rows and, with the
    window's sides swapped, the rows of a tile of keys.
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
