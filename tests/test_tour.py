"""docs/tour.md leads to the lines it names: a station that moved or was renamed fails here."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOUR = ROOT / "docs" / "tour.md"
STATION = re.compile(r"\[`(?P<name>\w+)`\]\(\.\./(?P<path>[\w/.]+)#L(?P<line>\d+)\)")


def line_of(path: str, name: str) -> int:
    """Where the file defines the function or class.

    Raises:
        LookupError: it does not
    """
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node.lineno
    raise LookupError(f"{path} defines no {name}")


def written_anew(text: str) -> str:
    """The page with every station's line as it is today."""
    return STATION.sub(lambda m: f"[`{m['name']}`](../{m['path']}#L{line_of(m['path'], m['name'])})", text)


def test_every_station_of_the_tour_is_where_the_page_says() -> None:
    text = TOUR.read_text(encoding="utf-8")
    assert len(STATION.findall(text)) >= 30
    assert text.count("](") == len(STATION.findall(text)), "a link that this test does not check"
    assert written_anew(text) == text, "run `python tests/test_tour.py`"


def test_a_station_that_is_gone_is_noticed() -> None:
    with pytest.raises(LookupError, match=r"api\.py defines no attend_twice"):
        written_anew("[`attend_twice`](../kernels/padfree/api.py#L1)")


if __name__ == "__main__":
    TOUR.write_text(written_anew(TOUR.read_text(encoding="utf-8")), encoding="utf-8")
