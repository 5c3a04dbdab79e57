"""Labels as people write them, all read as 0 = negative or 1 = positive."""

from typing import Any

# Also the names of the folders that hold one review a file.
WORDS = {"neg": 0, "negative": 0, "pos": 1, "positive": 1}
EXPECTED = "0 or 1, neg or pos, negative or positive, false or true"
_KNOWN = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, **WORDS}
# -1 is what the Hub gives reviews that nobody labelled.
_MISSING = ("", "nan", "null", "-1", "-1.0")


def read_label(label: Any) -> int | None:
    """0 or 1, or None where there is no label: null, NaN, "" or -1. Upper case and white space around do not count.

    Raises:
        ValueError: the label is none of those.
    """
    if label is None:
        return None
    written = str(label).strip().lower() if isinstance(label, str | int | float) else "of another type"
    if written in _MISSING:
        return None
    if written not in _KNOWN:
        raise ValueError(f"expected {EXPECTED}")
    return _KNOWN[written]


def by_class_name(label: Any, names: list[str] | None) -> Any:
    """A class number as the word it stands for, where the data set says so: its 0 may mean positive.

    Names that are no words for the two labels say nothing: Yelp's classes 0 and 1 are called "1" and "2".
    """
    if names is None or not all(name.lower() in WORDS for name in names):
        return label
    return names[label] if isinstance(label, int) and 0 <= label < len(names) else label
