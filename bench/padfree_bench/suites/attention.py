"""`python -m bench attention`: every peer on every case, checked, then timed side by side."""

import argparse
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from padfree_bench.measuring.cases import DIRECTIONS, Case, choose_cases
from padfree_bench.measuring.ceilings import Ceilings, measure_ceilings, work
from padfree_bench.measuring.check import compute_truth
from padfree_bench.measuring.clocks import Watch
from padfree_bench.measuring.errors import first_line
from padfree_bench.measuring.inputs import Inputs, make_inputs
from padfree_bench.measuring.results import AGAIN, FAULT, NOT_RUN, OK, SECOND_WAVE, Result, Row
from padfree_bench.measuring.timing import WAIT_US, Call, Effort, Sample, capture_graph, measure
from padfree_bench.peers import Peer, Prepared, Refused, choose_peers
from padfree_bench.suites.contenders import MAKE_CALL, Contender, admit, fill_profile, release, start_row
from padfree_bench.suites.session import Session

HOST_BOUND = "issued slower than the GPU was kept waiting: the time holds host time, trust graph_ms"
# Timed once more beside the peers that compile for every shape: what the others are compared with.
ANCHORS = ("padfree-skip", "padfree", "sdpa")


def fill_speed(row: Row, inputs: Inputs, direction: str, ceilings: Ceilings) -> None:
    """Rates and the fraction of the roofline from a measured median; a row that is faster than can be is a fault."""
    assert row.ms_p50 is not None
    seconds, needed = row.ms_p50 / 1e3, work(inputs, direction)
    row.tflops = needed.flops / seconds / 1e12
    row.gb_per_s = needed.moved / seconds / 1e9
    row.tokens_per_s = inputs.tokens / seconds
    row.reviews_per_s = inputs.case.batch / seconds
    floor_ms, row.bound = ceilings.floor(needed, inputs.case.dtype)
    row.fraction = floor_ms / row.ms_p50
    if beaten := beaten_floor(row, inputs, direction, ceilings):
        row.status = FAULT
        row.remark(beaten)


def beaten_floor(row: Row, inputs: Inputs, direction: str, ceilings: Ceilings) -> str:
    """Which of the row's medians is below its floor, or "". An upper bound computes something else: it has no floor."""
    floor_ms, bound = ceilings.floor(work(inputs, direction), inputs.case.dtype)
    for name, taken in (("", row.ms_p50), ("as a graph ", row.graph_ms)):
        if row.status == OK and taken is not None and taken < floor_ms:
            return f"{name}faster than its floor of {floor_ms:.4g} ms ({bound})"
    return ""


def add_graph(calls: dict[str, Call], row: Row, make_call: Callable[[], Call]) -> None:
    """The row's call as a CUDA graph beside it, or in the row why there is none."""
    if row.syncs:
        row.graph_reason = "no CUDA graph: the call waits for the GPU"
        return
    try:
        calls[f"{row.peer} graph"] = capture_graph(make_call)
    except Exception as error:  # noqa: BLE001 - the row says how it failed
        row.graph_reason = f"no CUDA graph: {first_line(error)}"


def drop_failing(calls: dict[str, Call], rows: list[Row]) -> None:
    """Each call once more, now that the graphs hold their memory: one that fails costs its own figure alone."""
    for row in rows:
        for name in (row.peer, f"{row.peer} graph"):
            try:
                calls.get(name, lambda: None)()
                torch.cuda.synchronize()
            except Exception as error:  # noqa: BLE001 - the row says how it failed
                del calls[name]
                if name == row.peer:
                    row.status, row.reason = NOT_RUN, first_line(error)
                else:
                    row.graph_reason = f"no CUDA graph: {first_line(error)}"


def fill_times(row: Row, samples: dict[str, Sample]) -> None:
    """Quantiles of the row's call, and of its graph where it has one."""
    sample = samples[row.peer]
    row.ms_p20, row.ms_p50, row.ms_p80 = sample.p20, sample.p50, sample.p80
    row.repetitions, row.host_us = sample.repetitions, sample.host_us
    if (graph := samples.get(f"{row.peer} graph")) is not None:
        row.graph_p20, row.graph_ms, row.graph_p80 = graph.p20, graph.p50, graph.p80


def run_direction(
    suite: str,
    direction: str,
    contenders: list[Contender],
    inputs: Inputs,
    effort: Effort,
    ceilings: Ceilings,
    clocks: list[dict[str, Any]],
) -> list[Row]:
    """Rows of one case in one direction, all contenders timed in turn; the clocks go into `clocks`."""
    device, rows = inputs.device, []
    calls: dict[str, Call] = {}
    for contender in contenders:
        row = start_row(suite, inputs.case, inputs, direction, contender)
        rows.append(row)
        if contender.prepared is None:
            continue
        try:
            call = MAKE_CALL[direction](contender.prepared)
            call()
            fill_profile(row, contender.prepared, call, direction, device)
            calls[row.peer] = call
        except Exception as error:  # noqa: BLE001 - the row says how it failed
            row.status, row.reason = NOT_RUN, first_line(error)
    if device.type == "cuda":
        # After all profiles: a profiler that starts or ends between a capture and its replay has broken graphs before.
        for row, contender in zip(rows, contenders, strict=True):
            if row.peer in calls and contender.prepared is not None:
                add_graph(calls, row, functools.partial(MAKE_CALL[direction], contender.prepared))
        drop_failing(calls, rows)
    watch = Watch({"case": inputs.case.id, "direction": direction})
    samples = measure(calls, device, effort, watch=watch)
    if watch.readings:
        clocks.append(watch.entry)
    timed = [row for row in rows if row.peer in samples]
    for row in timed:
        fill_times(row, samples)
    if any(beaten_floor(row, inputs, direction, ceilings) for row in timed):
        # Before a figure is called a fault, the ceilings are: they may have been read in a bad moment.
        ceilings.raise_to(measure_ceilings(device, set(ceilings.flops_per_s)))
    for row in timed:
        fill_speed(row, inputs, direction, ceilings)
        if row.host_us is not None and row.host_us > WAIT_US:
            row.remark(HOST_BOUND)
        if watch.remark:
            row.remark(watch.remark)
    calls.clear()
    release(device)
    return rows


def run_case(
    case: Case,
    peers: list[Peer],
    directions: list[str],
    device: torch.device,
    effort: Effort,
    ceilings: Ceilings,
    suite: str = "attention",
    seed: int = 0,
    anchors: Sequence[Peer] = (),
    clocks: list[dict[str, Any]] | None = None,
) -> Iterator[list[Row]]:
    """Check every peer on the case's inputs against fp64, then time those that passed; the rows direction by direction.

    `anchors` are timed beside them once more, under names of their own, where any of the peers can be timed.
    """
    inputs = make_inputs(case, device, seed)
    truth = compute_truth(inputs)
    for training in (False, True):
        wanted = [d for d in directions if (d != "forward") == training]
        contenders = [admit(peer, inputs, truth, training) for peer in peers if wanted]
        if any(contender.prepared is not None for contender in contenders):
            contenders = [admit(peer, inputs, truth, training) for peer in anchors] + contenders
        for direction in wanted:
            yield run_direction(
                suite, direction, contenders, inputs, effort, ceilings, [] if clocks is None else clocks
            )


def second_wave(peers: list[Peer]) -> list[Peer]:
    """The anchors among these peers, under the names that they have beside those that compile for every shape."""
    anchors = [peer for peer in peers if peer.name in ANCHORS and not peer.slow_to_compile]
    return [replace(peer, name=peer.name + SECOND_WAVE) for peer in anchors]


def in_second_wave(parts: Iterable[list[Row]]) -> Iterator[list[Row]]:
    for rows in parts:
        yield [replace(row, wave=2) for row in rows]


def _unless_slow(peer: Peer) -> Peer:
    """On a CPU a peer that compiles C++ for every shape takes part only when it is named."""

    def refuse(inputs: Inputs, training: bool) -> Prepared:
        raise Refused("compiles for every shape, minutes on a CPU: name it with --peers to run it")

    return replace(peer, prepare=refuse, slow_to_compile=False) if peer.slow_to_compile else peer


def peers_for(names: str | None, device: torch.device, twice: bool = False) -> list[Peer]:
    """The chosen peers; with `twice` each also under a second name, which must then measure the same."""
    peers = choose_peers(names)
    if names is None and device.type == "cpu":
        peers = [_unless_slow(peer) for peer in peers]
    return peers + [replace(peer, name=peer.name + AGAIN) for peer in peers] if twice else peers


def agreement(result: Result) -> tuple[int, int]:
    """(pairs whose medians differ by less than the wider of the two printed intervals, all pairs) of a --twice run."""
    timed = {row.key: row for row in result.rows if row.timed}
    agree = total = 0
    for (suite, case, direction, peer), row in timed.items():
        other = timed.get((suite, case, direction, peer + AGAIN))
        if other is not None:
            width = max((r.ms_p80 or 0) - (r.ms_p20 or 0) for r in (row, other))
            total += 1
            agree += abs((row.ms_p50 or 0) - (other.ms_p50 or 0)) < width
    return agree, total


def choose_directions(text: str | None) -> list[str]:
    """Comma-separated directions; all three when None. ValueError for an unknown one."""
    chosen = text.split(",") if text else list(DIRECTIONS)
    for direction in chosen:
        if direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    return chosen


def run(options: argparse.Namespace, command: list[str]) -> Result:
    """The attention suite as the command line asks for it."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    cases = choose_cases(device_type, options.shapes, options.dtypes, options.quick)
    directions = choose_directions(options.directions)
    peers = peers_for(options.peers, torch.device(device_type), options.twice)
    session = Session("attention", options, command, {case.dtype for case in cases})

    measure_case = functools.partial(
        run_case,
        directions=directions,
        device=session.device,
        effort=session.effort,
        ceilings=session.ceilings,
        suite=session.result.suite,
        seed=session.seed,
        clocks=session.result.clocks,
    )
    fast = [peer for peer in peers if not peer.slow_to_compile]
    slow = [peer for peer in peers if peer.slow_to_compile]

    def measure_slow(case: Case) -> Iterator[list[Row]]:
        return in_second_wave(measure_case(case, slow, anchors=second_wave(peers)))

    # What is ready is timed first, in every case; compiling a peer for a shape may take a minute.
    steps = [(case.id, functools.partial(measure_case, case, fast)) for case in cases if fast]
    steps += [(case.id + SECOND_WAVE, functools.partial(measure_slow, case)) for case in cases if slow]
    result = session.run(steps, len(directions))
    if options.twice:
        agree, total = agreement(result)
        print(
            f"the same peer twice: {agree} of {total} pairs of medians agree within the interval they print"
        )
    return result
