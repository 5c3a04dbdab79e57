"""`python -m bench train`: the notebook's training loop against ours, on random tokens at IMDB lengths.

A step is zero_grad, forward, loss, backward and Adam. One repetition goes through the same reviews for every
implementation: in random order padded to 400, as the notebook does, or grouped by length.
"""

import functools
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from imdb_classifier.modeling import TextClassifier
from padfree_bench.measuring import profiling
from padfree_bench.measuring.cases import DTYPES, choose_dtypes, pick
from padfree_bench.measuring.lengths import imdb_lengths
from padfree_bench.measuring.results import OK, Result, Row
from padfree_bench.measuring.timing import Effort
from padfree_bench.suites import encoder
from padfree_bench.suites.contenders import Contest, start_row
from padfree_bench.suites.models import Batch, ModelCase, admits, check_padfree, choose_models, make_batch
from padfree_bench.suites.session import Session

# The batches of all sizes are padded to 400, the notebook's max_length.
SIZES = {name: encoder.SIZES[name] for name in ("notebook", "d768")}


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


def make_batches(case: ModelCase, grouped: bool, device: torch.device, seed: int) -> list[Batch]:
    """The reviews of an epoch, the same ones either way."""
    lengths = imdb_lengths(case.batches * case.batch, case.seq)
    if grouped:
        lengths = np.sort(lengths)
    rows = lengths.reshape(case.batches, case.batch).tolist()
    # A random batch of 64 reviews always holds one at the cut: the notebook pads every batch to it.
    widths = [max(row) if grouped else case.seq for row in rows]
    return [make_batch(row, widths[index], device, seed + index) for index, row in enumerate(rows)]


def make_model(case: ModelCase, recipe: Recipe, device: torch.device) -> TextClassifier:
    if recipe.attention == "padfree":
        check_padfree(device, torch.float32)
    model = encoder.draw(case, recipe.attention, recipe.cls_only, dropout_rate=0.1)
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


def run_case(session: Session, case: ModelCase, recipes: list[Recipe]) -> Iterator[list[Row]]:
    """Check a step of every recipe against the notebook's model in fp64, then time the epochs in turn."""
    device, dtype = session.device, DTYPES[case.dtype]
    batches = {grouped: make_batches(case, grouped, device, session.seed) for grouped in (False, True)}
    # From the middle, so that the grouped one is padded less than the random one, and not the shortest.
    probes = {grouped: made[case.batches // 2] for grouped, made in batches.items()}
    reference = make_model(case, RECIPES[0], device)
    own = {grouped: answers(reference, probe, dtype) for grouped, probe in probes.items()}
    reference.double()
    exact = {grouped: answers(reference, probe, torch.float64) for grouped, probe in probes.items()}
    tokens = sum(batch.tokens for batch in batches[False])
    contest = Contest(session, tokens / case.batches, steps=case.batches)
    for recipe in recipes:
        made, probe = batches[recipe.grouped], probes[recipe.grouped]
        full = tokens / sum(batch.input_ids.numel() for batch in made)
        with contest.enter(start_row(session.result.suite, case, "step", recipe, full)) as row:
            model = make_model(case, recipe, device)
            if admits(row, answers(model, probe, dtype), exact[recipe.grouped], own[recipe.grouped]):
                longest = max(made, key=lambda batch: batch.input_ids.shape[1])
                one_step = make_epoch(model, [longest], dtype)
                row.peak_mib = profiling.peak_bytes(one_step, device) / profiling.MIB
                contest.calls[recipe.name] = make_epoch(model, made, dtype)
                row.status, row.ran = OK, f"attn_implementation={recipe.attention}"
    yield contest.time()


def run(options: Namespace, command: list[str]) -> Result:
    """The train suite; one row's time is milliseconds a step, averaged over the batches of an epoch."""
    gpu = torch.cuda.is_available()
    known = {recipe.name: recipe for recipe in RECIPES}
    recipes = [known[name] for name in pick("peer", options.peers or ",".join(known), known)]
    names = options.shapes or (None if gpu else "notebook")
    dtypes = choose_dtypes(options.dtypes, "bf16,fp32" if gpu else "fp32")
    batch, batches = (64, 20) if gpu else (16, 4) if options.quick else (64, 8)
    cases = [replace(case, batch=batch, batches=batches) for case in choose_models(SIZES, names, dtypes)]
    session = Session("train", options, command, set(dtypes))
    seconds = 10 if options.quick else 20 if gpu else 60
    session.effort = Effort(seconds, least=5, most=15, warmup=1, at_most_seconds=2 * seconds)
    return session.run([(case.id, functools.partial(run_case, session, case, recipes)) for case in cases])
