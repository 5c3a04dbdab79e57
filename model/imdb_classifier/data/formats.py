"""The forms that reviews have on a disk: tables, JSON, parquet, and folders with one review a file."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from imdb_classifier.data.rows import LABEL_WORDS, Reading, Row, Split, by_class_name, read_label, show
from imdb_classifier.messages import UserError

FORMS = (".parquet", ".csv", ".tsv", ".json", ".jsonl")
EXPECTED_NAMES = f"{', '.join(FORMS)}, or one of the last four and .gz"
DELIMITERS = {".csv": ",", ".tsv": "\t"}


def form_of(path: Path) -> str | None:
    """Which of `FORMS` a file has by its name, without a .gz behind; None for another kind of file."""
    form = Path(path.name.lower().removesuffix(".gz")).suffix
    return form if form in FORMS else None


def is_hidden(name: str) -> bool:
    """Whether a file or folder is what editors, notebooks and archivers leave behind, and not somebody's data."""
    return name.startswith((".", "~$", "__MACOSX")) or name.endswith("~")


def labelled_folders(path: Path) -> list[Path]:
    """The folders pos and neg in a folder that holds one review a file, as Stanford's does; none in any other path."""
    folders = path.iterdir() if path.is_dir() else ()
    return sorted(folder for folder in folders if folder.name.lower() in LABEL_WORDS and folder.is_dir())


def read_file(path: Path, reading: Reading) -> Split:
    """Read and check one file with a column of texts and one of labels, or one folder with pos and neg.

    Raises UserError if it is none of the forms, cannot be read, or holds what is no review.
    """
    if folders := labelled_folders(path):
        reading.refuse_columns(str(path))
        return reading.split(str(path), _folder_rows(folders))
    form = form_of(path)
    if form is None:
        raise UserError(f"{path}: is no data file, expected one ending in {EXPECTED_NAMES}")
    if path.is_dir():
        raise UserError(f"{path}: is a directory, expected a file")
    _check_regular(path)
    if form == ".parquet":
        return reading.split(str(path), _parquet_rows(path, reading))
    content = decode(str(path), _read(path))
    if not content.strip():
        raise UserError(f"{path}: is empty, expected reviews")
    if form in DELIMITERS:
        return reading.split(str(path), _table_rows(path, content, DELIMITERS[form], reading))
    return reading.split(str(path), _json_rows(path, content, reading))


def _check_regular(path: Path) -> None:
    # Opening a pipe waits for somebody to write into it.
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no regular file, expected one")


def _folder_rows(folders: Sequence[Path]) -> Iterator[Row]:
    """The .txt files in neg and pos in the order of their names; other folders, such as unsup, hold no labels."""
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if path.name.endswith(".txt") and not is_hidden(path.name):
                _check_regular(path)
                yield str(path), decode(str(path), _read(path)), folder.name


def _read(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.name.lower().endswith(".gz") else raw
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: cannot be read as gzip: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def decode(name: str, raw: bytes, line: int = 1) -> str:
    """UTF-8 with or without a byte order mark; UserError, opened by `name` and the line, if it is not.

    `line` is the number of the first line in `raw`; only at the front of line 1 there is a byte order mark.
    """
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        # Counted in `error.object`, which begins behind the byte order mark.
        line += error.object.count(b"\n", 0, error.start)
        byte = f"{error.object[error.start]:#04x}"
        raise UserError(f"{name}:{line}: byte {byte} is not UTF-8, expected UTF-8 text") from None


def decode_lines(name: str, lines: Iterable[bytes]) -> Iterator[str]:
    """`decode` for a file that is open in binary, which is read in blocks: its lines one by one, without the newline."""
    # A byte that is a newline is never a part of another letter in UTF-8, so each line stands for itself.
    for number, raw in enumerate(lines, start=1):
        yield decode(name, raw, number).removesuffix("\n")


def _table_rows(path: Path, content: str, delimiter: str, reading: Reading) -> Iterator[Row]:
    (first, _, header), *lines = _parse_table(path, content, delimiter)
    text, label = reading.columns(f"{path}:{first}", header)
    text_at, label_at = header.index(text), header.index(label)
    for line, last_line, cells in lines:
        where = f"{path}:{line}"
        if len(cells) != len(header):
            lost = f", which ends in line {last_line}: a lost quotation mark?" if last_line > line else ""
            raise UserError(f"{where}: row has {len(cells)} cells, expected {len(header)}{lost}")
        for cell in cells:
            if cell.count("\n") > 1 and _count_rows(cell, delimiter, len(header), label_at) > 1:
                raise UserError(
                    f"{where}: text runs over whole rows to line {last_line}, expected a quotation mark at its end"
                )
        yield where, cells[text_at], cells[label_at]


def _parse_table(path: Path, content: str, delimiter: str) -> list[tuple[int, int, list[str]]]:
    """The header and the rows, as (first line, last line, cells)."""
    # Kaggle's labeledTrainData.tsv writes a quotation mark in a text as \", others double it.
    escape = "\\" if delimiter == "\t" and '\\"' in content else None
    file = io.StringIO(content, newline="")
    reader = csv.reader(file, delimiter=delimiter, escapechar=escape, strict=True)
    rows, line = [], 1
    # One for the whole process; only as long as no other code runs.
    limit_before = csv.field_size_limit(len(content))
    try:
        for cells in reader:
            # A blank line is no row.
            if cells:
                rows.append((line, reader.line_num, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        if "unexpected end" in str(error):
            fault = "a quotation mark in this row is never closed, expected one at the end of the text"
        else:
            fault = (
                f"a quotation mark opens in this row and closes in line {reader.line_num} with text behind it, "
                "expected it at the end of the text, or doubled inside"
            )
        raise UserError(f"{path}:{line}: {fault}") from None
    finally:
        csv.field_size_limit(limit_before)
    return rows


def _count_rows(cell: str, delimiter: str, columns: int, label_at: int) -> int:
    """How many lines of a cell look like whole rows: two lost quotation marks make one cell of what is between."""
    count = 0
    for cells in (line.split(delimiter) for line in cell.splitlines()):
        with suppress(ValueError):
            count += len(cells) == columns and read_label(cells[label_at]) is not None
    return count


class _Record(dict[str, Any]):
    """A JSON object that remembers all its names, also one that stands twice."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        self.names = [name for name, _ in pairs]


def _json_rows(path: Path, content: str, reading: Reading) -> Iterator[Row]:
    """Objects one a line, or one array of objects; a name that an object lacks is a value that is missing."""
    records = list(_json_records(path, content))
    if not records:
        return
    every_name = dict.fromkeys(name for _, record in records for name in record)
    text, label = reading.columns(records[0][0], list(every_name))
    for where, record in records:
        if len(record.names) > len(record):
            reading.columns(where, [*record.names, *(every_name.keys() - record.keys())])
        yield where, record.get(text), record.get(label)


def _json_records(path: Path, content: str) -> Iterator[tuple[str, _Record]]:
    is_array = content.lstrip().startswith("[")
    documents = [(0, content)] if is_array else list(enumerate(content.split("\n"), start=1))
    for line, document in documents:
        if not document.strip():
            continue
        where = f"{path}:{max(line, 1)}"
        try:
            parsed = json.loads(document, object_pairs_hook=_Record)
        except json.JSONDecodeError as error:
            fault = f"{path}:{max(line, error.lineno)}: {error.msg} at column {error.colno}, expected JSON"
            if _is_spread_object(content):
                fault = f"{path}: holds a JSON object over several lines, expected one object a line or an array of objects"
            raise UserError(fault) from None
        except RecursionError:
            raise UserError(f"{where}: JSON is nested too deeply, expected flat objects") from None
        except ValueError:
            # Python reads no integer of more than 4,300 digits.
            raise UserError(f"{where}: a number has too many digits, expected 0 or 1") from None
        for row, record in enumerate(parsed if is_array else [parsed], start=1):
            where = f"{path}:{row if is_array else line}"
            if not isinstance(record, _Record):
                raise UserError(f"{where}: {show(record)} is no object, expected one with text and label")
            yield where, record


def _is_spread_object(content: str) -> bool:
    """Whether a file begins with an object that does not end in its line, as pretty printing makes it."""
    start = len(content) - len(content.lstrip())
    try:
        value, end = json.JSONDecoder().raw_decode(content, start)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "\n" in content[start:end]


def _parquet_rows(path: Path, reading: Reading) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    if path.name.lower().endswith(".gz"):
        raise UserError(f"{path}: is parquet inside gzip, expected plain parquet: unpack it")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = reading.columns(str(path), file.schema_arrow.names)
            class_names = _class_names(file.schema_arrow.metadata, names[1])
            table = file.read(columns=names)
        texts, labels = (table[name].to_pylist() for name in names)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        # The last two where a value, such as a date, has no counterpart in Python.
        raise UserError(f"{path}: cannot be read as parquet: {str(error).splitlines()[0]}") from None
    for row, (text, label) in enumerate(zip(texts, labels, strict=True), start=1):
        yield f"{path}:{row}", text, by_class_name(label, class_names)


def _class_names(metadata: dict[bytes, bytes] | None, column: str) -> list[str] | None:
    """What the classes 0, 1, ... are called, where the package datasets wrote it into the file."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[column]["names"]]
    except (KeyError, ValueError, TypeError):
        return None
