"""Train, validation and test: what a source lacks is carved by a fixed seed, what looks wrong is said."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from imdb_classifier.data.rows import Reading, Split
from imdb_classifier.data.sources import read_source
from imdb_classifier.messages import UserError, warn

# Constants, not options: training and a later evaluation must carve the very same reviews.
SPLIT_SEED = 20_000
VALIDATION_FRACTION = 0.1
TEST_FRACTION = 0.2


@dataclass
class Reviews:
    """The three splits, and `notes`: what was read, and carved from what, one line each, for the run's log."""

    train: Split
    validation: Split
    test: Split
    notes: list[str]

    def by_name(self) -> dict[str, Split]:
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def fingerprint(self) -> str:
        """SHA-256 over every text and label, in order."""
        digest = hashlib.sha256()
        for split in self.by_name().values():
            digest.update(json.dumps([split.texts, split.labels]).encode())
        return digest.hexdigest()


def load_reviews(names: Sequence[str], limit: int | None = None, reading: Reading | None = None) -> Reviews:
    """Read a source (see `sources.read_source`) and complete its splits (see `complete_splits`)."""
    reading = reading or Reading()
    reviews = complete_splits(read_source(names, reading), " ".join(names), limit)
    reviews.notes[:0] = reading.notes
    return reviews


def load_split(
    names: Sequence[str], wanted: str, limit: int | None = None, reading: Reading | None = None
) -> Split:
    """One split of a source, as training would carve it, or "all" of its reviews, whatever split they are in.

    A source without training reviews may hold the split alone. Raises UserError where there is no such split, or it
    lacks one of the two labels.
    """
    splits, source = read_source(names, reading), " ".join(names)
    if wanted == "all":
        splits = {"all": Split.joined(splits.values())}
    if "train" in splits or wanted not in splits:
        return complete_splits(splits, source, limit).by_name()[wanted]
    _check_labels(splits, source)
    return splits[wanted] if limit is None else _limit(splits[wanted], limit)


def complete_splits(splits: dict[str, Split], source: str, limit: int | None = None) -> Reviews:
    """Carve the splits that are missing, check the classes, warn of leaks, and cut each split to `limit`.

    A missing test or validation split is carved from the training reviews with a fixed seed, as many of each
    label as in the whole. A text that occurs twice is never carved, so it cannot stand on both sides.

    Raises UserError where there is no training split, or a split lacks one of the two labels.
    """
    splits, notes = dict(splits), []
    if "train" not in splits:
        raise UserError(f"{source}: has no training split, expected one named train")
    _check_labels(splits, source)
    for name, fraction in (("test", TEST_FRACTION), ("validation", VALIDATION_FRACTION)):
        if name not in splits:
            before = len(splits["train"])
            splits["train"], splits[name] = _carve(splits["train"], fraction, source)
            carved = f"{len(splits[name]):,} of {before:,}"
            notes.append(f"no {name} split: {carved} training reviews held out (fixed seed)")
    _warn_of_leaks(splits)
    if limit is not None:
        splits = {name: _limit(split, limit) for name, split in splits.items()}
    return Reviews(splits["train"], splits["validation"], splits["test"], notes)


def _check_labels(splits: dict[str, Split], source: str) -> None:
    for name, split in splits.items():
        missing = {0, 1} - set(split.labels)
        if missing:
            raise UserError(f"{source}: no review in {name} has label {min(missing)}, expected both labels")


def _carve(split: Split, fraction: float, source: str) -> tuple[Split, Split]:
    """(rest, held out): `fraction` of each label, at least one, drawn among the texts that occur once."""
    occurrences = Counter(split.texts)
    held_out: set[int] = set()
    for label in (0, 1):
        rows = [row for row, other in enumerate(split.labels) if other == label]
        once = [row for row in rows if occurrences[split.texts[row]] == 1]
        if len(once) < 2:
            found = f"{len(once)} different training reviews have label {label}"
            raise UserError(f"{source}: {found}, expected at least 2 to hold one out")
        wanted = min(max(1, int(len(rows) * fraction)), len(once) // 2)
        held_out.update(random.Random(SPLIT_SEED + label).sample(once, wanted))
    return split.take(row for row in range(len(split)) if row not in held_out), split.take(sorted(held_out))


def _limit(split: Split, limit: int) -> Split:
    """At most `limit` reviews, half of each label as far as they reach; sources are sorted by label."""
    rows_of = {label: [row for row, other in enumerate(split.labels) if other == label] for label in (0, 1)}
    for label, rows in rows_of.items():
        random.Random(SPLIT_SEED + label).shuffle(rows)
    positive = min(len(rows_of[1]), max(limit // 2, limit - len(rows_of[0])))
    return split.take(sorted(rows_of[1][:positive] + rows_of[0][: limit - positive]))


def _warn_of_leaks(splits: dict[str, Split]) -> None:
    trained_on = set(splits["train"].texts)
    for name in ("validation", "test"):
        leaked = sum(text in trained_on for text in splits[name].texts)
        if leaked:
            warn(f"{leaked:,} of {len(splits[name]):,} {name} reviews also stand in train, word for word")
