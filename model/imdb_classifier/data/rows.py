"""Rows become reviews: labels become 0 or 1; rows without a text or a label are left out, counted and told.

A row is (where, text, label). `where` opens every message about it, `file:row`: a line of a CSV or JSON Lines file,
a 1-based row elsewhere.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from imdb_classifier.messages import UserError, warn

Row = tuple[str, Any, Any]
# The Hub's names and Kaggle's; the first that a file has is taken.
TEXT_COLUMNS = ("text", "review")
LABEL_COLUMNS = ("label", "sentiment")

# Also the names of the folders that hold one review a file.
LABEL_WORDS = {"neg": 0, "negative": 0, "pos": 1, "positive": 1}
EXPECTED_LABELS = "0 or 1, neg or pos, negative or positive, false or true"
_KNOWN_LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, **LABEL_WORDS}
# -1 is what the Hub gives reviews that nobody labelled.
_MISSING_LABELS = ("", "nan", "null", "-1", "-1.0")


def read_label(label: Any) -> int | None:
    """0 or 1, or None where there is no label: null, NaN, "" or -1; ValueError for anything else.

    Upper case and white space around do not count.
    """
    written = str(label).strip().lower() if isinstance(label, str | int | float) else "of another type"
    if label is None or written in _MISSING_LABELS:
        return None
    if written not in _KNOWN_LABELS:
        raise ValueError(f"expected {EXPECTED_LABELS}")
    return _KNOWN_LABELS[written]


def by_class_name(label: Any, names: Sequence[str] | None) -> Any:
    """A class number as the word it stands for, where the data set says so: its 0 may mean positive.

    Names that are no words for the two labels say nothing: Yelp's classes 0 and 1 are called "1" and "2".
    """
    if names is None or not all(name.lower() in LABEL_WORDS for name in names):
        return label
    return names[label] if isinstance(label, int) and 0 <= label < len(names) else label


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

    @classmethod
    def joined(cls, parts: Iterable["Split"]) -> "Split":
        whole = cls()
        for part in parts:
            whole.texts += part.texts
            whole.labels += part.labels
        return whole


@dataclass
class Reading:
    """How a source is read, and what was found on the way.

    Args:
        text_column, label_column: their names; None takes the usual ones.
        strict: refuse a row without a text or a label instead of leaving it out.

    Attributes:
        notes: what a run's log should say of the source, one line each.
    """

    text_column: str | None = None
    label_column: str | None = None
    strict: bool = False
    notes: list[str] = field(default_factory=list)
    _label_of: dict[str, int] = field(default_factory=dict)
    _rows: int = 0
    _skipped: list[str] = field(default_factory=list)

    def columns(self, where: str, names: Sequence[str]) -> tuple[str, str]:
        """Which of a file's columns hold the texts and the labels; UserError unless there is one of each."""
        text = _column(where, names, "--text-column", self.text_column, TEXT_COLUMNS)
        label = _column(where, names, "--label-column", self.label_column, LABEL_COLUMNS)
        if text == label:
            raise UserError(f"--text-column and --label-column both name {text}, expected two columns")
        if (text, label) != (TEXT_COLUMNS[0], LABEL_COLUMNS[0]):
            self.note(f"columns: {text} and {label}")
        return text, label

    def refuse_columns(self, source: str) -> None:
        """Raise UserError if columns were named for a source that has none to choose from."""
        if self.text_column is not None or self.label_column is not None:
            fault = "has no columns to choose from, leave out --text-column and --label-column"
            raise UserError(f"{source}: {fault}")

    def note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    def split(self, name: str, rows: Iterable[Row]) -> Split:
        """The reviews of one file, folder or Hub split.

        Raises UserError if a row cannot be used, more than half have no text or no label, or there are none.
        """
        rows, split, skipped = list(rows), Split(), list[str]()
        for where, text, label in rows:
            number = self._read_label(where, label)
            if _is_missing(text):
                fault, expected = f"{where}: text is empty", "a review"
            elif number is None:
                fault, expected = f"{where}: label is {show(label)}", EXPECTED_LABELS
            else:
                check_text(where, text)
                split.texts.append(text)
                split.labels.append(number)
                continue
            if self.strict:
                raise UserError(f"{fault}, expected {expected}")
            skipped.append(fault)
        if not rows:
            raise UserError(f"{name}: holds no reviews, expected at least one row")
        if len(skipped) > len(rows) / 2:
            raise UserError(
                f"{name}: {len(skipped):,} of {len(rows):,} rows have no text or no label, expected at most half; "
                f"the first is {skipped[0]}"
            )
        self._rows += len(rows)
        self._skipped += skipped
        return split

    def _read_label(self, where: str, label: Any) -> int | None:
        try:
            number = read_label(label)
        except ValueError as error:
            raise UserError(f"{where}: label is {show(label)}, {error}") from None
        if number is not None:
            self._label_of[f'"{label.strip()}"' if isinstance(label, str) else repr(label)] = number
        return number

    def finish(self) -> None:
        """After the last row: note how labels were read, and warn of rows that were left out."""
        written = sorted(self._label_of.items(), key=lambda item: (item[1], item[0]))
        if any(name.strip('"') not in ("0", "1") for name, _ in written):
            self.note(f"labels: {', '.join(f'{name} = {number}' for name, number in written)}")
        if self._skipped:
            warn(
                f"{len(self._skipped):,} of {self._rows:,} rows have no text or no label and are left out "
                f"(--strict-data refuses them); the first is {self._skipped[0]}"
            )


def _column(where: str, names: Sequence[str], option: str, asked: str | None, usual: Sequence[str]) -> str:
    wanted = usual if asked is None else (asked,)
    found = next((name for name in wanted if name in names), None)
    if found is None:
        shown = show(", ".join(map(str, names)))
        hint = f"; name it by {option}" if asked is None else ""
        raise UserError(f"{where}: no column named {' or '.join(wanted)}, got {shown}{hint}")
    if names.count(found) > 1:
        raise UserError(f"{where}: more than one column named {found}, expected one")
    return found


def _is_missing(text: Any) -> bool:
    if isinstance(text, str):
        return not text.strip()
    # pandas keeps a missing text as NaN.
    return text is None or (isinstance(text, float) and math.isnan(text))


def check_text(where: str, text: Any) -> None:
    """Raise UserError, opened by `where`, unless the text is a string that a tokenizer can take."""
    if not isinstance(text, str):
        raise UserError(f"{where}: text is {show(text)}, expected a string")
    if "\0" in text:
        raise UserError(f"{where}: text holds a NUL byte, expected plain text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: text holds half a surrogate pair, expected valid Unicode") from None


def show(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
