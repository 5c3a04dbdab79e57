"""Small sets of reviews as the splits that a source of them is read into."""

from pathlib import Path
from typing import Any

from imdb_classifier.data.rows import Reading, Split
from imdb_classifier.data.sources import read_source
from tiny_reviews import make_rows

ROWS = make_rows(20, seed=1)


def as_split(rows: list[tuple[str, int]]) -> Split:
    return Split([text for text, _ in rows], [label for _, label in rows])


def read(source: Path, **choices: Any) -> tuple[dict[str, Split], list[str]]:
    reading = Reading(**choices)
    return read_source([str(source)], reading), reading.notes


def write_folders(folder: Path, rows: list[tuple[str, int]]) -> Path:
    """One review a file in neg and pos, numbered so that their names sort as the rows do."""
    for number, (text, label) in enumerate(rows):
        labelled = folder / ("neg", "pos")[label]
        labelled.mkdir(parents=True, exist_ok=True)
        (labelled / f"{number:03}_7.txt").write_text(text, encoding="utf-8")
    return folder
