"""One run of one suite: its deadline, its progress, and a result file that is whole after every case."""

import functools
import gc
import os
import random
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from padfree_bench.measuring import clocks, machine, results
from padfree_bench.measuring.ceilings import Ceilings, measure_ceilings
from padfree_bench.measuring.errors import DeviceLost, out_of_memory
from padfree_bench.measuring.headline import TUNED_ROWS
from padfree_bench.measuring.results import NOT_RUN, Result, Row
from padfree_bench.measuring.timing import Effort, own_stream

MAIN_COLUMNS = [name for name in results.COLUMNS if name not in ("host_us", "gb_per_s", "remark")]


def release() -> None:
    """Give a GPU's memory back; a CPU's comes back by itself, and collecting costs 0.2 s."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


class Session:
    """Holds the options every suite shares and collects rows.

    The result is saved after each part of a case, so that a run that is stopped keeps what it had measured. One
    seed a run draws all inputs: a kernel that is right for one draw only does not stay unseen.
    """

    def __init__(self, suite: str, options: Namespace, command: list[str], dtypes: Iterable[str]) -> None:
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

    def run(
        self, cases: Iterable[tuple[str, Callable[[], Iterable[list[Row]]]]], directions: int = 1
    ) -> Result:
        """Measure each (name, function that gives its rows part by part) until done or out of time; print the table.

        `directions` are timed one by one in each case, 0 where nothing is timed.
        """
        todo, suite, log = list(cases), self.result.suite, functools.partial(print, file=sys.stderr)
        log(ahead(suite, len(todo), directions, self.effort, self.options.minutes))
        with own_stream(self.device), tqdm(todo, desc=suite, file=sys.stderr, disable=None) as progress:
            for name, measure_case in progress:
                if self.lost or time.monotonic() > self.deadline:
                    self.result.not_reached.append(name)
                    continue
                progress.set_postfix_str(name)
                try:
                    for rows in measure_case():
                        self.result.rows += rows
                        self._save()
                        release()
                except (DeviceLost, torch.AcceleratorError) as error:
                    # The second where it first shows while the clock runs.
                    self.lost = DeviceLost(str(error).partition("\n")[0])
                    self.result.not_reached.append(name)
                except Exception as error:
                    # The inputs or their truth; a contender that fails has a row for it.
                    if not out_of_memory(error):
                        raise
                    log(f"{name}: out of memory, the next case may fit")
                    self.result.not_reached.append(name)
        self.result.environment["clocks_after"] = clocks.read_clocks()
        self._save()
        print(results.to_json(self.result) if self.options.json else terminal_table(self.result))
        if not self.measured and not self.lost:
            raise ValueError("nothing was measured; files of earlier runs are left as they were")
        if self.measured:
            log(f"saved {self.folder / suite}.json, .csv and .md")
            self._draw()
        if self.lost:
            raise self.lost
        return self.result

    @property
    def measured(self) -> bool:
        return any(row.status != NOT_RUN for row in self.result.rows)

    def _draw(self) -> None:
        if self.options.no_pictures:
            return
        from padfree_bench.reports.plots import draw_all  # matplotlib takes a second to import

        folder = self.folder / "plots"
        if pictures := draw_all(self.result, folder):
            print(f"drew {len(pictures)} pictures in {folder}, as .png and .svg", file=sys.stderr)

    def _save(self) -> None:
        self.result.ceilings = asdict(self.ceilings)
        if self.measured:
            results.save(self.result, self.folder)


def ahead(suite: str, cases: int, directions: int, effort: Effort, minutes: float | None) -> str:
    """How long it will take, before anything is known of the calls: between all of them fast and all of them slow."""

    def duration(seconds: float) -> str:
        return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"

    timing = "nothing is timed"
    if timings := cases * directions:
        low, high = (duration(timings * each) for each in (effort.seconds, effort.at_most_seconds))
        timing = f"{results.counted(timings, 'timing')}, {low} if calls are fast to {high} if slow"
    stop = f"; no further case starts after {minutes:g} min" if minutes else ""
    return f"{suite}: {results.counted(cases, 'case')}, {timing}, checks on top{stop}"


def refuse_to_replace(options: Namespace) -> None:
    """ValueError where a part of a suite would replace the file of the whole."""
    parts = ("shapes", "dtypes", "peers", "directions")
    left_out = ", ".join(f"--{name}" for name in parts if getattr(options, name, None))
    if left_out and not options.label and not options.quick:
        raise ValueError(
            f"{left_out} must come with --label, so that a part does not replace the whole suite's file"
        )


def terminal_table(result: Result) -> str:
    """The main columns in fixed width, then each remark once with the peers it is about."""
    lines = [f"{result.suite} on {result.device}, torch {result.environment['versions']['torch']}"]
    for (case, direction), rows in results.grouped(result.rows).items():
        shown = [row for row in rows if row.status != NOT_RUN]
        lines += ["", f"{case}, {direction}" + ("" if shown else ": nothing ran")]
        columns = [name for name in MAIN_COLUMNS if any(results.cell(row, name) for row in shown)]
        heads = ["ms [p20, p80]" if name == "time" else name for name in columns]
        table = [heads, *([results.cell(row, name) for name in columns] for row in shown)] if shown else []
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        padded = (map(str.ljust, line, widths) for line in table)
        lines += ["  " + "  ".join(line).rstrip() for line in padded]
    if reasons := results.by_reason(result.rows):
        lines += ["", "remarks:"]
        for reason, rows in reasons.items():
            lines.append(f"  {', '.join(dict.fromkeys(row.peer for row in rows))}: {reason}")
    if result.faults:
        lines += ["", results.fault_line(result)]
    if result.not_reached:
        lines += ["", f"not reached within the time given: {', '.join(result.not_reached)}"]
    return "\n".join(lines)
