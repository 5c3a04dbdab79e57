"""`python -m bench attention`: every peer on every case, checked, then timed side by side."""

import functools
import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from padfree_bench.measuring.cases import DIRECTIONS, Case, choose_cases, pick
from padfree_bench.measuring.ceilings import Ceilings, measure_ceilings, work
from padfree_bench.measuring.check import Truth, check, compute_truth
from padfree_bench.measuring.inputs import Inputs, make_inputs
from padfree_bench.measuring.machine import pick_device
from padfree_bench.measuring.results import AGAIN, FAULT, OK, SECOND_WAVE, UPPER_BOUND, Result, Row
from padfree_bench.measuring.timing import WAIT_US, Call
from padfree_bench.peers import Peer, Prepared, choose_peers
from padfree_bench.suites.contenders import Contest, excused, fill_profile, fill_rates, refuse, start_row
from padfree_bench.suites.session import Session

HOST_BOUND = "issued slower than the GPU was kept waiting: the time holds host time, trust graph_ms"
# Timed once more beside the peers that compile for every shape: what the others are compared with.
ANCHORS = ("padfree-skip", "padfree", "sdpa")


@dataclass
class Contender:
    """A peer on one case: the row that each of its directions starts from, and what to time if it may be timed."""

    row: Row
    prepared: Prepared | None = None


def admit(peer: Peer, inputs: Inputs, truth: Truth, training: bool, suite: str = "attention") -> Contender:
    """Prepare a peer and check its answer; whoever is wrong, refuses or fails gets a reason instead of a clock."""
    case = inputs.case
    row = start_row(suite, case, "", peer, inputs.tokens / (case.batch * case.seq))
    contender = Contender(row)
    with excused(row):
        prepared = peer.prepare(inputs, training)
        verdict = check(prepared.answer(training), inputs, truth)
        if not math.isnan(verdict.max_error):
            row.max_error, row.relative_error = verdict.max_error, max(verdict.relative.values())
        if verdict.wrong and not peer.upper_bound:
            row.reason = verdict.reason()
        else:
            row.status, row.reason = (UPPER_BOUND, peer.note) if verdict.wrong else (OK, "")
            contender.prepared, row.ran = prepared, prepared.ran
    return contender


def backward_call(prepared: Prepared) -> Call:
    out = prepared.forward()
    return lambda: torch.autograd.grad(out, prepared.leaves, prepared.d_out, retain_graph=True)


MAKE_CALL: dict[str, Callable[[Prepared], Call]] = {
    "forward": lambda prepared: prepared.forward,
    "backward": backward_call,
    "both": lambda p: lambda: torch.autograd.grad(p.forward(), p.leaves, p.d_out),
}


def result_bytes(prepared: Prepared, direction: str) -> int:
    """Bytes of what the caller asked for: the output, and the gradients where the case trains."""
    results = [prepared.d_out, *(prepared.leaves if direction == "both" else ())]
    return sum((tensor.values() if tensor.is_nested else tensor).nbytes for tensor in results)


def fill_speed(row: Row, inputs: Inputs, direction: str, ceilings: Ceilings) -> None:
    """Rates and the fraction of the roofline from a measured median; a row that is faster than can be is a fault."""
    fill_rates(row, inputs.tokens)
    assert row.ms_p50 is not None
    seconds, needed = row.ms_p50 / 1e3, work(inputs, direction)
    row.tflops, row.gb_per_s = needed.flops / seconds / 1e12, needed.moved / seconds / 1e9
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


def judge(session: Session, inputs: Inputs, direction: str, timed: list[Row]) -> None:
    """What the times are worth: rates, faults, and the time of a host that was too slow."""
    ceilings = session.ceilings
    if any(beaten_floor(row, inputs, direction, ceilings) for row in timed):
        # Before a figure is called a fault, the ceilings are: they may have been read in a bad moment.
        ceilings.raise_to(measure_ceilings(session.device, set(ceilings.flops_per_s)))
    for row in timed:
        fill_speed(row, inputs, direction, ceilings)
        if row.host_us is not None and row.host_us > WAIT_US:
            row.remark(HOST_BOUND)


def run_direction(session: Session, direction: str, contenders: list[Contender], inputs: Inputs) -> list[Row]:
    """Rows of one case in one direction, all contenders timed in turn."""
    contest = Contest(session, inputs.tokens, wall=False)
    for contender in contenders:
        with contest.enter(replace(contender.row, direction=direction)) as row:
            if (prepared := contender.prepared) is not None:
                make_call = functools.partial(MAKE_CALL[direction], prepared)
                call = make_call()
                call()
                fill_profile(row, call, session.device, result_bytes(prepared, direction))
                contest.calls[row.peer], contest.graphs[row.peer] = call, make_call
    return contest.time(functools.partial(judge, session, inputs, direction))


def run_case(
    session: Session, case: Case, peers: list[Peer], directions: list[str], anchors: Sequence[Peer] = ()
) -> Iterator[list[Row]]:
    """Check every peer on the case's inputs against fp64, then time those that passed; the rows direction by direction.

    `anchors` are timed beside them once more, under names of their own, where any of the peers can be timed.
    """
    inputs = make_inputs(case, session.device, session.seed)
    enter = functools.partial(admit, inputs=inputs, truth=compute_truth(inputs), suite=session.result.suite)
    for training in (False, True):
        if wanted := [direction for direction in directions if (direction != "forward") == training]:
            contenders = [enter(peer, training=training) for peer in peers]
            if any(contender.prepared is not None for contender in contenders):
                contenders = [*(enter(peer, training=training) for peer in anchors), *contenders]
            for direction in wanted:
                yield run_direction(session, direction, contenders, inputs)


def run_second_wave(
    session: Session, case: Case, peers: list[Peer], directions: list[str]
) -> Iterator[list[Row]]:
    """The peers that compile for every shape, beside the anchors under the names that these have there."""
    anchors = [peer for peer in peers if peer.name in ANCHORS and not peer.slow_to_compile]
    anchors = [replace(peer, name=peer.name + SECOND_WAVE) for peer in anchors]
    slow = [peer for peer in peers if peer.slow_to_compile]
    for rows in run_case(session, case, slow, directions, anchors):
        yield [replace(row, wave=2) for row in rows]


def peers_for(names: str | None, device: torch.device, twice: bool = False) -> list[Peer]:
    """The chosen peers; with `twice` each also under a second name, which must then measure the same.

    On a CPU a peer that compiles C++ for every shape takes part only when it is named.
    """
    peers = choose_peers(names)
    if names is None and device.type == "cpu":
        unless_named = refuse("compiles for every shape, minutes on a CPU: name it with --peers to run it")
        out = functools.partial(replace, prepare=unless_named, slow_to_compile=False)
        peers = [out(peer) if peer.slow_to_compile else peer for peer in peers]
    return peers + [replace(peer, name=peer.name + AGAIN) for peer in peers] if twice else peers


def agreement(result: Result) -> tuple[int, int]:
    """(pairs whose medians differ by less than the wider of the two printed intervals, all pairs) of a --twice run."""
    timed = {row.key: (row.ms_p20 or 0, row.ms_p50 or 0, row.ms_p80 or 0) for row in result.rows if row.timed}
    pairs = [(times, timed.get((*key[:3], key[3] + AGAIN))) for key, times in timed.items()]
    agree = [abs(a[1] - b[1]) < max(a[2] - a[0], b[2] - b[0]) for a, b in pairs if b]
    return sum(agree), len(agree)


def run(options: Namespace, command: list[str]) -> Result:
    """The attention suite as the command line asks for it."""
    device = pick_device()
    cases = choose_cases(device.type, options.shapes, options.dtypes, options.quick)
    directions = pick("direction", options.directions or ",".join(DIRECTIONS), DIRECTIONS)
    peers = peers_for(options.peers, device, options.twice)
    session = Session("attention", options, command, {case.dtype for case in cases})
    fast = [peer for peer in peers if not peer.slow_to_compile]
    # What is ready is timed first, in every case; compiling a peer for a shape may take a minute.
    first = functools.partial(run_case, session, peers=fast, directions=directions)
    second = functools.partial(run_second_wave, session, peers=peers, directions=directions)
    steps = [(case.id, functools.partial(first, case)) for case in cases if fast]
    steps += [
        (case.id + SECOND_WAVE, functools.partial(second, case)) for case in cases if len(fast) < len(peers)
    ]
    result = session.run(steps, len(directions))
    if options.twice:
        agree, total = agreement(result)
        print(
            f"the same peer twice: {agree} of {total} pairs of medians agree within the interval they print"
        )
    return result
