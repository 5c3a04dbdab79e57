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

from padfree._triton.call import heads_together
from padfree_bench.compiled.costs import Costs, Gpu


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
    hit: float = 410
    miss: float = 350


H200 = Constants()


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
# Of the instructions outside of the loops, what a program of padded rows alone issues: it finds that out and writes zeros.
IDLE = 0.5


class Batch(NamedTuple):
    """What is attended to: lengths of the sequences [B] of `seq` padded rows each, and what a row holds."""

    lengths: np.ndarray
    heads: int
    head_dim: int
    seq: int
    itemsize: int

    @property
    def together(self) -> int:
        """How many heads the launcher numbers side by side."""
        return heads_together(self.seq, self.head_dim, self.itemsize)

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


class Needs(NamedTuple):
    """Cycles of each program, [tiles, B]: its turns at issue slots or exp2 and at the memory, and what it stalls for alone."""

    busy: np.ndarray
    memory: np.ndarray
    stalls: np.ndarray


def settle(needs: Needs, full: np.ndarray, at_once: int, tile: Needs, stages: int, load: float) -> Needs:
    """The same of programs beside others, with the waits for loads of full tiles among the stalls.

    `tile` is what one full tile needs. How much of a `load` the stages cover depends on how long a tile takes, and that on
    the waits of all programs: both are found in turn.
    """
    uncovered, now = load, needs
    for _ in range(10):
        stalls = needs.stalls + full * uncovered
        demands = (needs.busy.mean(), needs.memory.mean())
        stays = wait_for_one_another(at_once, stalls.mean(), demands)
        slower = [stay / demand for stay, demand in zip(stays, demands, strict=True)]
        now = Needs(needs.busy * slower[0], needs.memory * slower[1], stalls)
        covered = (stages - 1) * (tile.busy * slower[0] + tile.stalls)
        # The mean excess of a load's time over what is covered, where such times are distributed exponentially.
        uncovered = load * math.exp(-float(covered) / load)
    return now


def predict(
    kernel: str, costs: Costs, gpu: Gpu, batch: Batch, constants: Constants = H200, apart: int = 0
) -> Prediction:
    """One launch over a padded batch, padded rows and keys skipped.

    `apart`: so many programs lie between two tiles of a head, `batch.together` as they are numbered today; 0 for all
    sequences and heads, as until 2026-11-27.
    """
    c, everyone = constants, len(batch.lengths) * batch.heads
    apart = min(apart or everyone, everyone)
    programs = programs_of(kernel, costs, batch)
    moved, missing = traffic(kernel, programs, batch, c.l2_share * gpu.l2_bytes, apart)
    outside = np.where(programs.live, 1, IDLE) * costs.outside
    instructions = programs.full * costs.loop + programs.masked * costs.masked_loop + outside
    tiles = programs.full + programs.masked
    # Cycles of a multiprocessor, of each program.
    each = {
        "issue": costs.issue(instructions), "mufu": tiles * costs.mufu, "matrix": tiles * costs.matrix,
        "memory": moved / (gpu.bytes_per_second / (gpu.multiprocessors * gpu.clock_ghz * 1e9)),
    }  # fmt: skip
    needs = Needs(np.maximum(each["issue"], each["mufu"]), each["memory"], c.stall * instructions)
    tile = Needs(*map(np.asarray, (max(costs.issue(costs.loop), costs.mufu), 0, c.stall * costs.loop)))
    at_once = max(1, costs.ctas)  # one that does not fit at all is `excluded`
    load = (c.hit + missing * c.miss) * gpu.clock_ghz
    taken = settle(needs, programs.full, at_once, tile, costs.num_stages, load)
    durations = taken.busy + taken.memory + taken.stalls

    microseconds = 1 / (gpu.clock_ghz * 1e3)
    scale = batch.heads / gpu.multiprocessors * microseconds
    bounds = {name: float(cycles.sum()) * scale for name, cycles in each.items()}
    bound = max(bounds, key=bounds.__getitem__)
    groups = np.array_split(durations.repeat(batch.heads, 1), everyone // apart, axis=1)
    end = last_end(np.concatenate([group.ravel() for group in groups]), gpu.multiprocessors * at_once)
    return Prediction(
        **bounds,
        floor=bounds[bound],
        bound=bound,
        waiting=float(taken.stalls.sum() / durations.sum()),
        expected=c.launch / 1e3 + end * microseconds,
    )
