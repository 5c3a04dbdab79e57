"""What this machine can do at best, measured just before the cases: the roof of the roofline."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from padfree_bench.cases import DTYPES


@dataclass(frozen=True)
class Ceilings:
    """Bytes/s of a copy (read plus written), FLOP/s of a matrix product by dtype, exp2/s on registers."""

    bytes_per_s: float
    flops_per_s: dict[str, float]
    exp2_per_s: float

    def floor(self, flops: float, moved_bytes: float, exp2: float, dtype: str) -> tuple[float, str]:
        """(milliseconds, bound): nothing does this work faster, and the unit that says so."""
        seconds = {
            "bytes": moved_bytes / self.bytes_per_s,
            "matrix": flops / self.flops_per_s[dtype],
            "exp2": exp2 / self.exp2_per_s,
        }
        bound = max(seconds, key=lambda name: seconds[name])
        return seconds[bound] * 1e3, bound


def measure_ceilings(device: torch.device, dtypes: set[str]) -> Ceilings:
    """A large copy, a large matrix product per dtype, and a loop of exp2."""
    gpu = device.type == "cuda"
    size = 8192 if gpu else 1024
    rates = {}
    for name in sorted(dtypes):
        # Random data: a product of zeros runs faster than real data ever will.
        left, right = (torch.randn(size, size, device=device).to(DTYPES[name]) for _ in range(2))
        rates[name] = 2 * size**3 / best_seconds(lambda left=left, right=right: left @ right, device)  # type: ignore[misc]
    return Ceilings(_copy_rate(device), rates, _gpu_exp2(device) if gpu else _cpu_exp2(device))


def _copy_rate(device: torch.device) -> float:
    source = torch.randn(2**29 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device)


def _cpu_exp2(device: torch.device) -> float:
    cached = torch.randn(2**14)
    return cached.numel() / best_seconds(lambda: torch.exp2(cached), device)


def _gpu_exp2(device: torch.device) -> float:
    from padfree_bench import exp2_kernel

    programs = exp2_kernel.PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
    out = torch.empty(programs * exp2_kernel.BLOCK, device=device)
    return exp2_kernel.launch(out) / best_seconds(lambda: exp2_kernel.launch(out), device)


def best_seconds(call: Callable[[], object], device: torch.device, repetitions: int = 8) -> float:
    """The fastest of a few: a ceiling is what the machine can do, not what it does on average."""
    for _ in range(2):
        call()
    taken = []
    for _ in range(repetitions):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            taken.append(time.perf_counter() - begin)
    return min(taken)
