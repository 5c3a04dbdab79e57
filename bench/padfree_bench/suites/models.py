"""Whole models side by side: the parts that the encoder and the hf suite share."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from padfree_bench.measuring import profiling
from padfree_bench.measuring.cases import DTYPES
from padfree_bench.measuring.check import limit_of
from padfree_bench.measuring.clocks import Watch
from padfree_bench.measuring.errors import first_line
from padfree_bench.measuring.lengths import make_lengths
from padfree_bench.measuring.results import NOT_RUN, OK, Row
from padfree_bench.measuring.timing import Call, measure
from padfree_bench.peers.base import Refused
from padfree_bench.suites.attention import add_graph, fill_times
from padfree_bench.suites.contenders import release
from padfree_bench.suites.session import Session

# Never more than this: a model adds up the rounding of its layers, and an answer of zeros errs by 1.
LIMITS = {"fp32": 1e-4, "fp16": 5e-2, "bf16": 0.2}
FIRST_TOKEN, LAST_TOKEN = 1000, 29000
# What stands on the two sides of the mask's edge: the last token of every review, and its padding.
EDGE, PAD = 999, 0


@dataclass(frozen=True)
class ModelCase:
    """One model size on one padded batch of token ids."""

    name: str
    width: int
    heads: int
    ffn: int
    layers: int
    batch: int
    seq: int
    dtype: str
    lengths: str = "imdb"

    @property
    def id(self) -> str:
        return f"{self.name}-B{self.batch}-S{self.seq}-{self.lengths}-{self.dtype}"


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


def make_edge_loud(embedding: Tensor, loudness: float = 8.0) -> None:
    """Scale embeddings [V, E] of variance 1 that the model multiplies by sqrt(E), so that a wrong mask shows in bf16.

    Left alone they drive softmax to one key and the gradients' rounding to 70 %, in which any error would hide; then
    the tokens on both sides of the mask's edge are raised, so that one key too many or too few changes every row.
    """
    with torch.no_grad():
        embedding *= embedding.shape[1] ** -0.5
        embedding[[PAD, EDGE]] *= loudness


@dataclass
class Built:
    """A model on one batch: forward() -> what is compared and trained on; `probe` is a parameter all peers share."""

    module: torch.nn.Module
    forward: Callable[[], Tensor]
    probe: Tensor
    ran: str = ""
    # False where the call is a CUDA graph already.
    capture: bool = True


@dataclass(frozen=True)
class ModelPeer:
    """build(case, batch, dtype) -> Built, or Refused with the reason."""

    name: str
    build: Callable[[ModelCase, Batch, torch.dtype], Built]
    note: str = ""
    slow_to_compile: bool = False
    only: str | None = None


def loss_of(out: Tensor) -> Tensor:
    """A loss that weighs every output differently: no peer can skip work, and a final LayerNorm cannot cancel it."""
    weights = torch.cos(torch.arange(out.numel(), device=out.device)).view_as(out)
    return (out * weights.to(out.dtype)).sum(dtype=torch.promote_types(out.dtype, torch.float32))


def training_call(built: Built) -> Call:
    parameters = [p for p in built.module.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(loss_of(built.forward()), parameters, allow_unused=True)


def inference_call(built: Built) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            return built.forward()

    return call


CALLS = {"inference": inference_call, "training": training_call}


def answers(built: Built, training: bool) -> list[Tensor]:
    """The output, and for training the gradient of the shared parameter, in fp64."""
    built.module.eval()
    if not training:
        with torch.no_grad():
            return [built.forward().double()]
    out = built.forward()
    (grad,) = torch.autograd.grad(loss_of(out), built.probe)
    return [out.detach().double(), grad.double()]


def relative_errors(actual: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [float((a - t).norm() / t.norm()) for a, t in zip(actual, truth, strict=True)]


@dataclass(frozen=True)
class Gate:
    """The exact answers, and the relative error that each of them may have."""

    truth: list[Tensor]
    limits: list[float]

    @classmethod
    def of(cls, truth: list[Tensor], own: list[Tensor], dtype: str) -> "Gate":
        """`own`: what the reference model answers in the dtype that is timed."""
        # A handful of logits may come out well by chance, so that eps is the least that is expected.
        expected = [max(error, torch.finfo(DTYPES[dtype]).eps) for error in relative_errors(own, truth)]
        return cls(truth, [limit_of(dtype, error, LIMITS) for error in expected])

    def admits(self, row: Row, actual: list[Tensor]) -> bool:
        """Whether the answers are right; the row gets the worst error, and the reason where they are not."""
        errors = relative_errors(actual, self.truth)
        row.relative_error = float("nan") if any(map(math.isnan, errors)) else max(errors)
        # `not <=` and not `>`: NaN is wrong too.
        wrong = [(e, limit) for e, limit in zip(errors, self.limits, strict=True) if not e <= limit]
        if wrong:
            told = ", ".join(f"{error:.1e} (limit {limit:.0e})" for error, limit in wrong)
            row.reason = f"wrong answer, not timed: relative error {told}"
        return not wrong


def run_model_case(
    session: Session, case: ModelCase, peers: list[ModelPeer], reference: ModelPeer, modes: Sequence[str]
) -> Iterator[list[Row]]:
    """Check every model against the reference model in fp64, then time those that passed; the rows mode by mode."""
    lengths = make_lengths(case.lengths, case.batch, case.seq)
    batch = make_batch(lengths.tolist(), case.seq, session.device, session.seed)
    for mode in modes:
        rows: list[Row] = []
        training = mode == "training"
        truth = answers(reference.build(case, batch, torch.float64), training)
        own = answers(reference.build(case, batch, DTYPES[case.dtype]), training)
        gate = Gate.of(truth, own, case.dtype)
        built: dict[str, Built] = {}
        for peer in peers:
            if peer.only not in (None, mode):
                continue
            row = _start_row(session, case, mode, peer, batch)
            rows.append(row)
            try:
                model = peer.build(case, batch, DTYPES[case.dtype])
                row.ran = model.ran
                if not gate.admits(row, answers(model, training)):
                    continue
                model.module.train(training)
                _profile(row, CALLS[mode](model), session.device)
                built[peer.name], row.status = model, OK
            except Refused as refusal:
                row.reason = str(refusal)
            except Exception as error:  # noqa: BLE001 - a peer may fail in its own way; the row says how
                row.reason = first_line(error)
        _time(session, case, mode, built, rows, batch)
        release(session.device)
        yield rows


def _start_row(session: Session, case: ModelCase, mode: str, peer: ModelPeer, batch: Batch) -> Row:
    return Row(
        suite=session.result.suite,
        case=case.id,
        group=case.name,
        direction=mode,
        peer=peer.name,
        status=NOT_RUN,
        note=peer.note,
        dtype=case.dtype,
        batch=case.batch,
        heads=case.heads,
        head_dim=case.width // case.heads,
        seq=case.seq,
        lengths=case.lengths,
        valid_fraction=batch.tokens / (case.batch * case.seq),
    )


def _profile(row: Row, call: Call, device: torch.device) -> None:
    row.peak_mib = profiling.peak_bytes(call, device) / profiling.MIB
    if device.type == "cuda":
        profiling.fill_launches(row, call)


def _time(
    session: Session, case: ModelCase, mode: str, built: dict[str, Built], rows: list[Row], batch: Batch
) -> None:
    of_mode = {row.peer: row for row in rows}
    calls: dict[str, Call] = {name: CALLS[mode](model) for name, model in built.items()}
    if session.device.type == "cuda":
        for name, model in built.items():
            if model.capture:
                add_graph(calls, of_mode[name], functools.partial(CALLS[mode], model))
    watch = Watch({"case": case.id, "direction": mode})
    samples = measure(calls, session.device, session.effort, wall=True, watch=watch)
    if watch.readings:
        session.result.clocks.append(watch.entry)
    for name in built:
        row, sample = of_mode[name], samples[name]
        fill_times(row, samples)
        row.tokens_per_s = batch.tokens / sample.p50 * 1e3
        row.reviews_per_s = len(batch.labels) / sample.p50 * 1e3
        if watch.remark:
            row.remark(watch.remark)


def choose_model_peers(peers: list[ModelPeer], names: str | None, device: torch.device) -> list[ModelPeer]:
    """The named ones, or all; on a CPU those that compile take part only when named.

    Raises:
        ValueError: an unknown name; the message lists them.
    """
    known = {peer.name: peer for peer in peers}
    if names is not None:
        for name in names.split(","):
            if name not in known:
                raise ValueError(f"peer must be one of {', '.join(known)}, got {name!r}")
        return [known[name] for name in names.split(",")]
    return [_unless_slow(peer) if device.type == "cpu" else peer for peer in peers]


def _unless_slow(peer: ModelPeer) -> ModelPeer:
    def refuse(case: ModelCase, batch: Batch, dtype: torch.dtype) -> Built:
        raise Refused("compiles C++ on a CPU: name it with --peers to run it")

    return replace(peer, build=refuse) if peer.slow_to_compile else peer
