"""`python -m bench memory`: what one call holds at its peak, against length, without timing anything."""

import functools
import itertools
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace

from padfree_bench.measuring.cases import DIRECTIONS, Case, choose_cases, choose_dtypes, groups, pick
from padfree_bench.measuring.check import Truth, compute_truth
from padfree_bench.measuring.inputs import Inputs, make_inputs
from padfree_bench.measuring.machine import pick_device
from padfree_bench.measuring.results import OK, Result, Row
from padfree_bench.peers import Peer
from padfree_bench.suites.attention import MAKE_CALL, admit, peers_for, result_bytes
from padfree_bench.suites.contenders import excused, fill_profile
from padfree_bench.suites.session import Session


def run_case(session: Session, case: Case, peers: list[Peer], directions: list[str]) -> Iterator[list[Row]]:
    """Peak and extra memory of every peer, one at a time, so that each has the whole memory to itself."""
    inputs = make_inputs(case, session.device, session.seed)
    truth = compute_truth(inputs)
    for peer, direction in itertools.product(peers, directions):
        yield [measure_peer(session, peer, direction, inputs, truth)]


def measure_peer(session: Session, peer: Peer, direction: str, inputs: Inputs, truth: Truth) -> Row:
    """A function of its own, so that nothing of the peer is held when the next one begins."""
    contender = admit(peer, inputs, truth, direction != "forward", session.result.suite)
    row, prepared = replace(contender.row, direction=direction), contender.prepared
    if prepared is not None:
        with excused(row):
            call = MAKE_CALL[direction](prepared)
            fill_profile(row, call, session.device, result_bytes(prepared, direction))
            row.status = "measured" if row.status == OK else row.status
    return row


def run(options: Namespace, command: list[str]) -> Result:
    """The memory suite: the length sweep unless --shapes says otherwise."""
    device = pick_device()
    shapes = options.shapes or (None if options.quick else "length")
    cases = choose_cases(device.type, shapes, options.dtypes, options.quick)
    if shapes is None:
        # A quick look needs two lengths, not the whole handful of the speed suite.
        sweep = groups(device.type)["length"]
        dtypes = choose_dtypes(options.dtypes, cases[0].dtype)
        cases = [replace(case, batch=1, dtype=dtype) for dtype in dtypes for case in sweep[:2]]
    directions = pick("direction", options.directions or "forward,both", DIRECTIONS)
    peers = peers_for(options.peers, device)
    session = Session("memory", options, command, {case.dtype for case in cases})
    steps = ((case.id, functools.partial(run_case, session, case, peers, directions)) for case in cases)
    return session.run(steps, directions=0)
