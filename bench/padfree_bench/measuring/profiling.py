"""Peak memory of a call, and what a profile of one call shows: launches, host synchronisations, kernel names."""

import gc
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from padfree_bench.measuring.errors import first_line
from padfree_bench.measuring.results import Row

MIB = 2**20
SYNC_CALLS = ["cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"]
SYNC_CALLS += ["cudaMemcpy", "cuStreamSynchronize"]
MARK = "padfree_bench_call"


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes held at once during the call, above what was held before it; its result is released after.

    On a GPU the caching allocator's own count, on a CPU every allocation that torch's profiler reports.
    """
    if device.type == "cuda":
        gc.collect()
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    held = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def fill_launches(row: Row, call: Callable[[], object], steps: int = 1) -> None:
    """Launches and host waits of one call of so many steps into its row, of a step each.

    A profiler that does not work costs these figures alone.
    """
    try:
        launches, syncs, longest = count_launches(call)
    except Exception as error:  # noqa: BLE001 - CUPTI is refused in many ways
        row.remark(f"launches not counted: {first_line(error)}")
        return
    row.launches = round(launches / steps)
    row.syncs = syncs / steps if syncs % steps else syncs // steps
    row.ran = f"{row.ran} ({longest[:60]})" if longest else row.ran


def runs_operator(call: Callable[[], object], name: str) -> bool:
    """Whether a warm call runs torch's operator of this name."""
    call()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        call()
    return any(event.key == name for event in profiler.key_averages())


def count_launches(call: Callable[[], object]) -> tuple[int, int, str]:
    """(GPU operations: kernels, copies, fills; host waits inside it; the longest kernel's name) of one warm call."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        with record_function(MARK):
            call()
        torch.cuda.synchronize()
    events = list(profiler.profiler.kineto_results.events())  # type: ignore[union-attr]
    cpu, gpu = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    launched = [e for e in events if e.device_type() == gpu and MARK not in e.name()]
    mark = next(e for e in events if e.device_type() == cpu and e.name() == MARK)
    begin, end = mark.start_ns(), mark.start_ns() + mark.duration_ns()
    syncs = [e for e in events if e.name() in SYNC_CALLS and begin <= e.start_ns() <= end]
    longest = max(launched, key=lambda e: e.duration_ns(), default=None)
    return len(launched), len(syncs), longest.name() if longest is not None else ""
