"""What this machine can do at best, measured just before the cases: the roof of the roofline."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from padfree_bench.measuring import machine
from padfree_bench.measuring.cases import DTYPES
from padfree_bench.measuring.inputs import Inputs

# A backward does 2.5 times the products of a forward: five instead of two.
FLOP_FACTOR = {"forward": 1.0, "backward": 2.5, "both": 3.5}
# An idle GPU needs some time to raise its clocks, and a shared CPU a moment that is undisturbed.
WARM_SECONDS = 0.2


@dataclass(frozen=True)
class Work:
    """What the real tokens need: FLOP, exp2, and bytes, those read for the first time, read again, and written."""

    flops: float
    exp2: float
    first: float
    again: float
    written: float

    @property
    def moved(self) -> float:
        return self.first + self.again + self.written


def work(inputs: Inputs, direction: str) -> Work:
    """Each input read once a pass and each result written once, by real tokens only.

    A forward reads q, k, v and writes out; a backward reads q, k, v, out, d_out, lse and writes d_q, d_k, d_v.
    Both in one call write the lse too, and the backward then reads again what the forward had in its hands. It
    computes the exponentials anew, as flash kernels do; who keeps the score matrix instead moves far more bytes.
    No cache is flushed on a CPU, so there every read may be one of what an earlier repetition left in it.
    """
    case, itemsize = inputs.case, inputs.query.element_size()
    pairs, rows = inputs.pairs * case.heads, inputs.tokens * case.heads
    tensor, lse = rows * case.head_dim * itemsize, 4 * rows
    first, again, written = {
        "forward": (3 * tensor, 0, tensor),
        "backward": (5 * tensor + lse, 0, 3 * tensor),
        "both": (4 * tensor, 4 * tensor + lse, 4 * tensor + lse),
    }[direction]
    if inputs.device.type == "cpu":
        first, again = 0, first + again
    flops = 4 * pairs * case.head_dim * FLOP_FACTOR[direction]
    return Work(flops, pairs * (1 + (direction == "both")), first, again, written)


@dataclass
class Ceilings:
    """Bytes/s of memory traffic, FLOP/s of a matrix product by dtype, exp2/s on registers, bytes of the last cache."""

    bytes_per_s: float
    flops_per_s: dict[str, float]
    exp2_per_s: float
    l2_bytes: int = 0

    def raise_to(self, other: "Ceilings") -> None:
        """Keep the better of two measurements: what slows one down makes no machine faster."""
        self.bytes_per_s = max(self.bytes_per_s, other.bytes_per_s)
        self.exp2_per_s = max(self.exp2_per_s, other.exp2_per_s)
        for dtype, rate in other.flops_per_s.items():
            self.flops_per_s[dtype] = max(rate, self.flops_per_s.get(dtype, 0.0))

    def memory_bytes(self, work: Work) -> float:
        """Bytes that must cross the memory bus: first + max(0, again - L2) + max(0, written - L2).

        The L2 is flushed before a call, so all that is read for the first time comes from memory. What is read a
        second time may still be there, and what was written last need not have left it when the clock stops.
        """
        return work.first + max(0.0, work.again - self.l2_bytes) + max(0.0, work.written - self.l2_bytes)

    def floor(self, work: Work, dtype: str) -> tuple[float, str]:
        """(milliseconds, bound): nothing does this work faster, and the unit that says so."""
        seconds = {
            "bytes": self.memory_bytes(work) / self.bytes_per_s,
            "matrix": work.flops / self.flops_per_s[dtype],
            "exp2": work.exp2 / self.exp2_per_s,
        }
        bound = max(seconds, key=seconds.__getitem__)
        return seconds[bound] * 1e3, bound


def measure_ceilings(device: torch.device, dtypes: set[str]) -> Ceilings:
    """The better of a large copy and a large read, a large matrix product per dtype, and a loop of exp2."""
    gpu = device.type == "cuda"
    size = 8192 if gpu else 1024
    rates = {}
    for name in sorted(dtypes):
        # Random data: a product of zeros runs faster than real data ever will.
        factors = [torch.randn(size, size, device=device).to(DTYPES[name]) for _ in range(2)]
        rates[name] = 2 * size**3 / best_seconds(functools.partial(torch.matmul, *factors), device)
    exp2 = _gpu_exp2(device) if gpu else _cpu_exp2(device)
    return Ceilings(_memory_rate(device), rates, exp2, machine.cache_bytes(device))


def _memory_rate(device: torch.device) -> float:
    source = torch.randn(2**29 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device)
    # Attention reads more than it writes, and memory reads faster than it turns from reading to writing and back.
    return max(copied, source.nbytes / best_seconds(source.sum, device))


def _cpu_exp2(device: torch.device) -> float:
    # On one thread and on all of them, which on a busy machine wait for each other; small enough for their caches.
    cached = [torch.randn(2**14), torch.randn(2**15 * torch.get_num_threads())]
    return max(x.numel() / best_seconds(x.exp2, device) for x in cached)


def _gpu_exp2(device: torch.device) -> float:
    from padfree_bench.measuring import exp2_kernel

    programs = exp2_kernel.PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
    out = torch.empty(programs * exp2_kernel.BLOCK, device=device)
    return exp2_kernel.launch(out) / best_seconds(lambda: exp2_kernel.launch(out), device)


def best_seconds(call: Callable[[], object], device: torch.device, repetitions: int = 8) -> float:
    """The fastest of a few: a ceiling is what the machine can do, not what it does on average."""
    begin, taken = time.perf_counter(), list[float]()
    while len(taken) < repetitions or time.perf_counter() - begin < WARM_SECONDS:
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1e3)
        else:
            start_s = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start_s)
    return min(taken)
