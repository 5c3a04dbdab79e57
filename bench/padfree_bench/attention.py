"""`python -m bench attention`: every peer on every case, checked, then timed side by side."""

import argparse
import functools
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from padfree_bench import profiling
from padfree_bench.cases import DIRECTIONS, Case, choose_cases
from padfree_bench.ceilings import Ceilings
from padfree_bench.check import Truth, Verdict, check, compute_truth
from padfree_bench.inputs import Inputs, make_inputs
from padfree_bench.peers import Peer, Prepared, Refused, choose_peers
from padfree_bench.results import NOT_RUN, OK, UPPER_BOUND, Result, Row
from padfree_bench.session import Session, first_line
from padfree_bench.timing import WAIT_US, Call, Effort, capture_graph, measure

# A backward does 2.5 times the products of a forward: five instead of two.
FLOP_FACTOR = {"forward": 1.0, "backward": 2.5, "both": 3.5}
HOST_BOUND = "issued slower than the GPU was kept waiting: the time holds host time, trust graph_ms"
AGAIN = " (again)"


@dataclass
class Contender:
    """A peer that passed its check in one mode, or the reason it did not."""

    peer: Peer
    prepared: Prepared | None = None
    verdict: Verdict | None = None
    reason: str = ""

    @property
    def status(self) -> str:
        if self.prepared is None:
            return NOT_RUN
        return UPPER_BOUND if self.verdict is not None and self.verdict.wrong else OK


def admit(peer: Peer, inputs: Inputs, truth: Truth, training: bool) -> Contender:
    """Prepare a peer and check its answer; whoever is wrong, refuses or fails gets a reason instead of a clock."""
    try:
        prepared = peer.prepare(inputs, training)
        verdict = check(prepared, inputs, truth, training)
    except Refused as refusal:
        return Contender(peer, reason=str(refusal))
    except Exception as error:  # noqa: BLE001 - a peer may fail in its own way; the suite goes on and the row says how
        reason = first_line(error)
        release(inputs.device)
        return Contender(peer, reason=reason)
    if not verdict.wrong:
        return Contender(peer, prepared, verdict)
    if peer.upper_bound:
        return Contender(peer, prepared, verdict, f"{peer.note} (error {verdict.relative['out']:.1e})")
    return Contender(peer, verdict=verdict, reason=verdict.reason())


def release(device: torch.device) -> None:
    """Give a GPU's memory back between peers; a CPU's comes back by itself, and collecting costs 0.2 s."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def forward_call(prepared: Prepared) -> Call:
    return prepared.forward


def backward_call(prepared: Prepared) -> Call:
    out = prepared.forward()
    return lambda: torch.autograd.grad(out, prepared.leaves, prepared.d_out, retain_graph=True)


def both_call(prepared: Prepared) -> Call:
    return lambda: torch.autograd.grad(prepared.forward(), prepared.leaves, prepared.d_out)


MAKE_CALL: dict[str, Callable[[Prepared], Call]] = {
    "forward": forward_call,
    "backward": backward_call,
    "both": both_call,
}


def work(inputs: Inputs, direction: str) -> tuple[float, float, float]:
    """(FLOP, bytes, exp2) that the real tokens need: each input read once, each result written once."""
    case, itemsize = inputs.case, inputs.query.element_size()
    pairs, rows = inputs.pairs * case.heads, inputs.tokens * case.heads
    tensor = rows * case.head_dim * itemsize
    moved = {"forward": 4 * tensor + 4 * rows, "backward": 8 * tensor + 4 * rows}
    moved["both"] = moved["forward"] + moved["backward"]
    return (
        4 * pairs * case.head_dim * FLOP_FACTOR[direction],
        moved[direction],
        pairs * (1 + (direction == "both")),
    )


def result_bytes(prepared: Prepared, direction: str) -> int:
    """Bytes of what the caller asked for: the output, and the gradients where the case trains."""

    def size(tensor: Tensor) -> int:
        return (tensor.values() if tensor.is_nested else tensor).nbytes

    return size(prepared.d_out) + (sum(size(leaf) for leaf in prepared.leaves) if direction == "both" else 0)


def start_row(suite: str, case: Case, inputs: Inputs, direction: str, contender: Contender) -> Row:
    row = Row(
        suite=suite,
        case=case.id,
        group=case.group,
        direction=direction,
        peer=contender.peer.name,
        status=contender.status,
        reason=contender.reason,
        note=contender.peer.note,
        dtype=case.dtype,
        batch=case.batch,
        heads=case.heads,
        head_dim=case.head_dim,
        seq=case.seq,
        lengths=case.lengths,
        valid_fraction=inputs.tokens / (case.batch * case.seq),
    )
    if contender.prepared is not None:
        row.ran = contender.prepared.ran
    if contender.verdict is not None and not math.isnan(contender.verdict.max_error):
        row.max_error = contender.verdict.max_error
        row.relative_error = max(contender.verdict.relative.values())
    return row


def fill_speed(row: Row, inputs: Inputs, direction: str, ceilings: Ceilings) -> None:
    """Rates and the fraction of the roofline from a measured median."""
    assert row.ms_p50 is not None
    seconds = row.ms_p50 / 1e3
    flops, moved, exp2 = work(inputs, direction)
    row.tflops = flops / seconds / 1e12
    row.gb_per_s = moved / seconds / 1e9
    row.tokens_per_s = inputs.tokens / seconds
    row.reviews_per_s = inputs.case.batch / seconds
    floor_ms, row.bound = ceilings.floor(flops, moved, exp2, inputs.case.dtype)
    row.fraction = floor_ms / row.ms_p50
    if row.fraction > 1 and row.status == OK:
        row.reason = "faster than its floor: not to be trusted"


def fill_profile(row: Row, prepared: Prepared, call: Call, direction: str, device: torch.device) -> None:
    """Peak memory, and on a GPU the launches, host waits and the kernel that really ran."""
    if direction != "backward":
        peak = profiling.peak_bytes(call, device)
        row.peak_mib = peak / profiling.MIB
        row.extra_mib = max(0, peak - result_bytes(prepared, direction)) / profiling.MIB
    if device.type == "cuda":
        profiling.fill_launches(row, call)


def add_graph(calls: dict[str, Call], row: Row, make_call: Callable[[], Call]) -> None:
    """The row's call as a CUDA graph beside it, or in the row why there is none."""
    if row.syncs:
        row.graph_reason = "no CUDA graph: the call waits for the GPU"
        return
    try:
        calls[f"{row.peer} graph"] = capture_graph(make_call)
    except Exception as error:  # noqa: BLE001 - the row says how it failed
        row.graph_reason = f"no CUDA graph: {first_line(error)}"


def run_direction(
    suite: str,
    direction: str,
    contenders: list[Contender],
    inputs: Inputs,
    effort: Effort,
    ceilings: Ceilings,
) -> list[Row]:
    """Rows of one case in one direction, all contenders timed in turn."""
    device, calls, rows = inputs.device, {}, []
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
            continue
        if device.type == "cuda":
            add_graph(calls, row, functools.partial(MAKE_CALL[direction], contender.prepared))
    samples = measure(calls, device, effort)
    for row in rows:
        if (sample := samples.get(row.peer)) is None:
            continue
        row.ms_p20, row.ms_p50, row.ms_p80 = sample.p20, sample.p50, sample.p80
        row.repetitions, row.host_us = sample.repetitions, sample.host_us
        if (graph := samples.get(f"{row.peer} graph")) is not None:
            row.graph_ms = graph.p50
        fill_speed(row, inputs, direction, ceilings)
        if sample.host_us is not None and sample.host_us > WAIT_US:
            row.reason = "; ".join(filter(None, [row.reason, HOST_BOUND]))
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
) -> list[Row]:
    """Check every peer on the case's inputs against fp64, then time those that passed."""
    inputs = make_inputs(case, device)
    truth = compute_truth(inputs)
    rows: list[Row] = []
    for training in (False, True):
        wanted = [d for d in directions if (d != "forward") == training]
        if wanted:
            contenders = [admit(peer, inputs, truth, training) for peer in peers]
            for direction in wanted:
                rows += run_direction(suite, direction, contenders, inputs, effort, ceilings)
    return rows


def _unless_slow(peer: Peer) -> Peer:
    """On a CPU a peer that compiles C++ for every shape takes part only when it is named."""

    def refuse(inputs: Inputs, training: bool) -> Prepared:
        raise Refused("compiles for every shape, minutes on a CPU: name it with --peers to run it")

    return replace(peer, prepare=refuse) if peer.slow_to_compile else peer


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

    def measure_case(case: Case) -> list[Row]:
        return run_case(
            case, peers, directions, session.device, session.effort, session.ceilings, session.result.suite
        )

    result = session.run((case.id, lambda case=case: measure_case(case)) for case in cases)  # type: ignore[misc]
    if options.twice:
        agree, total = agreement(result)
        print(
            f"the same peer twice: {agree} of {total} pairs of medians agree within the interval they print"
        )
    return result
