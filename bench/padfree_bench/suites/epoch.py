"""`python -m bench epoch`: an epoch of real reviews and the classification of as many, the notebook's loops against ours.

Tokens lie in the host's memory when the clock starts, and metrics when it stops. The notebook's epoch is three passes: it
trains, then counts right answers on the training reviews and on as many held out, in eval mode under no_grad. Ours trains,
counting as it goes, and evaluates those held out.
"""

import functools
from argparse import Namespace
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import send_to_device

from imdb_classifier.data.batches import Collator, ReviewBatches, TokenizedReviews, make_loader
from imdb_classifier.data.sources import read_source
from imdb_classifier.data.tokenization import check_tokenizer, encode, load_tokenizer
from imdb_classifier.messages import UserError
from imdb_classifier.training.inference import evaluate
from imdb_classifier.training.launcher import make_accelerator
from padfree_bench.measuring.cases import DTYPES, choose_dtypes, pick
from padfree_bench.measuring.results import OK, Result, Row
from padfree_bench.measuring.timing import Effort
from padfree_bench.suites.contenders import Contest, start_row
from padfree_bench.suites.models import PAD, ModelCase, admits, choose_models
from padfree_bench.suites.notebook_model import accuracy
from padfree_bench.suites.recipes import RECIPES, Recipe, collator, make_trainee, order
from padfree_bench.suites.session import Session
from padfree_bench.suites.train import REFERENCE, SIZES, Training, answers, autocast

VOCABULARY, BATCH = 30522, 64
PEERS = ("notebook", "ours-sdpa", "ours-padfree")
DIRECTIONS = ("epoch", "predict")
# Reviews to train on, as many held out, and a batch of these for the check.
Reviews = tuple[TokenizedReviews, TokenizedReviews, TokenizedReviews]


@dataclass
class Loops:
    """A recipe's model on its way through the reviews."""

    training: Training
    case: ModelCase
    reviews: Reviews
    accelerator: Any
    epochs: int = 0

    def __post_init__(self) -> None:
        self.watch, self.model = self.training.watch, self.training.trainee.module
        if self.watch is not None:
            self.model = self.accelerator.prepare_model(self.model)

    def epoch(self) -> None:
        recipe, self.epochs = self.training.recipe, self.epochs + 1
        rows = order(self.case, recipe, self.reviews[0], seed=0, epoch=self.epochs)
        # The notebook's tokenizer pads to the longest of a batch.
        collate = collator(self.case, recipe) if self.watch is not None else Collator(PAD, self.case.seq)
        loader = make_loader(self.reviews[0], rows, collate)
        self.model.train()
        if self.watch is not None:
            self.watch.start_epoch(0.0, 0, 0, 0)
        self.training.epoch(
            send_to_device(batch, self.accelerator.device, non_blocking=True) for batch in loader
        )
        if self.watch is not None:
            self.watch.read()
        else:
            self.accuracy(self.reviews[0], shuffle=True)
        self.predict()

    def predict(self) -> None:
        """What one wants to know of the held-out reviews: the share of right answers."""
        if self.watch is not None:
            self.evaluate(self.reviews[1])
        else:
            self.accuracy(self.reviews[1])

    @torch.no_grad()
    def accuracy(self, data: TokenizedReviews, shuffle: bool = False) -> float:
        """As in the notebook's cell."""
        rows = ReviewBatches(data.lengths, BATCH, shuffle=shuffle, group_by_length=False)
        loader = make_loader(data, rows, Collator(PAD, self.case.seq))
        self.model.eval()
        with autocast(self.accelerator.device, self.training.dtype):
            return accuracy(self.model, loader, self.accelerator.device)

    def evaluate(self, data: TokenizedReviews) -> torch.Tensor:
        """The logits of all reviews."""
        return evaluate(self.model, data, self.accelerator, batch_size=BATCH).z


def run_case(
    session: Session,
    case: ModelCase,
    recipes: list[Recipe],
    reviews: Reviews,
    chosen: Collection[str] = DIRECTIONS,
) -> Iterator[list[Row]]:
    """Check a step and a batch's logits against the notebook's model in fp64, then time epochs and predictions."""
    device, dtype = session.device, DTYPES[case.dtype]
    accelerator = make_accelerator(case.dtype, cpu=device.type == "cpu")
    probe = reviews[2].__getitems__(range(len(reviews[2])))
    batch_of = lambda recipe: send_to_device(collator(case, recipe)(probe), device)
    reference, padded = make_trainee(case, REFERENCE, device), batch_of(REFERENCE)
    own = answers(reference, padded, dtype)
    reference.module.double()
    exact = answers(reference, padded, torch.float64)
    # The logits again, of the loop that predicts.
    own, exact = [*own, own[0]], [*exact, exact[0]]
    for direction in chosen:
        counted = reviews[:2] if direction == "epoch" else reviews[1:2]
        tokens, number = (sum(map(len, each)) for each in ([data.ids for data in counted], counted))
        contest = Contest(session, tokens)
        for recipe in recipes:
            full = tokens / (number * case.seq)
            with contest.enter(start_row(session.result.suite, case, direction, recipe, full)) as row:
                trainee = make_trainee(case, recipe, device)
                found = answers(trainee, batch_of(recipe), dtype)
                loops = Loops(Training(recipe, trainee, dtype), case, reviews, accelerator)
                if loops.watch is not None:
                    found.append(loops.evaluate(reviews[2]).to(found[0]))
                if admits(row, found, exact[: len(found)], own[: len(found)]):
                    row.status, row.ran = OK, trainee.attention
                    contest.calls[recipe.name] = getattr(loops, direction)
        yield contest.time(functools.partial(fill_reviews, len(reviews[1])))


def fill_reviews(number: int, timed: list[Row]) -> None:
    """Reviews a second: of an epoch those that it trains on, of predictions those predicted."""
    for row in timed:
        row.reviews_per_s = number / (row.ms_p50 or 0.0) * 1e3


def read_reviews(options: Namespace, seq: int, seed: int) -> Reviews:
    """The file's reviews in random order, one half to train on and the other held out, each of `--limit` at most."""
    split = read_source([options.reviews])["train"]
    number = min(len(split) if options.limit is None else options.limit, len(split) // 2)
    if number < 2:
        raise ValueError(
            f"an epoch needs 4 reviews or more, {options.reviews} and --limit leave {2 * number}"
        )
    rows = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[: 2 * number].tolist()
    tokenizer = load_tokenizer(options.tokenizer, seq)
    check_tokenizer(tokenizer, options.tokenizer, VOCABULARY)
    if tokenizer.pad_token_id != PAD:
        raise ValueError(
            f"--tokenizer must pad with id {PAD}, got one that pads with {tokenizer.pad_token_id}"
        )
    ids = encode(tokenizer, [split.texts[row] for row in rows], seq)
    labels = [split.labels[row] for row in rows]
    parts = (slice(number), slice(number, None), slice(number, number + BATCH))
    trained, held_out, few = (TokenizedReviews.from_lists(ids[part], labels[part]) for part in parts)
    return trained, held_out, few


def run(options: Namespace, command: list[str]) -> Result:
    """The epoch suite; a row's time is a whole epoch, or all predictions."""
    gpu = torch.cuda.is_available()
    recipes = [
        recipe for recipe in RECIPES if recipe.name in pick("peer", options.peers or ",".join(PEERS), PEERS)
    ]
    dtypes = choose_dtypes(options.dtypes, "bf16" if gpu else "fp32")
    if len(dtypes) > 1:
        raise ValueError(f"accelerate takes one dtype a process, got {options.dtypes}")
    session = Session("epoch", options, command, dtypes)
    cases = choose_models(SIZES, options.shapes or "notebook", dtypes)
    try:
        reviews = read_reviews(options, cases[0].seq, session.seed)
    except UserError as error:
        raise ValueError(str(error)) from None
    cases = [replace(case, batch=BATCH, batches=-(-len(reviews[0]) // BATCH)) for case in cases]
    seconds = 1 if options.quick else 60
    session.effort = Effort(seconds, least=3, most=9, warmup=1, at_most_seconds=2 * seconds)
    chosen = pick("direction", options.directions or ",".join(DIRECTIONS), DIRECTIONS)
    measure = functools.partial(run_case, session, recipes=recipes, reviews=reviews, chosen=chosen)
    return session.run([(case.id, functools.partial(measure, case)) for case in cases], len(chosen))
