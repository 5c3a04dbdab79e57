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
    first = {row.key[1:]: row for row in before.rows if row.usable}
    return [
        Change(first[row.key[1:]], row, threshold)
        for row in after.rows
        if row.usable and row.key[1:] in first
    ]


def together(runs: list[Result]) -> Result:
    """Several runs as one: each case at the median of its medians, its interval from the least p20 to the most p80."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in (row for run in runs for row in run.rows):
        found.setdefault(row.key[1:], []).append(row)
    rows = []
    for same in found.values():
        missing = [row for row in same if not row.usable]
        rows.append(missing[0] if missing else _hull(same))
    return replace(runs[0], rows=rows, not_reached=[name for run in runs for name in run.not_reached])


def _hull(rows: list[Row]) -> Row:
    return replace(
        rows[0],
        ms_p20=min(row.ms_p20 or 0.0 for row in rows),
        ms_p50=median(row.ms_p50 or 0.0 for row in rows),
        ms_p80=max(row.ms_p80 or 0.0 for row in rows),
    )


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


def machine_facts(result: Result) -> dict[str, object]:
    """What two runs must share before a difference between them is one of the code."""
    facts = {name: result.environment.get(name) for name in ("device", "cpu", "torch_threads", "cuda")}
    return facts | {"torch": result.environment["versions"].get("torch")}


def differences(runs: list[Result]) -> dict[str, str]:
    """By name, the machine facts in which these runs differ. Where no GPU ran, another CPU is another device."""
    facts = [machine_facts(run) for run in runs]
    found = {name: list(dict.fromkeys(str(each[name]) for each in facts)) for name in facts[0]}
    differing = {name: " and ".join(values) for name, values in found.items() if len(values) > 1}
    if "cpu" in differing and runs[0].environment.get("device_type") == "cpu":
        differing.setdefault("device", differing["cpu"])
    return differing


def describe(change: Change) -> str:
    before, after = change.before, change.after
    return (
        f"{after.case} {after.direction} {after.peer}: {before.ms_p50:.4g} [{before.ms_p20:.4g}, {before.ms_p80:.4g}]"
        f" -> {after.ms_p50:.4g} [{after.ms_p20:.4g}, {after.ms_p80:.4g}] ms ({change.ratio - 1:+.0%})"
    )


def main(argv: list[str]) -> int:
    """Exit status 1 when something got slower, lost its figure or was not reached, 2 when nothing can be compared."""
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
    slower = [change for change in found if change.slower]
    faster = [change for change in found if change.faster]
    for title, lines in (
        ("slower", [describe(change) for change in slower]),
        ("no figure any more", gone),
        ("not reached within the time given", unreached),
        ("faster", [describe(change) for change in faster]),
    ):
        if lines:
            print(f"{title}:", *(f"  {line}" for line in lines), sep="\n")
    counts = f"{len(slower)} slower, {len(faster)} faster, {len(gone)} lost, {len(unreached)} not reached"
    print(f"{len(found)} cases compared: {counts}")
    return 1 if slower or gone or unreached else 0
