"""Rows, and the small files that hold them: JSON with the environment, CSV, and a Markdown table."""

import csv
import io
import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from padfree_bench.measuring.files import environment_in, keep_earlier, write_whole

RESULTS = Path(__file__).resolve().parents[2] / "results"
SCHEMA = 1
OK, UPPER_BOUND, NOT_RUN = "ok", "upper bound", "not run"
# A figure that cannot be: faster than the machine. Kept to be looked into, never used.
FAULT = "fault"
# After a peer's name: timed once more beside those that compile for every shape. After a case's: that part of it.
SECOND_WAVE = " (second wave)"
# After a peer's name in a --twice run: timed a second time, to see whether it measures the same.
AGAIN = " (again)"
FIGURE = re.compile(r"\d+\.\d+(?:e[+-]?\d+)?|\d+e[+-]?\d+|\d+(?= ms)")


@dataclass
class Row:
    """One implementation on one case in one direction; figures are None where it did not run.

    `ms_*` are single calls (on a GPU with a cold L2), `graph_*` replays of the call as a CUDA graph, timed alike.
    `bound` names the unit that sets the floor, `fraction` is floor / time. `extra_mib` is the peak less the
    results (output and gradients). `reason` says why there is no figure, or what to know about it. `wave` is 2 for
    what was timed beside the peers that compile for every shape; only rows of one wave were interleaved.
    """

    suite: str
    case: str
    group: str
    direction: str
    peer: str
    status: str = NOT_RUN
    reason: str = ""
    ran: str = ""
    note: str = ""
    dtype: str = ""
    batch: int | None = None
    heads: int | None = None
    head_dim: int | None = None
    seq: int | None = None
    lengths: str = ""
    valid_fraction: float | None = None
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    repetitions: int | None = None
    graph_ms: float | None = None
    graph_p20: float | None = None
    graph_p80: float | None = None
    graph_reason: str = ""
    host_us: float | None = None
    tflops: float | None = None
    gb_per_s: float | None = None
    tokens_per_s: float | None = None
    reviews_per_s: float | None = None
    fraction: float | None = None
    bound: str = ""
    peak_mib: float | None = None
    extra_mib: float | None = None
    launches: int | None = None
    syncs: float | None = None
    max_error: float | None = None
    relative_error: float | None = None
    wave: int | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.suite, self.case, self.direction, self.peer

    @property
    def timed(self) -> bool:
        return self.ms_p50 is not None

    @property
    def usable(self) -> bool:
        """Timed, and not at fault."""
        return self.timed and self.status != FAULT

    def remark(self, text: str) -> None:
        """Add to `reason`; what stood there stays."""
        if text not in self.reason:
            self.reason = "; ".join(filter(None, [self.reason, text]))


@dataclass
class Result:
    """One run of one suite. `clocks`: the GPU's clocks around every timed part, as `clocks.Watch` notes them."""

    suite: str
    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    ceilings: dict[str, Any] | None = None
    quick: bool = False
    not_reached: list[str] = field(default_factory=list)
    clocks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def device(self) -> str:
        return str(self.environment["device"])

    @property
    def faults(self) -> list[Row]:
        return [row for row in self.rows if row.status == FAULT]


HEAD = ("suite", "quick", "environment", "ceilings", "not_reached")


def _rounded(value: Any) -> Any:
    """Four significant digits say all that a repeated measurement holds and keep the files small."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value


def to_json(result: Result) -> str:
    """One row a line, so that a difference between two files reads well."""
    head = {"schema": SCHEMA} | {name: getattr(result, name) for name in HEAD}
    text = json.dumps(head | {"ceilings": _rounded(result.ceilings)}, indent=1)[:-2]
    rows = [{k: _rounded(v) for k, v in asdict(row).items() if v not in (None, "")} for row in result.rows]
    for name, entries in (("clocks", result.clocks), ("rows", rows)):
        if entries or name == "rows":
            lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
            text += f',\n "{name}": [\n{lines}\n ]'
    return text + "\n}\n"


def to_csv(result: Result) -> str:
    """One row a line, every column."""
    text = io.StringIO(newline="")
    origin = {"device": result.device, "commit": result.environment.get("commit")}
    writer = csv.DictWriter(text, [*(column.name for column in fields(Row)), *origin])
    writer.writeheader()
    writer.writerows(_rounded(asdict(row)) | origin for row in result.rows)
    return text.getvalue()


def from_json(text: str) -> Result:
    """Read one file; a file of another schema or with unknown columns is refused with one line."""
    content = json.loads(text)
    if content.get("schema") != SCHEMA:
        raise ValueError(f"result file must have schema {SCHEMA}, got {content.get('schema')!r}")
    if unknown := set().union(*content["rows"]) - {column.name for column in fields(Row)}:
        raise ValueError(f"result file has unknown columns {sorted(unknown)}")
    rows = [Row(**row) for row in content["rows"]]
    for each in rows:
        times = (each.ms_p20, each.ms_p50, each.ms_p80)
        if each.timed and not all(time is not None and 0 < time < math.inf for time in times):
            raise ValueError(f"result file has the times {times} for {each.case} {each.peer}")
    return Result(rows=rows, clocks=content.get("clocks", []), **{name: content[name] for name in HEAD})


def load(path: Path) -> Result:
    """A result file by path; ValueError names the file."""
    try:
        return from_json(path.read_text())
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"cannot read results from {path}: {error}") from None


def save(result: Result, folder: Path) -> Path:
    """Write <suite>.json, .csv and .md whole or not at all, so that an early stop leaves the last good state.

    The JSON of another run that stands there moves to earlier/<when it started>-<suite>.json, unless it was quick.
    ValueError where it is of another device.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.suite}.json"
    there = environment_in(path)
    if (device := there.get("device", result.device)) != result.device:
        raise ValueError(
            f"{path} holds figures of {device}, these are of {result.device}: give another --output"
        )
    if there.get("started") != result.environment.get("started") and not result.quick:
        keep_earlier(path)
    for suffix, text_of in ((".json", to_json), (".csv", to_csv), (".md", markdown)):
        write_whole(path.with_suffix(suffix), text_of(result))
    return path


COLUMNS: dict[str, str] = {
    "peer": "implementation",
    "time": "ms, median [p20, p80]",
    "graph_ms": "as CUDA graph, ms",
    "host_us": "host µs",
    "tflops": "useful TFLOP/s",
    "gb_per_s": "useful GB/s",
    "tokens_per_s": "valid tokens/s",
    "reviews_per_s": "reviews/s",
    "fraction": "of the roofline",
    "peak_mib": "peak MiB",
    "extra_mib": "extra MiB",
    "launches": "launches",
    "syncs": "host syncs",
    "relative_error": "error vs fp64",
    "remark": "remark",
}


def cell(row: Row, column: str) -> str:
    """One cell of a table, empty where there is no figure."""
    if column == "time":
        figure = f"{row.ms_p50:.4g} [{row.ms_p20:.4g}, {row.ms_p80:.4g}]" if row.timed else row.status
        return f"FAULT {figure}" if row.timed and row.status == FAULT else figure
    if column == "remark":
        status = row.status if row.timed and row.status != OK else ""
        return "; ".join(filter(None, (status, row.reason, row.ran if row.timed else "", row.graph_reason)))
    value = getattr(row, column)
    if value is None or value == "":
        return ""
    if column == "graph_ms" and row.graph_p20 is not None:
        return f"{value:.4g} [{row.graph_p20:.4g}, {row.graph_p80:.4g}]"
    if column == "fraction":
        return f"{value:.0%} ({row.bound})"
    if column == "relative_error":
        return f"{value:.1e}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return str(value)


def used_columns(rows: list[Row]) -> list[str]:
    """The columns in which at least one of these rows has something to say."""
    return [name for name in COLUMNS if any(cell(row, name) for row in rows)]


def grouped(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by (case, direction), in order of appearance."""
    tables: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        tables.setdefault((row.case, row.direction), []).append(row)
    return tables


def counted(number: int, noun: str) -> str:
    """`1 case`, `2 cases`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def by_reason(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by what is said of them, in order of appearance; reasons that differ in a measured figure alone are one.

    Such a figure is an error or a time; the first stands for all of them.
    """
    alike: dict[str, list[Row]] = {}
    for row in rows:
        if row.reason:
            alike.setdefault(FIGURE.sub("#", row.reason), []).append(row)

    def named(these: list[Row]) -> str:
        others = len({row.reason for row in these}) - 1
        return these[0].reason + (f" (and {others} with other figures)" if others else "")

    return {named(these): these for these in alike.values()}


def fault_line(result: Result) -> str:
    """Which rows are at fault, in one line."""
    named = ", ".join(f"{row.case} {row.direction} {row.peer}" for row in result.faults)
    return f"FAULT: {len(result.faults)} figures are faster than this machine can be and count for nothing: {named}"


def markdown(result: Result) -> str:
    """The Markdown form of a result file: one table a case and direction."""
    environment = result.environment
    lines = [
        f"# {result.suite} on {result.device}",
        "",
        f"`{environment.get('command')}`",
        f"commit {environment.get('commit')}, {environment.get('started')}",
        f"torch {environment['versions'].get('torch')}, triton {environment['versions'].get('triton')}",
    ]
    if result.not_reached:
        lines += ["", f"Not reached within the time given: {', '.join(result.not_reached)}."]
    if result.faults:
        lines += ["", f"**{fault_line(result)}**"]
    for (case, direction), rows in grouped(result.rows).items():
        columns = used_columns(rows)
        lines += ["", f"## {case}, {direction}", ""]
        lines += [f"| {' | '.join(COLUMNS[name] for name in columns)} |", "|" + "---|" * len(columns)]
        cells = [[cell(row, name).replace("|", "\\|") for name in columns] for row in rows]
        lines += [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join(lines) + "\n"
