"""Whole models side by side: the parts that the encoder and the hf suite share."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from padfree_bench import profiling
from padfree_bench.attention import add_graph, release
from padfree_bench.cases import DTYPES
from padfree_bench.check import LIMITS
from padfree_bench.lengths import make_lengths
from padfree_bench.peers.base import Refused
from padfree_bench.results import NOT_RUN, OK, Row
from padfree_bench.session import Session, first_line
from padfree_bench.timing import Call, measure

# A bf16 model may err as much as the eager model in bf16 does, times this.
BUDGET_FACTOR = 3.0
FIRST_TOKEN, LAST_TOKEN, PAD = 1000, 29000, 0


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
    """Random tokens at the given lengths, padded to seq."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.as_tensor(list(lengths))
    keep = torch.arange(seq) < rows[:, None]
    ids = torch.randint(FIRST_TOKEN, LAST_TOKEN, keep.shape, generator=generator).masked_fill(~keep, PAD)
    labels = torch.randint(0, 2, (len(rows),), generator=generator)
    return Batch(ids.to(device), keep.long().to(device), labels.to(device), int(rows.sum()))


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


def relative(actual: list[Tensor], truth: list[Tensor]) -> float:
    """The worst relative error; NaN where there is one."""
    errors = [float((a - t).norm() / t.norm()) for a, t in zip(actual, truth, strict=True)]
    return float("nan") if any(math.isnan(error) for error in errors) else max(errors)


def run_model_case(
    session: Session, case: ModelCase, peers: list[ModelPeer], reference: ModelPeer, modes: Sequence[str]
) -> list[Row]:
    """Check every model against the reference model in fp64, then time those that passed."""
    lengths = make_lengths(case.lengths, case.batch, case.seq)
    batch = make_batch(lengths.tolist(), case.seq, session.device)
    rows: list[Row] = []
    for mode in modes:
        training = mode == "training"
        truth = answers(reference.build(case, batch, torch.float64), training)
        own_error = relative(answers(reference.build(case, batch, DTYPES[case.dtype]), training), truth)
        limit = max(LIMITS[case.dtype], BUDGET_FACTOR * own_error)
        built: dict[str, Built] = {}
        for peer in peers:
            if peer.only not in (None, mode):
                continue
            row = _start_row(session, case, mode, peer, batch)
            rows.append(row)
            try:
                model = peer.build(case, batch, DTYPES[case.dtype])
                row.ran = model.ran
                row.relative_error = relative(answers(model, training), truth)
                if not row.relative_error <= limit:
                    row.reason = f"wrong answer, not timed: relative error {row.relative_error:.1e} (limit {limit:.0e})"
                    continue
                model.module.train(training)
                _profile(row, CALLS[mode](model), session.device)
                built[peer.name], row.status = model, OK
            except Refused as refusal:
                row.reason = str(refusal)
            except Exception as error:  # noqa: BLE001 - a peer may fail in its own way; the row says how
                row.reason = first_line(error)
        _time(session, mode, built, rows, batch)
        release(session.device)
    return rows


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


def _time(session: Session, mode: str, built: dict[str, Built], rows: list[Row], batch: Batch) -> None:
    of_mode = {row.peer: row for row in rows if row.direction == mode}
    calls: dict[str, Call] = {name: CALLS[mode](model) for name, model in built.items()}
    if session.device.type == "cuda":
        for name, model in built.items():
            if model.capture:
                add_graph(calls, of_mode[name], functools.partial(CALLS[mode], model))
    samples = measure(calls, session.device, session.effort, wall=True)
    for name in built:
        row, sample = of_mode[name], samples[name]
        row.ms_p20, row.ms_p50, row.ms_p80 = sample.p20, sample.p50, sample.p80
        row.repetitions = sample.repetitions
        row.tokens_per_s = batch.tokens / sample.p50 * 1e3
        row.reviews_per_s = len(batch.labels) / sample.p50 * 1e3
        if (graph := samples.get(f"{name} graph")) is not None:
            row.graph_ms = graph.p50


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
