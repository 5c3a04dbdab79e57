"""What every kernel takes, in groups. Triton passes a NamedTuple field by field, and a None in it compiles to nothing.

Letters: B sequences, H query heads, H_kv key heads, M query rows, N keys, D head_dim.
"""

from typing import Any, NamedTuple


class View(NamedTuple):
    """A tensor in device code: a pointer to its first element, None where it is absent, and its strides in elements."""

    ptr: Any
    strides: Any


class Dropout(NamedTuple):
    """A pointer to the call's seed ([1] int64, None: no dropout) and the probability that a weight is dropped."""

    seed_ptr: Any
    p: Any


class Window(NamedTuple):
    """The query at m sees the keys m - left .. m + right; None leaves a side open."""

    left: Any
    right: Any


class Sizes(NamedTuple):
    """B, H, M and N; for packed sequences M and N are the maximum lengths, and cu_q_ptr and cu_k_ptr hold [B + 1] int32 offsets.

    key_lengths_ptr holds [B] int32: keys from there on are padding. Programs of `together` heads are launched side by side.
    """

    sequences: Any
    heads: Any
    queries: Any
    keys: Any
    cu_q_ptr: Any
    cu_k_ptr: Any
    key_lengths_ptr: Any
    together: Any


class Inputs(NamedTuple):
    """One attention call: q [B,H,M,D], k and v [B,H_kv,N,D], padding [B,N] and attn_mask [B,H,M,N].

    padding and a bool attn_mask are stored as bytes, nonzero where a key is hidden; a float attn_mask is added to the scores.
    spans_ptr holds what `visible_keys` found in the padding before, [B,3] int32. `scale2` is scale * log2(e).
    """

    q: View
    k: View
    v: View
    padding: View
    spans_ptr: Any
    attn_mask: View
    dropout: Dropout
    window: Window
    sizes: Sizes
    scale: Any
    scale2: Any


class Tile(NamedTuple):
    """What a kernel is compiled for.

    BLOCK_M query rows and BLOCK_N keys are a tile; BLOCK_D is HEAD_DIM rounded up to a power of two. GROUP query heads
    share a key head. SKIP_QUERIES leaves out rows at padded positions. ONE_LOOP walks all tiles in one pipelined loop
    that masks every tile, instead of full tiles and an edge. The scan of a padding mask reads SCAN_BLOCK keys a step.
    PRECISION is that of tl.dot for fp32 operands ("ieee", "tf32x3" or "tf32"), and strides are multiples of ALIGN.
    """

    HEAD_DIM: int
    BLOCK_D: int
    BLOCK_M: int
    BLOCK_N: int
    GROUP: int
    SKIP_QUERIES: bool
    ONE_LOOP: bool
    SCAN_BLOCK: int
    PRECISION: str
    ALIGN: int
