"""A static cost model from compiled code: predictions, never measurements.

For one score tile: *issue* = the loop's instructions x warps / 4 a clock; *mufu* = exp2 results / 16 a clock;
*matrix* = 2 x BLOCK_M x BLOCK_N x D (at least 16) per dot over the matrix units' FLOP a clock (fp32 dots are FMA
instructions and stand in *issue*; three TF32 products take six times as long as one of 16 bits), times how often the warps *repeat* one another's work. Tiles spread evenly over the
multiprocessors and CTAs are assumed to overlap perfectly, so the largest of the three, or the bytes over the memory's
rate, is a floor. *once* is what programs issue outside of their loops (the scan of the mask, addresses, the epilogue) if
every instruction there runs once: not in the floor, because some do not. *expected* is no floor but a guess at what a
replayed launch takes: its start and end, the dependent loads of one program that nothing hides at the end of a launch
(mask, first tile, edge tile, store), and the larger of the memory's time and compute + once.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from padfree_bench.compiled.aot import Arch, Compiled
from padfree_bench.compiled.sass import instruction_count, score_loops

EX2_PER_CLOCK, SCHEDULERS = 16, 4
# Of expected: microseconds from one kernel of a graph to the next, and of a load that misses every cache.
LAUNCH_US, LATENCY_US, DEPENDENT_LOADS = 2.0, 0.7, 4
# Dots of a tile, by kernel.
DOTS = {
    "attention_forward_kernel": 2,
    "query_gradient_kernel": 3,
    "key_gradient_kernel": 4,
    "attn_mask_gradient_kernel": 2,
}
# 16-bit products that take the matrix units as long as one of fp32.
PRODUCTS = {"ieee": 0, "tf32": 2, "tf32x3": 6}
# [B, H, S, D] tensors and [B, H, S] vectors that a kernel reads, and those that it writes.
MOVED = {
    "attention_forward_kernel": ((3, 0), (1, 1)),
    "query_gradient_kernel": ((5, 1), (1, 2)),
    "key_gradient_kernel": ((4, 2), (2, 0)),
}


class Gpu(NamedTuple):
    """Assumed rates of one GPU: sustained clock in GHz, 16-bit FLOP a clock and multiprocessor, bytes a second."""

    name: str
    multiprocessors: int
    clock_ghz: float
    flop_per_clock: int
    bytes_per_second: float
    shared_bytes: int
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32


GPUS: dict[Arch, Gpu] = {
    80: Gpu("A100", 108, 1.41, 2048, 1.6e12, 164 * 1024),
    # An H200 is the same processor with 4.3e12 bytes a second (copies measured on both).
    90: Gpu("H100", 132, 1.8, 4096, 3.0e12, 228 * 1024),
    100: Gpu("B200", 148, 1.8, 8192, 7.0e12, 228 * 1024),
}


@dataclass(frozen=True)
class Costs:
    """Cycles of one multiprocessor for one score tile of a kernel, and its instructions outside of the loops.

    `masked` is the loop of tiles in which keys may be hidden: where a sequence ends, and all of one with holes.
    `repeats`: exp2 results per score of a tile; 2 where two groups of warps compute the same rows.
    """

    block_m: int
    block_n: int
    num_warps: int
    loop: int
    masked_loop: int
    outside: int
    repeats: float
    issue: float
    masked_issue: float
    mufu: float
    matrix: float
    mix: dict[str, int]

    @property
    def tile_cycles(self) -> float:
        return max(self.issue, self.mufu, self.matrix)

    @property
    def masked_tile_cycles(self) -> float:
        return max(self.masked_issue, self.mufu, self.matrix)

    @property
    def bound(self) -> str:
        return max(("issue", "mufu", "matrix"), key=lambda name: getattr(self, name))


def costs_of(compiled: Compiled) -> Costs | None:
    """Costs of a kernel's loops over full tiles, the cheapest, and masked ones; None where none holds an exp2."""
    loops, tile, warps = score_loops(compiled.sass), compiled.tile, compiled.num_warps
    if not loops or tile is None or compiled.name not in DOTS:
        return None
    # By cost: full tiles, then the edges.
    full, masked = loops[0], loops[min(1, len(loops) - 1)]
    scores = tile.BLOCK_M * tile.BLOCK_N
    repeats = full.ex2 * warps * 32 / scores
    is_half = "xbf16>" in compiled.ttir or "xf16>" in compiled.ttir
    products = 1 if is_half else PRODUCTS[tile.PRECISION]
    flop = 2 * scores * tile.BLOCK_D * DOTS[compiled.name] * products
    return Costs(
        block_m=tile.BLOCK_M,
        block_n=tile.BLOCK_N,
        num_warps=warps,
        loop=full.instructions,
        masked_loop=masked.instructions,
        outside=instruction_count(compiled.sass) - sum(loop.instructions for loop in loops),
        repeats=repeats,
        issue=full.instructions * warps / SCHEDULERS,
        masked_issue=masked.instructions * warps / SCHEDULERS,
        mufu=full.ex2 * warps * 32 / EX2_PER_CLOCK,
        matrix=flop / GPUS[compiled.arch].flop_per_clock * max(1, int(repeats)),
        mix=full.mix,
    )


def occupancy(arch: Arch, registers: int, num_warps: int, shared_bytes: int) -> int:
    """CTAs that fit on one multiprocessor; 0 where not even one does, and for AMD, which this does not model."""
    gpu = GPUS.get(arch)
    if gpu is None:
        return 0
    # Registers are dealt in 256 a warp; each CTA holds 1 KB of shared memory for the system.
    by_registers = gpu.registers // (-(-registers * 32 // 256) * 256 * num_warps)
    by_shared = gpu.shared_bytes // (shared_bytes + 1024)
    return min(by_registers, by_shared, gpu.threads // (32 * num_warps), gpu.blocks)


@dataclass(frozen=True)
class Prediction:
    """Microseconds of a launch under the model's assumptions, by bound; it cannot beat the floor."""

    issue: float
    mufu: float
    matrix: float
    memory: float
    compute: float
    once: float
    floor: float
    bound: str
    expected: float


def predict(
    kernel: str,
    costs: Costs,
    arch: Arch,
    lengths: np.ndarray,
    heads: int,
    head_dim: int,
    seq: int,
    itemsize: int,
) -> Prediction:
    """Floor of one launch over a padded batch of these lengths, padded rows and keys skipped."""
    gpu = GPUS[arch]
    # A program owns rows of one side and steps over the other: queries and keys, but in the key gradient.
    own, other = costs.block_m, costs.block_n
    if kernel == "key_gradient_kernel":
        own, other = other, own
    programs = -(-lengths // own)
    # Tiles without a mask, and those at a sequence's end.
    full, masked = int((programs * (lengths // other)).sum()), int((programs * (lengths % other > 0)).sum())
    scale = heads / (gpu.multiprocessors * gpu.clock_ghz * 1e3)
    # Inputs at real rows, outputs at every row: padded ones are written as 0.
    read, written = (tensors * head_dim * itemsize + 4 * vectors for tensors, vectors in MOVED[kernel])
    moved = float(lengths.sum() * heads * read + len(lengths) * seq * heads * written)
    bounds = {
        "issue": (full * costs.issue + masked * costs.masked_issue) * scale,
        "mufu": (full + masked) * costs.mufu * scale,
        "matrix": (full + masked) * costs.matrix * scale,
        "memory": moved / gpu.bytes_per_second * 1e6,
    }
    compute = (full * costs.tile_cycles + masked * costs.masked_tile_cycles) * scale
    once = int(programs.sum()) * costs.outside * costs.num_warps / SCHEDULERS * scale
    return Prediction(
        **bounds,
        compute=compute,
        once=once,
        floor=max(compute, bounds["memory"]),
        bound=max(bounds, key=bounds.__getitem__),
        expected=LAUNCH_US + DEPENDENT_LOADS * LATENCY_US + max(bounds["memory"], compute + once),
    )
