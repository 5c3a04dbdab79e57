"""Small sets of reviews and short runs of the commands, for the tests of the data, the commands and training."""

import csv
import os
import random
from collections.abc import Sequence
from pathlib import Path

# Before any Hugging Face library is imported: no test may reach for the Hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

WORDS = {0: ["awful", "dull", "boring", "worst"], 1: ["great", "superb", "moving", "best"]}
FILLER = [
    "the", "film", "was", "a", "story", "of", "two", "people", "who", "went", "to", "town", "and", "back",
]  # fmt: skip


def make_rows(count: int, seed: int) -> list[tuple[str, int]]:
    """Reviews of 3 to 30 words, half of each label, no two alike."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        label = number % 2
        words = draw.choices(FILLER, k=draw.randint(2, 29)) + draw.choices(WORDS[label], k=1)
        draw.shuffle(words)
        rows.append((" ".join(words) + f" {seed}x{number}", label))
    return rows


def write_csv(
    path: Path,
    rows: Sequence[tuple[str, object]],
    columns: tuple[str, str] = ("text", "label"),
    delimiter: str = ",",
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


def write_reviews(folder: Path, train: int = 40, held_out: int = 10) -> Path:
    """A folder with train.csv, validation.csv and test.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "train.csv", make_rows(train, seed=1))
    write_csv(folder / "validation.csv", make_rows(held_out, seed=2))
    write_csv(folder / "test.csv", make_rows(held_out, seed=3))
    return folder


def train_arguments(dataset: Path, output: Path, *more: str) -> list[str]:
    """imdb-train on a tiny set: 5 batches of 8 an epoch, 2 epochs, a vocabulary of its own."""
    options = {
        "--dataset": str(dataset),
        "--output-dir": str(output),
        "--cache-dir": str(dataset.parent / "cache"),
        "--tokenizer": "train",
        "--vocabulary-size": "120",
        "--max-length": "24",
        "--batch-size": "8",
        "--epochs": "2",
    }
    return ["--cpu", *(word for option in options.items() for word in option), *more]
