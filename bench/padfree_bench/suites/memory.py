"""`python -m bench memory`: what one call holds at its peak, against length, without timing anything."""

import argparse
import functools
from collections.abc import Iterator
from dataclasses import replace

import torch

from padfree_bench.measuring.cases import Case, choose_cases, choose_dtypes, groups
from padfree_bench.measuring.check import compute_truth
from padfree_bench.measuring.errors import first_line
from padfree_bench.measuring.inputs import make_inputs
from padfree_bench.measuring.results import NOT_RUN, OK, Result, Row
from padfree_bench.peers import Peer
from padfree_bench.suites.attention import choose_directions, peers_for
from padfree_bench.suites.contenders import MAKE_CALL, admit, fill_profile, release, start_row
from padfree_bench.suites.session import Session


def run_case(
    case: Case, peers: list[Peer], directions: list[str], device: torch.device, suite: str, seed: int
) -> Iterator[list[Row]]:
    """Peak and extra memory of every peer, one at a time, so that each has the whole memory to itself."""
    inputs = make_inputs(case, device, seed)
    truth = compute_truth(inputs)
    for peer in peers:
        for direction in directions:
            contender = admit(peer, inputs, truth, training=direction != "forward")
            row = start_row(suite, case, inputs, direction, contender)
            if contender.prepared is not None:
                try:
                    call = MAKE_CALL[direction](contender.prepared)
                    fill_profile(row, contender.prepared, call, direction, device)
                    row.status = "measured" if row.status == OK else row.status
                except Exception as error:  # noqa: BLE001 - the row says how it failed
                    row.status, row.reason = NOT_RUN, first_line(error)
            del contender
            release(device)
            yield [row]


def run(options: argparse.Namespace, command: list[str]) -> Result:
    """The memory suite: the length sweep unless --shapes says otherwise."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = options.shapes or (None if options.quick else "length")
    cases = choose_cases(device_type, shapes, options.dtypes, options.quick)
    if shapes is None:
        # A quick look needs two lengths, not the whole handful of the speed suite.
        sweep = groups(device_type)["length"]
        dtypes = choose_dtypes(options.dtypes, cases[0].dtype)
        cases = [replace(case, batch=1, dtype=dtype) for dtype in dtypes for case in sweep[:2]]
    directions = choose_directions(options.directions or "forward,both")
    peers = peers_for(options.peers, torch.device(device_type))
    session = Session("memory", options, command, {case.dtype for case in cases})
    held = (peers, directions, session.device, session.result.suite, session.seed)
    return session.run(((case.id, functools.partial(run_case, case, *held)) for case in cases), directions=0)
