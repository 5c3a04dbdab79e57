"""Whole models side by side: what the suites encoder, hf and train share."""

import functools
import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from padfree_bench.measuring import profiling
from padfree_bench.measuring.cases import DIRECTIONS, DTYPES, Case, pick
from padfree_bench.measuring.check import limit_of
from padfree_bench.measuring.machine import pick_device
from padfree_bench.measuring.results import OK, Result, Row
from padfree_bench.measuring.timing import Call, issue_us
from padfree_bench.peers import padfree_peers
from padfree_bench.peers.base import compiled, needs
from padfree_bench.suites.contenders import Contest, fill_profile, refuse, start_row
from padfree_bench.suites.session import Session

# Never more than this: a model adds up the rounding of its layers, and an answer of zeros errs by 1.
LIMITS = {"fp32": 1e-4, "fp16": 5e-2, "bf16": 0.2}
FIRST_TOKEN, LAST_TOKEN = 1000, 29000
UNLESS_NAMED = "compiles C++ on a CPU: name it with --peers to run it"
# What stands on the two sides of the mask's edge: the last token of every review, and its padding.
EDGE, PAD = 999, 0


@dataclass(frozen=True)
class ModelCase(Case):
    """One model size, named by its group, on one padded batch of token ids, or on an epoch of some `batches`."""

    ffn: int = 0
    layers: int = 0
    batches: int = 0

    @property
    def id(self) -> str:
        inputs = f"{self.batches}-batches" if self.batches else self.lengths
        return f"{self.group}-B{self.batch}-S{self.seq}-{inputs}-{self.dtype}"

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


@dataclass
class Batch:
    """input_ids [B, S] int64 with PAD at padding; attention_mask [B, S] int64, 1 = token."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    tokens: int


def make_batch(lengths: Sequence[int], seq: int, device: torch.device, seed: int = 0) -> Batch:
    """Random tokens at the given lengths, the last of them EDGE, padded to seq."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.as_tensor(list(lengths))
    keep = torch.arange(seq) < rows[:, None]
    ids = torch.randint(FIRST_TOKEN, LAST_TOKEN, keep.shape, generator=generator).masked_fill(~keep, PAD)
    ids[torch.arange(len(rows)), rows - 1] = EDGE
    labels = torch.randint(0, 2, (len(rows),), generator=generator)
    return Batch(ids.to(device), keep.long().to(device), labels.to(device), int(rows.sum()))


def check_padfree(device: torch.device, dtype: torch.dtype) -> None:
    """Make "padfree" known to transformers, or refuse with the reason."""
    padfree_peers.check_kernel(torch.empty(0, dtype=dtype, device=device))
    from padfree.integrations.transformers import register

    register()


@dataclass
class Built:
    """A model on one batch: forward() -> what is compared and trained on; `ran` as in a row."""

    module: nn.Module
    forward: Callable[[], Tensor]
    ran: str


@dataclass(frozen=True)
class ModelPeer:
    """One way to run a model.

    `draw(case, attention)` makes it in fp32 with the same random weights for every attention, its first trained parameter
    the token embedding; `on_batch(model, batch, dtype)` gives forward() and what ran. `fast_path` is the operator of a path
    that torch may take in inference.
    """

    name: str
    attention: str
    note: str
    draw: Callable[[ModelCase, str], nn.Module]
    on_batch: Callable[[Any, Batch, torch.dtype], tuple[Callable[[], Tensor], str]]
    compile_mode: str | None = None
    fast_path: str = ""

    def build(self, case: ModelCase, batch: Batch, dtype: torch.dtype) -> Built:
        """The model on a batch; Refused where it cannot run."""
        device = batch.input_ids.device
        if self.attention == "padfree":
            check_padfree(device, dtype)
        if self.attention == "flash_attention_2":
            needs("flash_attn")
        model = self.draw(case, self.attention)
        # The fp64 truth and every other precision start from weights rounded to the same bf16 grid.
        nn.Module.to(nn.Module.to(model, torch.bfloat16), device=device, dtype=dtype)
        call = compiled(model, mode=self.compile_mode) if self.compile_mode else model
        return Built(model, *self.on_batch(call, batch, dtype))


def loss_of(out: Tensor) -> Tensor:
    """A loss that weighs every output differently: no peer can skip work, and a final LayerNorm cannot cancel it."""
    weights = torch.cos(torch.arange(out.numel(), device=out.device)).view_as(out)
    return (out * weights.to(out.dtype)).sum(dtype=torch.promote_types(out.dtype, torch.float32))


def make_call(built: Built, training: bool) -> Call:
    """What is timed: the forward, or a training pass without the optimizer."""
    parameters = [p for p in built.module.parameters() if p.requires_grad]
    if training:
        return lambda: torch.autograd.grad(loss_of(built.forward()), parameters, allow_unused=True)
    return torch.no_grad()(built.forward)


def answers(built: Built, training: bool) -> list[Tensor]:
    """The output, and for training the gradient of the token embedding, in fp64."""
    built.module.eval()
    with torch.set_grad_enabled(training):
        out = built.forward()
    trained = (parameter for parameter in built.module.parameters() if parameter.requires_grad)
    grads = torch.autograd.grad(loss_of(out), next(trained)) if training else ()
    return [tensor.detach().double() for tensor in (out, *grads)]


def relative_errors(actual: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [float((a - t).norm() / t.norm()) for a, t in zip(actual, truth, strict=True)]


def admits(row: Row, actual: list[Tensor], exact: list[Tensor], own: list[Tensor]) -> bool:
    """Whether the answers are right; the row gets the worst error, and the reason where they are not.

    `exact` answers are the reference model's in fp64, `own` ones its own in the dtype that is timed.
    """
    errors, eps = relative_errors(actual, exact), torch.finfo(DTYPES[row.dtype]).eps
    row.relative_error = math.nan if any(map(math.isnan, errors)) else max(errors)
    # A handful of logits may come out well by chance, so that eps is the least that is expected.
    limits = [limit_of(row.dtype, max(error, eps), LIMITS) for error in relative_errors(own, exact)]
    # `not <=` and not `>`: NaN is wrong too.
    wrong = [(error, limit) for error, limit in zip(errors, limits, strict=True) if not error <= limit]
    if wrong:
        told = ", ".join(f"{error:.1e} (limit {limit:.0e})" for error, limit in wrong)
        row.reason = f"wrong answer, not timed: relative error {told}"
    return not wrong


def run_mode(
    session: Session, case: ModelCase, batch: Batch, peers: list[ModelPeer], reference: ModelPeer, mode: str
) -> list[Row]:
    training, dtype = mode == "training", DTYPES[case.dtype]
    exact, own = (answers(reference.build(case, batch, d), training) for d in (torch.float64, dtype))
    contest, full = Contest(session, batch.tokens), batch.tokens / batch.input_ids.numel()
    for peer in peers:
        with contest.enter(start_row(session.result.suite, case, mode, peer, full)) as row:
            model = peer.build(case, batch, dtype)
            row.ran = model.ran
            if admits(row, answers(model, training), exact, own):
                model.module.train(training)
                call = make_call(model, training)
                if peer.fast_path and not training:
                    taken = profiling.runs_operator(call, peer.fast_path)
                    row.ran += f", fast path {'taken' if taken else 'not taken'} ({peer.fast_path})"
                fill_profile(row, call, session.device)
                if session.device.type == "cuda":
                    row.host_us = issue_us(call)
                row.status, contest.calls[peer.name] = OK, call
                if peer.compile_mode != "reduce-overhead":  # which is a CUDA graph already
                    contest.graphs[peer.name] = functools.partial(make_call, model, training)
    return contest.time()


def run_model_case(
    session: Session, case: ModelCase, peers: list[ModelPeer], reference: ModelPeer, modes: Sequence[str]
) -> Iterator[list[Row]]:
    """Check every model against the reference model in fp64, then time those that passed; the rows mode by mode."""
    batch = make_batch(case.sequence_lengths().tolist(), case.seq, session.device, session.seed)
    for mode in modes:
        yield run_mode(session, case, batch, peers, reference, mode)


def choose_modes(directions: str | None) -> list[str]:
    """inference for forward, training for both; the backward alone is not timed."""
    if directions and "backward" in directions.split(","):
        raise ValueError(
            "direction must be forward (inference) or both (training) of a model, got 'backward'"
        )
    chosen = pick("direction", directions or ",".join(DIRECTIONS), DIRECTIONS)
    return [mode for mode, wanted in (("inference", "forward"), ("training", "both")) if wanted in chosen]


def choose_models(sizes: dict[str, ModelCase], shapes: str | None, dtypes: list[str]) -> list[ModelCase]:
    """The named sizes, or all, in each dtype; ValueError for an unknown name."""
    names = pick("shape", shapes or ",".join(sizes), sizes)
    return [replace(sizes[name], dtype=dtype) for dtype in dtypes for name in names]


def run_models(
    suite: str, options: Namespace, command: list[str], cases: list[ModelCase], peers: list[ModelPeer]
) -> Result:
    """Every chosen peer on every case, against the peer "eager"; on a CPU those that compile only when named."""
    known = {peer.name: peer for peer in peers}
    chosen = [known[name] for name in pick("peer", options.peers or ",".join(known), known)]
    if not options.peers and pick_device().type == "cpu":
        unless_named = refuse(UNLESS_NAMED)
        chosen = [replace(peer, draw=unless_named) if peer.compile_mode else peer for peer in chosen]
    modes = choose_modes(options.directions)
    session = Session(suite, options, command, {case.dtype for case in cases})
    run_case = functools.partial(run_model_case, session, peers=chosen, reference=known["eager"], modes=modes)
    return session.run([(case.id, functools.partial(run_case, case)) for case in cases], len(modes))
