"""`python -m bench compare A.json B.json`: what got slower from A to B beyond noise.

Either side may be several runs, `A1.json,A2.json`: each case's interval then spans all of them, since one machine
measures differently from hour to hour, by more than the spread within a run.
"""

import argparse
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from padfree_bench.measuring.results import SECOND_WAVE, Result, Row, load

# Medians of two runs on one machine differ by a few percent without any change of code.
THRESHOLD = 0.05
MACHINE = ("device", "cpu", "torch_threads", "cuda")


@dataclass(frozen=True)
class Change:
    """One case in both files. `slower` and `faster` mean: by more than the threshold and than both intervals."""

    before: Row
    after: Row
    threshold: float = THRESHOLD

    @property
    def ratio(self) -> float:
        return _times(self.after)[1] / _times(self.before)[1]

    @property
    def slower(self) -> bool:
        return self.ratio > 1 + self.threshold and _times(self.after)[0] > _times(self.before)[2]

    @property
    def faster(self) -> bool:
        return self.ratio < 1 / (1 + self.threshold) and _times(self.after)[2] < _times(self.before)[0]

    def __str__(self) -> str:
        (low, time, high), (new_low, new_time, new_high) = _times(self.before), _times(self.after)
        name = f"{self.after.case} {self.after.direction} {self.after.peer}"
        before, after = (
            f"{time:.4g} [{low:.4g}, {high:.4g}]",
            f"{new_time:.4g} [{new_low:.4g}, {new_high:.4g}]",
        )
        return f"{name}: {before} -> {after} ms ({self.ratio - 1:+.0%})"


def _times(row: Row) -> tuple[float, float, float]:
    """(p20, median, p80) of a row that was timed."""
    assert row.ms_p20 is not None and row.ms_p50 is not None and row.ms_p80 is not None
    return row.ms_p20, row.ms_p50, row.ms_p80


def changes(before: Result, after: Result, threshold: float = THRESHOLD) -> list[Change]:
    """Every case that both files have timed, by (case, direction, peer)."""
    first = {row.key[1:]: row for row in before.rows if row.usable}
    rows = (row for row in after.rows if row.usable and row.key[1:] in first)
    return [Change(first[row.key[1:]], row, threshold) for row in rows]


def together(runs: list[Result]) -> Result:
    """Several runs as one: each case at the median of its medians, its interval from the least p20 to the most p80."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in (row for run in runs for row in run.rows):
        found.setdefault(row.key[1:], []).append(row)
    rows = []
    for same in found.values():
        merged = next((row for row in same if not row.usable), None)
        if merged is None:
            low, middle, high = zip(*map(_times, same), strict=True)
            merged = replace(same[0], ms_p20=min(low), ms_p50=median(middle), ms_p80=max(high))
        rows.append(merged)
    return replace(runs[0], rows=rows, not_reached=[name for run in runs for name in run.not_reached])


def lost(before: Result, after: Result) -> tuple[list[str], list[str]]:
    """(without a figure any more, not reached in time) of the rows that `before` had timed and `after` has not."""
    now = {row.key[1:]: row for row in after.rows}
    gone, unreached = [], []
    for row in before.rows:
        other = now.get(row.key[1:])
        if not row.usable or (other is not None and other.usable):
            continue
        name = f"{row.case} {row.direction} {row.peer}"
        if other is None and row.case + (SECOND_WAVE if row.wave == 2 else "") in after.not_reached:
            unreached.append(name)
        else:
            gone.append(f"{name}: {other.reason if other else 'not in the file'}")
    return gone, unreached


def differences(runs: list[Result]) -> dict[str, str]:
    """By name, in what these runs differ that they must share before a difference between them is one of the code.

    Where no GPU ran, another CPU is another device.
    """
    facts = {name: [run.environment.get(name) for run in runs] for name in MACHINE}
    facts["torch"] = [run.environment["versions"].get("torch") for run in runs]
    found = {name: list(dict.fromkeys(map(str, values))) for name, values in facts.items()}
    differing = {name: " and ".join(values) for name, values in found.items() if len(values) > 1}
    if "cpu" in differing and runs[0].environment.get("device_type") == "cpu":
        differing.setdefault("device", differing["cpu"])
    return differing


def main(argv: list[str]) -> int:
    """Exit status 1 when something got slower, lost its figure or was not reached, 2 when nothing can be compared."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    several = "the result file before the change, or several by comma"
    parser.add_argument("before", metavar="A.json", help=several)
    parser.add_argument("after", metavar="B.json", help="the one after it, or several")
    smallest = "smallest change that counts (0.05)"
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help=smallest)
    options = parser.parse_args(argv)
    try:
        if not 0 <= options.threshold < math.inf:
            raise ValueError(f"threshold must be a share of at least 0, got {options.threshold}")
        sides = [[load(Path(path)) for path in side.split(",")] for side in (options.before, options.after)]
        differing = differences([run for side in sides for run in side])
        if "device" in differing:
            raise ValueError(f"the files are of different devices: {differing['device']}")
        before, after = map(together, sides)
        found = changes(before, after, options.threshold)
        if not found:
            raise ValueError("the files have no timed case in common")
    except ValueError as error:
        print(f"python -m bench compare: {error}", file=sys.stderr)
        return 2
    for name, values in differing.items():
        print(f"note: {name} differs: {values}")
    return tell(found, *lost(before, after))


def tell(found: list[Change], gone: list[str], unreached: list[str]) -> int:
    """Print what came out and return the exit status."""
    slower = [str(change) for change in found if change.slower]
    faster = [str(change) for change in found if change.faster]
    titles = ("slower", "no figure any more", "not reached within the time given", "faster")
    for title, lines in zip(titles, (slower, gone, unreached, faster), strict=True):
        if lines:
            print(f"{title}:", *(f"  {line}" for line in lines), sep="\n")
    counts = f"{len(slower)} slower, {len(faster)} faster, {len(gone)} lost, {len(unreached)} not reached"
    print(f"{len(found)} cases compared: {counts}")
    return 1 if slower or gone or unreached else 0
