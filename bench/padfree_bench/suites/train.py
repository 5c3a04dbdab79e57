"""`python -m bench train`: the notebook's training loop and what each of our levers adds to it, on IMDB lengths.

A step is zero_grad, forward, loss, backward and Adam, and what the host asks for after it. One repetition takes every
recipe of `recipes.py` through the same random reviews, which lie on the device before the clock starts.
"""

import functools
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from imdb_classifier.training.graphs import GraphedStep
from imdb_classifier.training.inference import graphs_compiled
from imdb_classifier.training.watch import STEPS_BETWEEN_READS, Watch
from padfree_bench.measuring import profiling
from padfree_bench.measuring.cases import DTYPES, choose_dtypes, pick
from padfree_bench.measuring.results import OK, Result, Row
from padfree_bench.measuring.timing import Effort, issue_us
from padfree_bench.peers import Refused
from padfree_bench.suites import encoder
from padfree_bench.suites.contenders import Contest, start_row
from padfree_bench.suites.models import UNLESS_NAMED, ModelCase, admits, choose_models
from padfree_bench.suites.recipes import (
    RECIPES,
    Inputs,
    Recipe,
    Trainee,
    draw_reviews,
    make_batches,
    make_trainee,
)
from padfree_bench.suites.session import Session

# The batches of all sizes are padded to 400, the notebook's max_length.
SIZES = {name: encoder.SIZES[name] for name in ("notebook", "d768")}
REFERENCE = RECIPES[0]


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """What a step runs in below fp32; fp64 and fp32 as they are."""
    return torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16))


def answers(trainee: Trainee, inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """z, loss and all gradients of a step without dropout, as it will be timed."""
    trainee.module.eval()
    with autocast(inputs["labels"].device, dtype):
        loss, logits = trainee.forward(inputs)
    z = logits if logits.ndim == 1 else logits[:, 1] - logits[:, 0]
    # Gradients in one vector: some have no size of their own to be measured by, such as that of a key's bias, which is 0.
    return [part.detach().double() for part in (z, loss, trainee.gradients(loss))]


@dataclass
class Training:
    """A model with its optimizer and what its recipe wants to know."""

    recipe: Recipe
    trainee: Trainee
    dtype: torch.dtype
    optimizer: torch.optim.Adam = field(init=False)
    watch: Watch | None = field(init=False, default=None)
    steps: int = field(init=False, default=0)
    # `take`, or what replays it.
    issue: Callable[[Inputs], None] = field(init=False)

    def __post_init__(self) -> None:
        module, recipe = self.trainee.module, self.recipe
        options: dict[str, Any] = {"fused": True} if recipe.fused else {}
        options |= {"capturable": True} if recipe.graphs else {}
        self.optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, **options)
        if not recipe.waits:
            self.watch = Watch(self.optimizer, module.named_parameters())
        self.issue = GraphedStep(self.take) if recipe.graphs else self.take
        module.train()

    def take(self, inputs: Inputs) -> None:
        """A step, with which the host is done before the device is."""
        self.optimizer.zero_grad()
        with autocast(inputs["labels"].device, self.dtype):
            loss, logits = self.trainee.forward(inputs)
        loss.backward()
        if self.watch is not None:
            self.watch.look(loss, logits, inputs["labels"])
        self.optimizer.step()
        self.loss = loss.detach()

    def settle(self) -> None:
        """What the host asks for after a step."""
        self.steps += 1
        if self.watch is None:
            self.loss.item()
        elif self.steps % STEPS_BETWEEN_READS == 0:
            self.watch.read()

    def epoch(self, batches: Iterable[Inputs]) -> None:
        for inputs in batches:
            self.issue(inputs)
            self.settle()


def fill_row(row: Row, training: Training, batches: list[Inputs], device: torch.device) -> None:
    """All figures of a row but its times: memory, and on a GPU launches, waits and the host's time, of a step each."""
    before = graphs_compiled()
    training.epoch(batches)  # compiles what is compiled, a shape at a time
    row.ran = training.trainee.attention
    if training.recipe.compile_mode:
        row.ran += f", {graphs_compiled() - before} graphs compiled"
    largest = max(batches, key=lambda inputs: inputs["input_ids"].numel())
    row.peak_mib = profiling.peak_bytes(lambda: training.epoch([largest]), device) / profiling.MIB
    if device.type == "cuda":
        profiling.fill_launches(row, lambda: training.epoch(batches), steps=len(batches))
        row.host_us = issue_us(lambda: training.issue(batches[len(batches) // 2]))


def run_case(
    session: Session, case: ModelCase, recipes: list[Recipe], may_compile: bool = True
) -> Iterator[list[Row]]:
    """Check a step of every recipe against the notebook's model in fp64, then time the epochs in turn."""
    device, dtype = session.device, DTYPES[case.dtype]
    data = draw_reviews(case, session.seed)
    made = functools.partial(make_batches, case, data=data, device=device, seed=session.seed)
    # Of the middle width, so that the grouped one is padded less than the random one, and not the shortest.
    middle, exact, own = dict[bool, int](), dict[bool, list[Tensor]](), dict[bool, list[Tensor]]()
    for grouped in (False, True):
        batches = made(replace(REFERENCE, grouped=grouped))
        by_width = sorted(range(len(batches)), key=lambda index: batches[index]["input_ids"].shape[1])
        middle[grouped] = by_width[len(batches) // 2]
        probe, reference = batches[middle[grouped]], make_trainee(case, REFERENCE, device)
        own[grouped] = answers(reference, probe, dtype)
        reference.module.double()
        exact[grouped] = answers(reference, probe, torch.float64)
    tokens = len(data.ids)
    contest = Contest(session, tokens / case.batches, steps=case.batches)
    for recipe in recipes:
        batches, grouped = made(recipe), recipe.grouped
        full = tokens / sum(inputs["input_ids"].numel() for inputs in batches)
        with contest.enter(start_row(session.result.suite, case, "step", recipe, full)) as row:
            trainee = make_trainee(case, recipe, device)
            if recipe.compile_mode and not may_compile:
                raise Refused(UNLESS_NAMED)
            if admits(row, answers(trainee, batches[middle[grouped]], dtype), exact[grouped], own[grouped]):
                training = Training(recipe, trainee, dtype)
                fill_row(row, training, batches, device)
                contest.calls[recipe.name] = functools.partial(training.epoch, batches)
                row.status = OK
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
    seconds = 10 if options.quick or gpu else 60
    session.effort = Effort(seconds, least=5, most=15, warmup=1, at_most_seconds=2 * seconds)
    measure = functools.partial(run_case, session, recipes=recipes, may_compile=gpu or bool(options.peers))
    return session.run([(case.id, functools.partial(measure, case)) for case in cases])
