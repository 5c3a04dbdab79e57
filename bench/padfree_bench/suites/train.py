"""`python -m bench train`: the notebook's training loop against ours, on random tokens at IMDB lengths.

A step is zero_grad, forward, loss, backward and Adam. One repetition goes through the same reviews for every
implementation: in random order padded to 400, as the notebook does, or grouped by length.
"""

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from imdb_classifier.modeling import TextClassifier, TextClassifierConfig
from padfree_bench.measuring import profiling
from padfree_bench.measuring.cases import DTYPES, choose_dtypes
from padfree_bench.measuring.clocks import Watch
from padfree_bench.measuring.errors import first_line
from padfree_bench.measuring.lengths import imdb_lengths
from padfree_bench.measuring.machine import pick_device
from padfree_bench.measuring.results import NOT_RUN, OK, Result, Row
from padfree_bench.measuring.timing import Call, Effort, measure
from padfree_bench.peers.base import Refused
from padfree_bench.suites.encoder import check_padfree
from padfree_bench.suites.models import Batch, Gate, make_batch, make_edge_loud
from padfree_bench.suites.session import Session

MAX_LENGTH = 400
PRESETS: dict[str, dict[str, Any]] = {
    "notebook": {"d_model": 32, "n_heads": 4, "dff": 32, "n_layers": 2},
    "d768": {"d_model": 768, "n_heads": 12, "dff": 3072, "n_layers": 2},
}


@dataclass(frozen=True)
class Recipe:
    """One way to train: which attention, whether the last layer computes row 0 only, how batches are made."""

    name: str
    attention: str
    cls_only: bool
    grouped: bool
    note: str


RECIPES = [
    Recipe("notebook", "eager", False, False, "eager attention, random order, padded to 400"),
    Recipe("sdpa", "sdpa", False, False, "only the attention exchanged"),
    Recipe("sdpa+cls", "sdpa", True, False, "and the last layer for row 0 only"),
    Recipe("ours-sdpa", "sdpa", True, True, "and batches grouped by length"),
    Recipe("padfree+cls", "padfree", True, False, "fused attention, random order, last layer for row 0 only"),
    Recipe(
        "ours-padfree", "padfree", True, True, "fused attention, last layer for row 0 only, grouped by length"
    ),
]


def make_batches(count: int, size: int, grouped: bool, device: torch.device, seed: int) -> list[Batch]:
    """The same reviews either way: `count` batches of `size`."""
    lengths = imdb_lengths(count * size, MAX_LENGTH)
    if grouped:
        lengths = np.sort(lengths)
    rows = lengths.reshape(count, size)
    # A random batch of 64 reviews always holds one at the cut: the notebook pads every batch to 400.
    widths = rows.max(axis=1) if grouped else np.full(count, MAX_LENGTH)
    return [
        make_batch(row.tolist(), int(width), device, seed + index)
        for index, (row, width) in enumerate(zip(rows, widths, strict=True))
    ]


def make_model(preset: str, recipe: Recipe, device: torch.device) -> TextClassifier:
    if recipe.attention == "padfree":
        check_padfree(device, torch.float32)
    config = TextClassifierConfig(
        max_length=MAX_LENGTH, cls_only_last_layer=recipe.cls_only, **PRESETS[preset]
    )
    config._attn_implementation = recipe.attention
    torch.manual_seed(0)
    model = TextClassifier(config)
    make_edge_loud(model.embedding.weight)
    model.to(device)  # type: ignore[arg-type] # transformers' wrapper hides nn.Module.to
    return model


def answers(model: TextClassifier, batch: Batch, dtype: torch.dtype) -> list[torch.Tensor]:
    """Logits, loss and all gradients of a step without dropout, as it will be timed: under autocast below fp32."""
    model.eval()
    with torch.autocast(batch.input_ids.device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        out = model(batch.input_ids, batch.attention_mask, labels=batch.labels)
    grads = torch.autograd.grad(out.loss, list(model.parameters()))
    # In one vector: some have no size of their own to be measured by, such as that of a key's bias, which is zero.
    parts = (out.logits.detach(), out.loss.detach(), torch.cat([grad.flatten() for grad in grads]))
    return [part.double() for part in parts]


def make_epoch(model: TextClassifier, batches: list[Batch], dtype: torch.dtype) -> Callable[[], None]:
    """One pass over the batches with an optimizer step each."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()

    def epoch() -> None:
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(batch.input_ids.device.type, dtype, enabled=dtype != torch.float32):
                loss = model(batch.input_ids, batch.attention_mask, labels=batch.labels).loss
            loss.backward()
            optimizer.step()

    return epoch


def run_case(
    session: Session, preset: str, dtype_name: str, size: int, count: int, recipes: list[Recipe]
) -> list[Row]:
    """Check a step of every recipe against the notebook's model in fp64, then time the epochs in turn."""
    device, dtype = session.device, DTYPES[dtype_name]
    batches = {grouped: make_batches(count, size, grouped, device, session.seed) for grouped in (False, True)}
    # From the middle, so that the grouped one is padded less than the random one, and not the shortest.
    probes = {grouped: made[count // 2] for grouped, made in batches.items()}
    reference = make_model(preset, RECIPES[0], device)
    own = {grouped: answers(reference, probe, dtype) for grouped, probe in probes.items()}
    reference.double()
    gates = {
        grouped: Gate.of(answers(reference, probe, torch.float64), own[grouped], dtype_name)
        for grouped, probe in probes.items()
    }
    epochs: dict[str, Call] = {}
    rows: list[Row] = []
    for recipe in recipes:
        row = _start_row(session, preset, dtype_name, size, batches[recipe.grouped], recipe)
        rows.append(row)
        try:
            model = make_model(preset, recipe, device)
            if not gates[recipe.grouped].admits(row, answers(model, probes[recipe.grouped], dtype)):
                continue
            longest = max(batches[recipe.grouped], key=lambda batch: batch.input_ids.shape[1])
            row.peak_mib = profiling.peak_bytes(make_epoch(model, [longest], dtype), device) / profiling.MIB
            epochs[recipe.name] = make_epoch(model, batches[recipe.grouped], dtype)
            row.status, row.ran = OK, f"attn_implementation={recipe.attention}"
        except Refused as refusal:
            row.reason = str(refusal)
        except Exception as error:  # noqa: BLE001 - a recipe may fail in its own way; the row says how
            row.reason = first_line(error)
    tokens = sum(batch.tokens for batch in batches[False])
    watch = Watch({"case": case_id(preset, size, count, dtype_name), "direction": "step"})
    samples = measure(epochs, device, session.effort, wall=True, watch=watch)
    if watch.readings:
        session.result.clocks.append(watch.entry)
    for name, sample in samples.items():
        row = next(row for row in rows if row.peer == name)
        row.ms_p20, row.ms_p50, row.ms_p80 = sample.p20 / count, sample.p50 / count, sample.p80 / count
        row.repetitions = sample.repetitions
        row.tokens_per_s = tokens / sample.p50 * 1e3
        row.reviews_per_s = size * count / sample.p50 * 1e3
        if watch.remark:
            row.remark(watch.remark)
    return rows


def case_id(preset: str, size: int, count: int, dtype: str) -> str:
    return f"{preset}-B{size}-S{MAX_LENGTH}-{count}-batches-{dtype}"


def _start_row(
    session: Session, preset: str, dtype: str, size: int, batches: list[Batch], recipe: Recipe
) -> Row:
    sizes = PRESETS[preset]
    padded = sum(batch.input_ids.numel() for batch in batches)
    return Row(
        suite=session.result.suite,
        case=case_id(preset, size, len(batches), dtype),
        group=preset,
        direction="step",
        peer=recipe.name,
        status=NOT_RUN,
        note=recipe.note,
        dtype=dtype,
        batch=size,
        heads=sizes["n_heads"],
        head_dim=sizes["d_model"] // sizes["n_heads"],
        seq=MAX_LENGTH,
        lengths="imdb",
        valid_fraction=sum(batch.tokens for batch in batches) / padded,
    )


def run(options: argparse.Namespace, command: list[str]) -> Result:
    """The train suite; one row's time is milliseconds a step, averaged over the batches of an epoch."""
    device = pick_device()
    known = {recipe.name: recipe for recipe in RECIPES}
    for name in options.peers.split(",") if options.peers else ():
        if name not in known:
            raise ValueError(f"peer must be one of {', '.join(known)}, got {name!r}")
    recipes = [known[name] for name in options.peers.split(",")] if options.peers else RECIPES
    gpu = device.type == "cuda"
    presets = (options.shapes or ("notebook,d768" if gpu else "notebook")).split(",")
    for preset in presets:
        if preset not in PRESETS:
            raise ValueError(f"shape must be one of {', '.join(PRESETS)}, got {preset!r}")
    dtypes = choose_dtypes(options.dtypes, "bf16,fp32" if gpu else "fp32")
    size, count = (64, 20) if gpu else (16, 4) if options.quick else (64, 8)
    session = Session("train", options, command, set(dtypes))
    seconds = 10 if options.quick else 20 if gpu else 60
    session.effort = Effort(seconds, least=5, most=15, warmup=1, at_most_seconds=2 * seconds)
    return session.run(
        (
            case_id(preset, size, count, dtype),
            functools.partial(run_case, session, preset, dtype, size, count, recipes),
        )
        for dtype in dtypes
        for preset in presets
    )
