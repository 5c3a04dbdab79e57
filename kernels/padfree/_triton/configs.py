"""Launch configurations: one readable table, no timing at run time, no GPU query at import.

A row is keyed by (pass, dtype kind, padded head_dim), fp32 by how it is multiplied (`dtype_kind`); of the rows whose
`arch`, `max_length`, `plain` and `known` admit the call the first one wins, so special rows stand before general ones and
the last row of a key is its fallback. An architecture without rows of its own takes the general ones. "There" in a
reason means on the row's architectures under Triton 3.6.0 or 3.7.1. DESIGN.md, "Configurations", says how a row earns its
place; `python -m bench tune` proposes rows from measurements.
"""

from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton

ANY = 1 << 62
GFX942 = 0x942
# Where the sums of matrix units were measured and keep the error rule (NOTES.md, 2026-11-28): Hopper.
TF32X3_ARCHS = (90,)


class Config(NamedTuple):
    """Tile of query rows x tile of keys, warps per program, depth of the load pipeline.

    one_loop: where sequences have lengths of their own, all tiles are masked in one pipelined loop (`arguments.Tile`).
    max_registers: no more a thread than these, so that more programs fit on a multiprocessor; None: as many as ptxas likes.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2
    one_loop: bool = False
    max_registers: int | None = None


class Row(NamedTuple):
    """A configuration, why, and the calls it is for: by length and by architecture; `plain`: those without extras; `known`:
    those whose lengths are known before the launch.
    """

    config: Config
    why: str
    max_length: int = ANY
    arch: tuple[int, ...] = ()
    plain: bool = False
    known: bool = False


Key = tuple[str, str, int]

_SHORT = "64-row tiles waste least on ragged short reviews (DESIGN.md); wgmma wants 64 rows"
_LONG = "K and V are read once for twice the rows"
_MMA_SYNC = "a 64 x 64 tile spills where the operands of mma.sync pass through registers"
_IEEE = "fp32 dots are chains of FMAs that hold D inputs: few outputs a thread keep them out of local memory"
_SPLIT = "both parts of the own rows stay in registers: a wider step keeps 8 to 128 bytes on the stack"
_WGMMA = "64 rows of its own, so that wgmma sums the scores as in the other passes"
_WIDE = "accumulators of 256 columns: narrow tiles, more warps"
_CDNA = "a wider step spills there"
_CDNA_FP32 = "4 warps may use 512 registers a lane there"
_TWO_STATES = "it holds its own sum beside the scores and their gradient: half the rows"
_H200 = "measured on an H200 (NOTES.md, 2026-11-27): a third stage hides more of the memory's latency, and of narrow tiles more fit"
_IN_FLIGHT = "measured on an H200 (NOTES.md, 2026-11-27): the last tile is loaded while others are computed, and a fourth block fits"
_X3 = "measured on an H200 (NOTES.md, 2026-11-27); wgmma wants 64 rows"
_X3_BETWEEN = "as at heads of 16 or 64, not measured; wgmma wants 64 rows"
_LANES = "4096 elements of K a tile: 32 accumulators a thread"
_EIGHT_WARPS = "4096 elements of K a tile; 4 warps keep 8 bytes on the stack"

TABLE: dict[Key, list[Row]] = {
    ("forward", "half", 16): [Row(Config(64, 64, 4, 3), _SHORT)],
    ("forward", "half", 32): [Row(Config(64, 64, 4, 3), _SHORT)],
    ("forward", "half", 64): [
        Row(Config(64, 64, 4, 3, one_loop=True), _IN_FLIGHT, 1024, (90,), plain=True, known=True),
        Row(Config(64, 64, 4, 3), _SHORT, 1024),
        Row(Config(128, 64, 8, 3), _LONG),
    ],
    ("forward", "half", 128): [
        Row(
            Config(64, 32, 4, 2),
            "64 keys or 128 rows keep 16 to 32 bytes on the stack there",
            arch=(80, 86, 89),
        ),
        Row(Config(64, 64, 4, 2), _SHORT, 1024),
        Row(Config(128, 64, 8, 2), _LONG),
    ],
    ("forward", "half", 256): [Row(Config(64, 32, 8, 2), _WIDE)],
    ("forward", "float", 16): [Row(Config(32, 32, 4, 2), _IEEE)],
    ("forward", "float", 32): [Row(Config(32, 32, 4, 2), _IEEE)],
    ("forward", "float", 64): [
        Row(Config(32, 16, 4, 1), "32 keys or 8 warps spill there", arch=(80, 86, 89, 90, 100, 103)),
        Row(Config(32, 32, 8, 1), _IEEE),
    ],
    ("forward", "float", 128): [
        Row(Config(32, 32, 8, 1), "16 keys keep 16 bytes on the stack there", arch=(100, 103)),
        Row(Config(32, 16, 8, 1), _IEEE),
    ],
    ("forward", "float", 256): [
        Row(Config(64, 16, 8, 1), "16 or 32 rows keep 8 to 24 bytes on the stack there", arch=(80, 86, 89)),
        Row(Config(16, 16, 8, 1), _IEEE),
    ],
    ("forward", "tf32x3", 16): [Row(Config(64, 64, 4, 2), _X3)],
    ("forward", "tf32x3", 32): [Row(Config(64, 64, 4, 1), _X3_BETWEEN)],
    ("forward", "tf32x3", 64): [
        Row(Config(64, 32, 4, 1), "64 keys are a tenth faster on an H200, but their longer sums err more")
    ],
    ("query_gradient", "half", 16): [
        Row(Config(64, 32, 4, 3), _H200, 1024, (90,), plain=True),
        Row(Config(64, 32, 4, 3), _MMA_SYNC + "; two stages keep 8 bytes on the stack", arch=(80, 86, 89)),
        Row(Config(64, 64, 4, 2), _SHORT),
    ],
    ("query_gradient", "half", 32): [Row(Config(64, 64, 4, 2), _SHORT)],
    ("query_gradient", "half", 64): [
        Row(Config(64, 32, 4, 3), _H200, 1024, (90,), plain=True),
        Row(Config(64, 32, 4, 2), _CDNA + " where attn_mask and dropout are given", arch=(GFX942,)),
        Row(Config(64, 32, 4, 2), _MMA_SYNC, arch=(80, 86, 89)),
        Row(Config(64, 32, 4, 2), "64 keys keep 8 bytes on the stack there", arch=(100, 103)),
        Row(Config(64, 64, 4, 2), _SHORT),
    ],
    ("query_gradient", "half", 128): [
        Row(Config(64, 32, 4, 1), "a second stage keeps 8 bytes on the stack there", arch=(100, 103)),
        Row(Config(64, 32, 4, 2), "64 keys spill beside 128 columns of dq"),
    ],
    ("query_gradient", "half", 256): [
        Row(Config(32, 16, 8, 1), _CDNA, arch=(GFX942,)),
        Row(Config(32, 32, 8, 1), _WIDE),
    ],
    ("query_gradient", "float", 16): [Row(Config(32, 32, 4, 1), _IEEE)],
    ("query_gradient", "float", 32): [Row(Config(32, 32, 4, 1), _IEEE)],
    ("query_gradient", "float", 64): [Row(Config(32, 32, 8, 1), _IEEE)],
    ("query_gradient", "float", 128): [Row(Config(16, 16, 8, 1), _IEEE)],
    ("query_gradient", "float", 256): [
        Row(Config(16, 16, 4, 1), _CDNA_FP32, arch=(GFX942,)),
        Row(Config(16, 16, 8, 1), _IEEE),
    ],
    ("query_gradient", "tf32x3", 16): [Row(Config(64, 32, 4, 1), _X3)],
    ("query_gradient", "tf32x3", 32): [Row(Config(64, 32, 4, 1), _X3_BETWEEN)],
    ("query_gradient", "tf32x3", 64): [Row(Config(128, 16, 8, 1), _SPLIT)],
    ("key_gradient", "half", 16): [
        Row(Config(64, 64, 4, 3), _H200, 1024, (90,), plain=True),
        Row(Config(64, 64, 4, 2), _SHORT),
    ],
    ("key_gradient", "half", 32): [Row(Config(64, 64, 4, 2), _SHORT)],
    ("key_gradient", "half", 64): [
        Row(Config(32, 64, 4, 3), _H200, 1024, (90,), plain=True),
        Row(Config(32, 64, 4, 2), _MMA_SYNC, arch=(80, 86, 89)),
        Row(
            Config(32, 64, 4, 2),
            "64 queries keep 8 bytes on the stack there, a third stage spills",
            arch=(100, 103),
        ),
        Row(Config(64, 64, 4, 2), "a third stage spills there", arch=(GFX942,)),
        Row(Config(64, 64, 4, 3), _SHORT + "; 2 stages keep 8 bytes on the stack when packed"),
    ],
    ("key_gradient", "half", 128): [
        Row(Config(32, 32, 8, 1), _CDNA, arch=(GFX942,)),
        Row(
            Config(64, 128, 8, 2),
            "as on Hopper; with 32 queries ptxas 3.6 aims at two CTAs and keeps 24 bytes on the stack",
            arch=(100, 103),
        ),
        Row(
            Config(32, 128, 8, 2),
            "dK and dV of 128 columns fill 8 warps' registers, which share no fewer than 128 rows",
            arch=(90,),
        ),
        Row(Config(32, 64, 8, 2), "128 rows spill there"),
    ],
    ("key_gradient", "half", 256): [
        Row(Config(16, 32, 8, 1), _CDNA, arch=(GFX942,)),
        Row(Config(32, 32, 8, 1), _WIDE),
    ],
    ("key_gradient", "float", 16): [Row(Config(16, 32, 4, 1), _IEEE)],
    ("key_gradient", "float", 32): [
        Row(Config(32, 32, 8, 1), "4 warps keep 16 bytes on the stack there", arch=(100, 103)),
        Row(Config(32, 32, 4, 1), _IEEE),
    ],
    ("key_gradient", "float", 64): [
        Row(
            Config(16, 32, 8, 1),
            "32 rows keep 8 to 20 bytes on the stack there",
            arch=(80, 86, 89, 100, 103, GFX942),
        ),
        Row(Config(32, 32, 8, 1), _IEEE),
    ],
    ("key_gradient", "float", 128): [Row(Config(16, 16, 8, 1), _IEEE)],
    ("key_gradient", "float", 256): [
        Row(Config(16, 16, 4, 1), _CDNA_FP32, arch=(GFX942,)),
        Row(Config(16, 16, 8, 1), _IEEE),
    ],
    ("key_gradient", "tf32x3", 16): [Row(Config(32, 64, 4, 1), _X3)],
    ("key_gradient", "tf32x3", 32): [Row(Config(32, 64, 4, 1), _X3_BETWEEN)],
    ("key_gradient", "tf32x3", 64): [Row(Config(16, 64, 4, 1), _SPLIT)],
    ("attn_mask_gradient", "half", 16): [
        Row(Config(32, 32, 8, 1), _CDNA, arch=(GFX942,)),
        Row(Config(64, 64, 8, 1), "32 rows keep 56 bytes on the stack there at a head_dim of 8", arch=(90,)),
        Row(Config(32, 64, 4, 1), "8 warps keep 48 bytes on the stack there", arch=(100, 103)),
        Row(Config(32, 64, 8, 1), _TWO_STATES),
    ],
    ("attn_mask_gradient", "half", 32): [
        Row(Config(32, 32, 8, 1), "64 keys keep 8 bytes on the stack there", arch=(100, 103)),
        Row(Config(32, 64, 8, 1), _TWO_STATES),
    ],
    ("attn_mask_gradient", "half", 64): [
        Row(Config(32, 32, 8, 1), "64 keys keep 32 bytes on the stack there", arch=(100, 103, GFX942)),
        Row(Config(32, 64, 8, 1), _TWO_STATES),
    ],
    ("attn_mask_gradient", "half", 128): [Row(Config(32, 32, 8, 1), _TWO_STATES)],
    ("attn_mask_gradient", "half", 256): [Row(Config(16, 32, 8, 1), _TWO_STATES)],
    ("attn_mask_gradient", "float", 16): [
        Row(
            Config(16, 16, 4, 1),
            "32 rows keep 88 bytes on the stack beside dropout and a window there",
            arch=(80, 86, 89),
        ),
        Row(Config(32, 16, 8, 1), _IEEE),
    ],
    ("attn_mask_gradient", "float", 32): [Row(Config(32, 16, 8, 1), _IEEE)],
    ("attn_mask_gradient", "float", 64): [
        Row(Config(32, 16, 8, 1), "32 keys keep 16 bytes on the stack there", arch=(90,)),
        Row(Config(32, 32, 8, 1), _IEEE),
    ],
    ("attn_mask_gradient", "float", 128): [
        Row(Config(32, 16, 4, 1), "8 warps keep 24 bytes on the stack there", arch=(90,)),
        Row(Config(32, 16, 8, 1), _IEEE + "; 16 rows keep 8 bytes on the stack"),
    ],
    ("attn_mask_gradient", "float", 256): [
        Row(Config(16, 16, 4, 1), _CDNA_FP32, arch=(GFX942,)),
        Row(Config(16, 16, 8, 1), _IEEE),
    ],
    ("attn_mask_gradient", "tf32x3", 16): [Row(Config(64, 32, 4, 1), _WGMMA)],
    ("attn_mask_gradient", "tf32x3", 32): [Row(Config(64, 32, 4, 1), _WGMMA)],
    ("attn_mask_gradient", "tf32x3", 64): [Row(Config(64, 32, 4, 1), _WGMMA)],
    ("single_query", "half", 16): [Row(Config(1, 256, 8), _EIGHT_WARPS)],
    ("single_query", "half", 32): [Row(Config(1, 128, 8), _EIGHT_WARPS)],
    ("single_query", "half", 64): [Row(Config(1, 64), _LANES)],
    ("single_query", "half", 128): [Row(Config(1, 32, 8), _EIGHT_WARPS)],
    ("single_query", "half", 256): [Row(Config(1, 16), _LANES)],
    ("single_query", "float", 16): [Row(Config(1, 256, 8), _EIGHT_WARPS)],
    ("single_query", "float", 32): [Row(Config(1, 128), _LANES)],
    ("single_query", "float", 64): [Row(Config(1, 64), _LANES)],
    ("single_query", "float", 128): [Row(Config(1, 32), _LANES)],
    ("single_query", "float", 256): [Row(Config(1, 16), _LANES)],
}


@cache
def padded_head_dim(head_dim: int) -> int:
    """The tile width of a head: a power of two, at least the 16 that a matrix instruction takes."""
    return max(16, triton.next_power_of_2(head_dim))


def dtype_kind(dtype: torch.dtype, precision: str = "ieee") -> str:
    """The table's name for a dtype: "half"; for fp32 "tf32x3" where dots are three TF32 products, else "float"."""
    if dtype != torch.float32:
        return "half"
    return precision if precision == "tf32x3" else "float"


def has_tf32x3(head_dim: int, device: torch.device) -> bool:
    """Whether the device multiplies fp32 by three TF32 products: one of TF32X3_ARCHS, and heads that the table has rows for."""
    key = "forward", "tf32x3", padded_head_dim(head_dim)
    return key in TABLE and architecture(device) in TF32X3_ARCHS


def limits_registers(config: Config, device: torch.device) -> bool:
    """Whether a launch asks for at most `max_registers`; Triton's AMD compiler knows no such option."""
    return config.max_registers is not None and architecture(device) != GFX942


# The side of the tile that each pass walks along; the other one it owns.
WALKS = {
    "forward": "block_n",
    "query_gradient": "block_n",
    "key_gradient": "block_m",
    "single_query": "block_n",
}


@lru_cache(maxsize=1024)
def row_for(
    passname: str,
    dtype: torch.dtype,
    head_dim: int,
    length: int,
    arch: int,
    extras: bool = False,
    known: bool = False,
    precision: str = "ieee",
) -> Row:
    """The first row of the table that admits the call; one with extras is never too long for a row, nor plain."""
    # A single query multiplies vectors, in IEEE fp32.
    kind = dtype_kind(dtype, "ieee" if passname == "single_query" else precision)
    return next(
        row
        for row in TABLE[passname, kind, padded_head_dim(head_dim)]
        if (extras or length <= row.max_length)
        and (not row.arch or arch in row.arch)
        and not (extras and row.plain)
        and not (row.known and not known)
    )


def choose(
    passname: str,
    dtype: torch.dtype,
    head_dim: int,
    length: int,
    device: torch.device,
    *,
    extras: int = 0,
    unaligned: bool = False,
    known: bool = False,
    precision: str = "ieee",
) -> Config:
    """The configuration of one call: that of its row, narrowed where it holds more than a tile of scores.

    `length` is the padded (or maximal) number of keys; `known`: each sequence's own is known before the launch. Each of the
    `extras` (attn_mask, dropout, a window at a wide head or
    grouped heads, unaligned rows) holds registers beside a tile of scores. With any of them a pass of WALKS takes half
    the step along the side it walks, a quarter if rows are unaligned and something else is held, but at least 16. In half
    precision it takes one stage, because beside a pipeline ptxas serializes the matrix instructions of many such calls
    (NOTES.md, 2026-11-26), and in fp32 at most two. Single queries with extras, and in half precision calls with several
    extras or unaligned rows, take the registers of 8 warps, although those of a 64-row tile then compute everything twice:
    right and rare, not fast.
    """
    arch, has_extras = architecture(device), extras > 0
    config = row_for(passname, dtype, head_dim, length, arch, has_extras, known, precision).config
    if not extras or passname not in WALKS:
        return config
    is_half = dtype_kind(dtype) == "half"
    halvings = 2 if unaligned and extras > 1 else 1
    more_warps = passname == "single_query" or (is_half and (extras > 1 or unaligned))
    step = max(16, getattr(config, WALKS[passname]) >> halvings)
    return config._replace(
        **{WALKS[passname]: step},
        num_warps=8 if more_warps else config.num_warps,
        num_stages=min(1 if is_half else 2, config.num_stages),
        max_registers=None,
    )


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> int:
    """Compute capability as one number (90 for sm_90, 0x942 for gfx942); 0 where there is none, as in the interpreter."""
    if device.type != "cuda":
        return 0
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName
        return int(name.split(":")[0].removeprefix("gfx"), 16)
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
