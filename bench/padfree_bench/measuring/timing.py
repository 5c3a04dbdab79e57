"""Interleaved timing: one repetition of every contender in turn, again and again, then medians and quantiles.

On a GPU each call stands between two CUDA events after the L2 cache was flushed; `wall=True` and CPUs use
the wall clock with a synchronisation. Drift of clocks or neighbours then hits all contenders alike.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch

Call = Callable[[], object]
Watch = Callable[[str], None]
# Several times any L2 in use.
FLUSH_BYTES = 256 * 2**20
# About half a millisecond in which the host queues the call under test, so that its events enclose the GPU's work
# and not the host's; that is `host_us`.
WAIT_CYCLES, WAIT_US = 1_000_000, 500
# The milliseconds of one call, to be read once all is done, and the microseconds in which the host issued it.
Timed = tuple[Callable[[], float], float | None]


@dataclass(frozen=True)
class Sample:
    """Quantiles of one contender's repetitions in milliseconds, and the host's median to issue one call."""

    p20: float
    p50: float
    p80: float
    repetitions: int
    host_us: float | None = None


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds for all contenders together, bounds on the repetitions, and an end to slow rounds."""

    seconds: float = 2.0
    least: int = 10
    most: int = 100
    warmup: int = 3
    at_most_seconds: float = 15.0

    @classmethod
    def of(cls, quick: bool) -> "Effort":
        return cls(seconds=0.5, least=5, most=20, warmup=1) if quick else cls()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    calls: dict[str, Call],
    device: torch.device,
    effort: Effort,
    wall: bool = False,
    watch: Watch = lambda moment: None,
) -> dict[str, Sample]:
    """Time every call, interleaved A B C A B C.

    Args:
        calls: what to time, by name. Each must leave the state as it found it.
        device: where they run.
        effort: how many repetitions; the same number for each.
        wall: wall clock with synchronisation on a GPU too, for whole steps.
        watch: called "before" the first repetition, "during" one in the middle, while a GPU works through what was
            queued, and right "after" the last; never between a call's two time stamps.
    """
    if not calls:
        return {}
    on_events = device.type == "cuda" and not wall
    timed = partial(_by_events, make_flush()) if on_events else partial(_by_the_clock, device)
    for _ in range(max(1, effort.warmup)):
        begin = perf_counter()
        for call in calls.values():
            timed(call)
        synchronize(device)
        round_ms = (perf_counter() - begin) * 1e3
    taken: dict[str, list[Timed]] = {name: [] for name in calls}
    repetitions = _repetitions(round_ms, effort)
    watch("before")
    for repetition in range(repetitions):
        for name, call in calls.items():
            taken[name].append(timed(call))
        if repetition == repetitions // 2:
            watch("during")
        # Bounds the queue, so that no call waits for a full one; between rounds, not inside a timed region.
        synchronize(device)
    watch("after")
    return {name: _summarise(each) for name, each in taken.items()}


def _by_the_clock(device: torch.device, call: Call) -> Timed:
    synchronize(device)
    start = perf_counter()
    call()
    synchronize(device)
    taken_ms = (perf_counter() - start) * 1e3
    return lambda: taken_ms, None


def _by_events(flush: Call, call: Call) -> Timed:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush()
    torch.cuda._sleep(WAIT_CYCLES)
    start.record()
    issued = perf_counter()
    call()
    issued = perf_counter() - issued
    end.record()
    return lambda: start.elapsed_time(end), issued * 1e6


def issue_us(call: Call, repetitions: int = 10) -> float:
    """The host's median to issue a call that does not wait, on a GPU with nothing to do, in microseconds."""
    taken = []
    for _ in range(repetitions):
        torch.cuda.synchronize()
        begin = perf_counter()
        call()
        taken.append(perf_counter() - begin)
    torch.cuda.synchronize()
    return float(np.median(taken)) * 1e6


def make_flush() -> Call:
    """A call that fills the GPU's L2 with other data.

    It reads and does not write: lines that the timed call had to write back first would count as its own traffic.
    """
    return torch.zeros(FLUSH_BYTES // 4, device="cuda").sum


def _summarise(taken: list[Timed]) -> Sample:
    """Median, the percentiles on both sides of it, and the host's median of one contender."""
    p20, p50, p80 = map(float, np.percentile([elapsed() for elapsed, _ in taken], [20, 50, 80]))
    host = [host_us for _, host_us in taken if host_us is not None]
    return Sample(p20, p50, p80, len(taken), float(np.median(host)) if host else None)


def _repetitions(round_ms: float, effort: Effort) -> int:
    """As many as the time allows, within the bounds; of rounds too slow for those, three."""
    round_seconds = max(round_ms, 1e-6) / 1e3
    wanted = np.clip(effort.seconds / round_seconds, effort.least, effort.most)
    return int(max(min(3, effort.least), min(wanted, effort.at_most_seconds / round_seconds)))


def own_stream(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Work on one stream that is not the default one, on a GPU: what a graph captures must have begun on its stream.

    Autograd keeps the stream a leaf was first used on while a graph of it lives, and a capture that is drawn to
    the default stream is invalid.
    """
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext()


def _end_failed_capture(index: int, pool: Any) -> None:
    """Undo what torch leaves behind, by which every later empty_cache() and random number would fail."""
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
    # The default generator still believes that it is being captured: give it a fresh state with its seed.
    with contextlib.suppress(RuntimeError):
        default = torch.cuda.default_generators[index]
        fresh = torch.Generator(f"cuda:{index}").manual_seed(default.initial_seed())
        default.graphsafe_set_state(fresh.graphsafe_get_state())


def capture_graph(make: Callable[[], Call]) -> Call:
    """A replay of the call as one CUDA graph; raises what the capture raises. To be used within `own_stream`."""
    call, stream = make(), torch.cuda.current_stream()
    for _ in range(3):
        call()
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            call()
    except Exception:
        _end_failed_capture(stream.device_index, pool)
        raise

    def replay(kept: Call = call) -> None:
        # `kept`: the graph reads what the call holds, such as the output that a backward starts from.
        graph.replay()

    return replay
