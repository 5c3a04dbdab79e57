"""A peer on its way to the clock: prepared, checked against fp64, its calls, and the row it fills."""

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from padfree_bench.measuring import profiling
from padfree_bench.measuring.cases import Case
from padfree_bench.measuring.check import Truth, Verdict, check
from padfree_bench.measuring.errors import first_line
from padfree_bench.measuring.inputs import Inputs
from padfree_bench.measuring.results import NOT_RUN, OK, UPPER_BOUND, Row
from padfree_bench.measuring.timing import Call
from padfree_bench.peers import Peer, Prepared, Refused


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
        verdict = check(prepared.answer(training), inputs, truth)
    except Refused as refusal:
        return Contender(peer, reason=str(refusal))
    except Exception as error:  # noqa: BLE001 - a peer may fail in its own way; the suite goes on and the row says how
        reason = first_line(error)
        release(inputs.device)
        return Contender(peer, reason=reason)
    if not verdict.wrong:
        return Contender(peer, prepared, verdict)
    if peer.upper_bound:
        return Contender(peer, prepared, verdict, peer.note)
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


def fill_profile(row: Row, prepared: Prepared, call: Call, direction: str, device: torch.device) -> None:
    """Peak memory, and on a GPU the launches, host waits and the kernel that really ran."""
    if direction != "backward":
        peak = profiling.peak_bytes(call, device)
        row.peak_mib = peak / profiling.MIB
        row.extra_mib = max(0, peak - result_bytes(prepared, direction)) / profiling.MIB
    if device.type == "cuda":
        profiling.fill_launches(row, call)
