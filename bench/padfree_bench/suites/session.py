"""One run of one suite: its deadline, its progress, and a result file that is whole after every case."""

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from padfree_bench.measuring import clocks, machine
from padfree_bench.measuring.ceilings import Ceilings, measure_ceilings
from padfree_bench.measuring.errors import DeviceLost, out_of_memory
from padfree_bench.measuring.results import (
    NOT_RUN,
    Result,
    Row,
    by_reason,
    cell,
    counted,
    fault_line,
    grouped,
    save,
    to_json,
)
from padfree_bench.measuring.timing import Effort, own_stream

# A tune.json whose accepted rows come before the table's own, in this process.
TUNED_ROWS = "PADFREE_TUNED_ROWS"
MAIN_COLUMNS = (
    "peer",
    "time",
    "graph_ms",
    "tflops",
    "tokens_per_s",
    "reviews_per_s",
    "fraction",
    "peak_mib",
    "extra_mib",
    "launches",
    "syncs",
    "relative_error",
)


# What a case gives: its rows, or its rows part by part.
Parts = list[Row] | Iterable[list[Row]]


class Session:
    """Holds the options every suite shares and collects rows.

    The result is saved after each part of a case, so that a run that is stopped keeps what it had measured. One
    seed a run draws all inputs: a kernel that is right for one draw only does not stay unseen.
    """

    def __init__(
        self, suite: str, options: argparse.Namespace, command: list[str], dtypes: Iterable[str]
    ) -> None:
        refuse_to_replace(options)
        self.options = options
        self.device = machine.pick_device()
        self.effort = Effort.of(options.quick)
        self.deadline = time.monotonic() + options.minutes * 60 if options.minutes else float("inf")
        name = f"{suite}-{options.label}" if options.label else suite
        self.result = Result(name, machine.environment(self.device, command), quick=options.quick)
        self.seed: int = random.randrange(2**31) if options.seed is None else options.seed
        self.result.environment["seed"] = self.seed
        if tuned := os.environ.get(TUNED_ROWS):
            from padfree_bench.tuning.tune import apply_rows

            self.result.environment["tuned_rows"] = apply_rows(Path(tuned)) if Path(tuned).is_file() else []
        if load := machine.busy(self.result.environment):
            print(f"this machine is busy ({load}): its figures say little", file=sys.stderr)
        slug = machine.device_slug(self.device)
        self.folder = Path(options.output) / (f"{slug}-quick" if options.quick else slug)
        self.ceilings: Ceilings = measure_ceilings(self.device, set(dtypes))
        self.lost: DeviceLost | None = None

    def run(self, cases: Iterable[tuple[str, Callable[[], Parts]]], directions: int = 1) -> Result:
        """Measure each (name, function that gives its rows) until done or out of time; then print the table.

        `directions` are timed one by one in each case, 0 where nothing is timed.
        """
        todo = list(cases)
        print(
            ahead(self.result.suite, len(todo), directions, self.effort, self.options.minutes),
            file=sys.stderr,
        )
        with (
            own_stream(self.device),
            tqdm(todo, desc=self.result.suite, file=sys.stderr, disable=None) as progress,
        ):
            for name, measure_case in progress:
                if self.lost or time.monotonic() > self.deadline:
                    self.result.not_reached.append(name)
                    continue
                progress.set_postfix_str(name)
                try:
                    parts = measure_case()
                    for rows in [parts] if isinstance(parts, list) else parts:
                        self.result.rows += rows
                        self._save()
                except (DeviceLost, torch.AcceleratorError) as error:
                    # The second where it first shows while the clock runs.
                    self.lost = DeviceLost(str(error).partition("\n")[0])
                    self.result.not_reached.append(name)
                except Exception as error:
                    # The inputs or their truth; a peer that fails has a row for it.
                    if not out_of_memory(error):
                        raise
                    print(f"{name}: out of memory, the next case may fit", file=sys.stderr)
                    self.result.not_reached.append(name)
        self.result.environment["clocks_after"] = clocks.read_clocks()
        self._save()
        print(to_json(self.result) if self.options.json else terminal_table(self.result))
        self._draw()
        if self.lost:
            raise self.lost
        return self.result

    @property
    def measured(self) -> bool:
        return any(row.status != NOT_RUN for row in self.result.rows)

    def _draw(self) -> None:
        if not self.measured:
            if self.lost:
                return
            raise ValueError("nothing was measured; files of earlier runs are left as they were")
        print(f"saved {self.folder / self.result.suite}.json, .csv and .md", file=sys.stderr)
        if self.options.no_pictures:
            return
        from padfree_bench.reports.plots import draw_all  # matplotlib takes a second to import

        pictures = draw_all(self.result, self.folder / "plots")
        if pictures:
            print(
                f"drew {len(pictures)} pictures in {self.folder / 'plots'}, as .png and .svg", file=sys.stderr
            )

    def _save(self) -> None:
        self.result.ceilings = asdict(self.ceilings)
        if self.measured:
            save(self.result, self.folder)


def ahead(suite: str, cases: int, directions: int, effort: Effort, minutes: float | None) -> str:
    """How long it will take, before anything is known of the calls: between all of them fast and all of them slow."""
    timings = cases * directions
    low, high = (_duration(timings * each) for each in (effort.seconds, effort.at_most_seconds))
    timing = (
        f"{counted(timings, 'timing')}, {low} if calls are fast to {high} if slow"
        if timings
        else "nothing is timed"
    )
    stop = f"; no further case starts after {minutes:g} min" if minutes else ""
    return f"{suite}: {counted(cases, 'case')}, {timing}, checks on top{stop}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def refuse_to_replace(options: argparse.Namespace) -> None:
    """ValueError where a part of a suite would replace the file of the whole."""
    left_out = [name for name in ("shapes", "dtypes", "peers", "directions") if getattr(options, name, None)]
    if left_out and not options.label and not options.quick:
        named = ", ".join(f"--{name}" for name in left_out)
        raise ValueError(
            f"{named} must come with --label, so that a part does not replace the whole suite's file"
        )


def terminal_table(result: Result) -> str:
    """The main columns in fixed width, then each remark once with the peers it is about."""
    lines = [f"{result.suite} on {result.device}, torch {result.environment['versions']['torch']}"]
    for (case, direction), rows in grouped(result.rows).items():
        shown = [row for row in rows if row.status != NOT_RUN]
        columns = [name for name in MAIN_COLUMNS if any(cell(row, name) for row in shown)]
        heads = ["ms [p20, p80]" if name == "time" else name for name in columns]
        table = [heads, *([cell(row, name) for name in columns] for row in shown)]
        widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
        lines += ["", f"{case}, {direction}" + ("" if shown else ": nothing ran")]
        for line in table if shown else []:
            lines.append(
                "  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            )
    if reasons := by_reason(result.rows):
        lines += ["", "remarks:"]
        for reason, rows in reasons.items():
            lines.append(f"  {', '.join(dict.fromkeys(row.peer for row in rows))}: {reason}")
    if result.faults:
        lines += ["", fault_line(result)]
    if result.not_reached:
        lines += ["", f"not reached within the time given: {', '.join(result.not_reached)}"]
    return "\n".join(lines)
