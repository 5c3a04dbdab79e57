"""The time of a launch, from compiled code and the lengths of the batch: predictions, never measurements.

A program issues instructions and moves bytes, which it shares with the others of its multiprocessor, and waits alone: an
instruction for the one before it, and a full tile's loads for the memory as far as the pipeline's stages leave that
uncovered. `wait_for_one_another` tells how far the waits of as many programs as fit at once cover each other. Programs
then start in launch order as others end, which gives the tail; a launch's start and end come on top.

Bytes: rows of a program's own and results move once. Rows that it walks are read anew by each tile of their head; of these
reads the L2 serves what it still holds. Constants and how well the model does: bench/README.md, "The cost model".
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from padfree_bench.compiled.aot import Arch, Compiled
from padfree_bench.compiled.sass import instruction_count, score_loops

EX2_PER_CLOCK, SCHEDULERS = 16, 4


class Constants(NamedTuple):
    """What compiled code does not tell: nanoseconds, but for the first two.

    From ncu's counters on an H200 (2026-11-27): `stall`, cycles that an instruction holds its warp after it was issued, all
    reasons but memory and rivals; `l2_share` of the L2 that serves reads of a head's next tile; `launch`, 2,000 from one
    kernel of a graph to the next and 4,500 in which multiprocessors start and run dry. Fitted to times on it: `hit`, a load
    under load that the L2 serves; `miss`, what the memory adds.
    """

    stall: float = 3.1
    l2_share: float = 0.24
    launch: float = 6500
    hit: float = 335
    miss: float = 455


class Moved(NamedTuple):
    """([B, H, S, D] tensors, [B, H, S] fp32 vectors) of a program's own rows, of those it walks, and of its results."""

    own: tuple[int, int]
    walked: tuple[int, int]
    written: tuple[int, int]


MOVED = {
    "attention_forward_kernel": Moved((1, 0), (2, 0), (1, 1)),
    "query_gradient_kernel": Moved((3, 1), (2, 0), (1, 1)),
    "key_gradient_kernel": Moved((2, 0), (2, 2), (2, 0)),
}
# Dots of a tile, by kernel.
DOTS = {
    "attention_forward_kernel": 2,
    "query_gradient_kernel": 3,
    "key_gradient_kernel": 4,
    "attn_mask_gradient_kernel": 2,
}
# Of the instructions outside of the loops, what a program of padded rows alone issues: it finds that out and writes zeros.
IDLE = 0.5


class Gpu(NamedTuple):
    """Rates of one GPU: sustained clock in GHz, 16-bit FLOP a clock and multiprocessor, bytes a second."""

    name: str
    multiprocessors: int
    clock_ghz: float
    flop_per_clock: int
    bytes_per_second: float
    l2_bytes: float
    shared_bytes: int
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32


GPUS: dict[Arch, Gpu] = {
    80: Gpu("A100", 108, 1.41, 2048, 1.6e12, 40e6, 164 * 1024),
    # Clock and copies as measured. An H100 is the same processor with 3.0e12 bytes a second.
    90: Gpu("H200", 132, 1.98, 4096, 4.3e12, 50e6, 228 * 1024),
    100: Gpu("B200", 148, 1.8, 8192, 7.0e12, 126e6, 228 * 1024),
}


@dataclass(frozen=True)
class Costs:
    """What a kernel issues a warp, and cycles of one multiprocessor for a tile of scores.

    `masked_loop` is the loop of tiles in which keys may be hidden: where a sequence ends, and all of one with holes.
    `repeats`: exp2 results per score of a tile; 2 where two groups of warps compute the same rows. `ctas` fit at once.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    ctas: int
    loop: int
    masked_loop: int
    outside: int
    repeats: float
    mufu: float
    matrix: float
    mix: dict[str, int]

    def issue(self, instructions: float) -> float:
        """Cycles in which a multiprocessor issues these to all warps of a program."""
        return instructions * self.num_warps / SCHEDULERS

    @property
    def bounds(self) -> dict[str, float]:
        """Cycles of a full tile, by what they are spent on."""
        return {"issue": self.issue(self.loop), "mufu": self.mufu, "matrix": self.matrix}


def costs_of(compiled: Compiled) -> Costs | None:
    """Costs of a kernel's loops over full tiles, the cheapest, and masked ones; None where none holds an exp2."""
    loops, tile, warps = score_loops(compiled.sass), compiled.tile, compiled.num_warps
    if not loops or tile is None or compiled.name not in DOTS:
        return None
    # By cost: full tiles, then the edges; a kernel with one loop for all has no other.
    full, masked = loops[0], loops[min(1, len(loops) - 1)]
    scores = tile.BLOCK_M * tile.BLOCK_N
    repeats = full.ex2 * warps * 32 / scores
    on_matrix_units = "xbf16>" in compiled.ttir or "xf16>" in compiled.ttir
    flop = 2 * scores * tile.BLOCK_D * DOTS[compiled.name] if on_matrix_units else 0
    return Costs(
        block_m=tile.BLOCK_M,
        block_n=tile.BLOCK_N,
        num_warps=warps,
        num_stages=compiled.kernel.metadata.num_stages,
        ctas=occupancy(compiled.arch, compiled.resources["registers"], warps, compiled.shared_bytes),
        loop=full.instructions,
        masked_loop=masked.instructions,
        outside=instruction_count(compiled.sass) - sum(loop.instructions for loop in loops),
        repeats=repeats,
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


class Batch(NamedTuple):
    """What is attended to: lengths of the sequences [B] of `seq` padded rows each, and what a row holds."""

    lengths: np.ndarray
    heads: int
    head_dim: int
    seq: int
    itemsize: int

    def bytes_of(self, tensors: int, vectors: int) -> int:
        """Bytes of a row in so many [B, H, S, D] tensors and [B, H, S] fp32 vectors."""
        return tensors * self.head_dim * self.itemsize + 4 * vectors


class Programs(NamedTuple):
    """Of the programs of one head, [tiles, B] in launch order: their tiles, their own rows that are real, and all of them."""

    live: np.ndarray
    full: np.ndarray
    masked: np.ndarray
    rows: np.ndarray
    all_rows: np.ndarray


def programs_of(kernel: str, costs: Costs, batch: Batch) -> Programs:
    """Tiles with the highest rows start first. Padded rows and keys are skipped."""
    # A program owns rows of one side and steps over the other: queries and keys, but in the key gradient.
    own, other = costs.block_m, costs.block_n
    if kernel == "key_gradient_kernel":
        own, other = other, own
    first, lengths = np.arange(-(-batch.seq // own))[::-1, None] * own, batch.lengths[None, :]
    live = first < lengths
    rows, all_rows = (np.clip(length - first, 0, own) + 0 * lengths for length in (lengths, batch.seq))
    return Programs(live, live * (lengths // other), live * (lengths % other > 0), rows, all_rows)


def traffic(
    kernel: str, programs: Programs, batch: Batch, l2_bytes: float, apart: int
) -> tuple[np.ndarray, float]:
    """(bytes that each program moves from and to memory, share of the bytes read that are not found in the L2)."""
    moved = MOVED[kernel]
    walked = programs.live * batch.lengths * batch.bytes_of(*moved.walked)
    own = programs.rows * batch.bytes_of(*moved.own)
    written = programs.all_rows * batch.bytes_of(*moved.written)
    # What is touched between two tiles of a head drives the rows that they share out of the L2.
    between = (walked + own + written).mean(1, keepdims=True) * apart
    is_first = np.cumsum(programs.live, 0) == 1
    missed = walked * np.where(is_first, 1, 1 - np.minimum(1, l2_bytes / between))
    return missed + own + written, float((missed + own).sum() / (walked + own).sum())


def wait_for_one_another(at_once: int, alone: float, shared: Sequence[float]) -> list[float]:
    """What a program's demands on shared units become beside others, where `at_once` programs take turns.

    Mean value analysis of a closed network: a program that arrives at a unit finds there what a network of one program
    less holds on average. `alone` is the time in which a program needs no shared unit.
    """
    queues, stays = [0.0] * len(shared), list(shared)
    for programs in range(1, at_once + 1):
        stays = [demand * (1 + queue) for demand, queue in zip(shared, queues, strict=True)]
        queues = [programs * stay / (alone + sum(stays)) for stay in stays]
    return stays


def last_end(durations: Iterable[float], slots: int) -> float:
    """When the last ends, if each starts in turn as soon as one of the slots is free."""
    free = [0.0] * slots
    for duration in durations:
        heapq.heapreplace(free, free[0] + duration)
    return float(max(free))


@dataclass(frozen=True)
class Prediction:
    """Microseconds of a launch: what each shared unit needs at least, the largest of them, and what is expected.

    Of a program's time the model holds `waiting` (for instructions before and for loads) apart from its turns at units.
    """

    issue: float
    mufu: float
    matrix: float
    memory: float
    floor: float
    bound: str
    waiting: float
    expected: float


def predict(
    kernel: str, costs: Costs, gpu: Gpu, batch: Batch, constants: Constants = Constants(), apart: int = 0
) -> Prediction:
    """One launch over a padded batch, padded rows and keys skipped.

    `apart`: so many programs lie between two tiles of a head; 0 for all sequences and heads, as they are numbered today.
    """
    c, everyone = constants, len(batch.lengths) * batch.heads
    apart = min(apart or everyone, everyone)
    programs = programs_of(kernel, costs, batch)
    moved, missing = traffic(kernel, programs, batch, c.l2_share * gpu.l2_bytes, apart)
    outside = np.where(programs.live, 1, IDLE) * costs.outside
    instructions = programs.full * costs.loop + programs.masked * costs.masked_loop + outside
    tiles = programs.full + programs.masked
    # Cycles of a multiprocessor, of each program.
    issue, mufu, matrix = costs.issue(instructions), tiles * costs.mufu, tiles * costs.matrix
    memory = moved / (gpu.bytes_per_second / (gpu.multiprocessors * gpu.clock_ghz * 1e9))
    busy = np.maximum(issue, mufu)

    demands, at_once = (busy.mean(), memory.mean()), max(1, costs.ctas)
    load = (c.hit + missing * c.miss) * gpu.clock_ghz
    uncovered, slower = load, (1.0, 1.0)
    for _ in range(10):  # what the stages cover depends on how long a tile takes, which depends on it
        waits = c.stall * instructions + programs.full * uncovered
        stays = wait_for_one_another(at_once, waits.mean(), demands)
        slower = tuple(stay / demand for stay, demand in zip(stays, demands, strict=True))
        tile = max(costs.issue(costs.loop), costs.mufu) * slower[0] + c.stall * costs.loop
        # Times of loads spread like waits for a bus: this is the mean excess of one over what the stages cover.
        uncovered = load * math.exp(-(costs.num_stages - 1) * tile / load)
    durations = waits + busy * slower[0] + memory * slower[1]

    microseconds = 1 / (gpu.clock_ghz * 1e3)
    each = {"issue": issue, "mufu": mufu, "matrix": matrix, "memory": memory}
    scale = batch.heads / gpu.multiprocessors * microseconds
    bounds = {name: float(cycles.sum()) * scale for name, cycles in each.items()}
    bound = max(bounds, key=bounds.__getitem__)
    groups = np.array_split(durations.repeat(batch.heads, 1), everyone // apart, axis=1)
    end = last_end(np.concatenate([group.ravel() for group in groups]), gpu.multiprocessors * at_once)
    return Prediction(
        **bounds,
        floor=bounds[bound],
        bound=bound,
        waiting=float(waits.sum() / durations.sum()),
        expected=c.launch / 1e3 + end * microseconds,
    )
