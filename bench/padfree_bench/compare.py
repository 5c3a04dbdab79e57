"""`python -m bench compare A.json B.json`: what got slower from A to B beyond noise.

Either side may be several runs, `A1.json,A2.json`: each case's interval then spans all of them, since one machine
measures differently from hour to hour, by more than the spread within a run.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from padfree_bench.results import Result, Row, load

# Medians of two runs on one machine differ by a few percent without any change of code.
THRESHOLD = 0.05
MUST_AGREE = ("device", "torch_threads", "cuda")


@dataclass(frozen=True)
class Change:
    """One case in both files. `slower` and `faster` mean: by more than the threshold and than both intervals."""

    before: Row
    after: Row
    threshold: float = THRESHOLD

    @property
    def ratio(self) -> float:
        assert self.before.ms_p50 is not None and self.after.ms_p50 is not None
        return self.after.ms_p50 / self.before.ms_p50

    @property
    def slower(self) -> bool:
        assert self.before.ms_p80 is not None and self.after.ms_p20 is not None
        return self.ratio > 1 + self.threshold and self.after.ms_p20 > self.before.ms_p80

    @property
    def faster(self) -> bool:
        assert self.before.ms_p20 is not None and self.after.ms_p80 is not None
        return self.ratio < 1 / (1 + self.threshold) and self.after.ms_p80 < self.before.ms_p20


def changes(before: Result, after: Result, threshold: float = THRESHOLD) -> list[Change]:
    """Every case that both files have timed, by (case, direction, peer)."""
    first = {row.key[1:]: row for row in before.rows if row.timed}
    return [
        Change(first[row.key[1:]], row, threshold) for row in after.rows if row.timed and row.key[1:] in first
    ]


def together(runs: list[Result]) -> Result:
    """Several runs as one: each case at the median of its medians, its interval from the least p20 to the most p80."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in (row for run in runs for row in run.rows):
        found.setdefault(row.key[1:], []).append(row)
    rows = []
    for same in found.values():
        missing = [row for row in same if not row.timed]
        rows.append(missing[0] if missing else _hull(same))
    return replace(runs[0], rows=rows)


def _hull(rows: list[Row]) -> Row:
    return replace(
        rows[0],
        ms_p20=min(row.ms_p20 or 0.0 for row in rows),
        ms_p50=median(row.ms_p50 or 0.0 for row in rows),
        ms_p80=max(row.ms_p80 or 0.0 for row in rows),
    )


def load_all(paths: str) -> Result:
    """One side of a comparison: result files by path, with commas between several; ValueError names a bad one."""
    return together([load(Path(path)) for path in paths.split(",")])


def lost(before: Result, after: Result) -> list[Row]:
    """Rows of `after` that have no figure any more although `before` had one."""
    had = {row.key[1:] for row in before.rows if row.timed}
    return [row for row in after.rows if not row.timed and row.key[1:] in had]


def differences(before: Result, after: Result) -> list[str]:
    """What makes the two files hard to compare."""
    return [
        f"{name} differs: {before.environment.get(name)} and {after.environment.get(name)}"
        for name in MUST_AGREE
        if before.environment.get(name) != after.environment.get(name)
    ]


def describe(change: Change) -> str:
    before, after = change.before, change.after
    return (
        f"{after.case} {after.direction} {after.peer}: {before.ms_p50:.4g} [{before.ms_p20:.4g}, {before.ms_p80:.4g}]"
        f" -> {after.ms_p50:.4g} [{after.ms_p20:.4g}, {after.ms_p80:.4g}] ms ({change.ratio - 1:+.0%})"
    )


def main(argv: list[str]) -> int:
    """Exit status 1 when something got slower or lost its figure, 2 when the files cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    parser.add_argument(
        "before", metavar="A.json", help="the result file before the change, or several by comma"
    )
    parser.add_argument("after", metavar="B.json", help="the one after it, or several")
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, help="smallest change that counts (0.05)"
    )
    options = parser.parse_args(argv)
    try:
        before, after = load_all(options.before), load_all(options.after)
    except ValueError as error:
        print(f"python -m bench compare: {error}", file=sys.stderr)
        return 2
    for line in differences(before, after):
        print(f"note: {line}")
    found = changes(before, after, options.threshold)
    if not found:
        print("python -m bench compare: the files have no timed case in common", file=sys.stderr)
        return 2
    slower = [change for change in found if change.slower]
    faster = [change for change in found if change.faster]
    gone = lost(before, after)
    for title, lines in (
        ("slower", [describe(change) for change in slower]),
        ("no figure any more", [f"{row.case} {row.direction} {row.peer}: {row.reason}" for row in gone]),
        ("faster", [describe(change) for change in faster]),
    ):
        if lines:
            print(f"{title}:", *(f"  {line}" for line in lines), sep="\n")
    print(f"{len(found)} cases compared: {len(slower)} slower, {len(faster)} faster, {len(gone)} lost")
    return 1 if slower or gone else 0
