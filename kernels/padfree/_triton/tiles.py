"""Device code that every kernel shares: which rows a program owns, where a head lies, how a tile is read and written.

Letters: b sequence, h query head, m query row, n key, d head_dim. `keep_*` is True where a key is visible or a row is
computed, `in_*` where it exists. What is absent is None, which the compiler removes.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from padfree._triton.arguments import View
from padfree._triton.scores import LOG2E, dropout_stream


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
