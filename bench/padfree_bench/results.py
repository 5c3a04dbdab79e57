"""Rows, and the small files that hold them: JSON with the environment, CSV, and a Markdown table."""

import csv
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"
SCHEMA = 1
OK, UPPER_BOUND, NOT_RUN = "ok", "upper bound", "not run"


class DeviceLost(Exception):
    """After this error the GPU fails every call of this process."""


@dataclass
class Row:
    """One implementation on one case in one direction; figures are None where it did not run.

    `bound` names the unit that sets the floor, `fraction` is floor / time. `extra_mib` is the peak less the
    results (output and gradients). `reason` says why there is no figure, or what to know about it.
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
    syncs: int | None = None
    max_error: float | None = None
    relative_error: float | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.suite, self.case, self.direction, self.peer

    @property
    def timed(self) -> bool:
        return self.ms_p50 is not None


@dataclass
class Result:
    """One run of one suite."""

    suite: str
    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    ceilings: dict[str, Any] | None = None
    quick: bool = False
    not_reached: list[str] = field(default_factory=list)

    @property
    def device(self) -> str:
        return str(self.environment["device"])


def _rounded(value: Any) -> Any:
    """Four significant digits say all that a repeated measurement holds and keep the files small."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value


def to_json(result: Result) -> str:
    """One row a line, so that a difference between two files reads well."""
    rows = [{k: _rounded(v) for k, v in asdict(row).items() if v not in (None, "")} for row in result.rows]
    head = {
        "schema": SCHEMA,
        "suite": result.suite,
        "quick": result.quick,
        "environment": result.environment,
        "ceilings": _rounded(result.ceilings),
        "not_reached": result.not_reached,
    }
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    return json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n'


def from_json(text: str) -> Result:
    """Read one file; a file of another schema or with unknown columns is refused with one line."""
    content = json.loads(text)
    if content.get("schema") != SCHEMA:
        raise ValueError(f"result file must have schema {SCHEMA}, got {content.get('schema')!r}")
    known = {column.name for column in fields(Row)}
    for row in content["rows"]:
        if unknown := set(row) - known:
            raise ValueError(f"result file has unknown columns {sorted(unknown)}")
    rows = [Row(**row) for row in content["rows"]]
    for each in rows:
        times = (each.ms_p20, each.ms_p50, each.ms_p80)
        if each.timed and not all(time is not None and 0 < time < math.inf for time in times):
            raise ValueError(f"result file has the times {times} for {each.case} {each.peer}")
    return Result(
        suite=content["suite"],
        environment=content["environment"],
        rows=rows,
        ceilings=content["ceilings"],
        quick=content["quick"],
        not_reached=content["not_reached"],
    )


def load(path: Path) -> Result:
    """A result file by path; ValueError names the file."""
    try:
        return from_json(path.read_text())
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"cannot read results from {path}: {error}") from None


def save(result: Result, folder: Path) -> Path:
    """Write <suite>.json, .csv and .md whole or not at all, so that an early stop leaves the last good state."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.suite}.json"
    _replace(path, to_json(result))
    temporary = folder / f".{result.suite}.csv"
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        names = [column.name for column in fields(Row)]
        writer.writerow([*names, "device", "commit"])
        for row in result.rows:
            values = [_rounded(getattr(row, name)) for name in names]
            writer.writerow([*values, result.device, result.environment.get("commit")])
    temporary.replace(folder / f"{result.suite}.csv")
    _replace(folder / f"{result.suite}.md", markdown(result))
    return path


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.replace(path)


COLUMNS: dict[str, str] = {
    "peer": "implementation",
    "time": "ms, median [p20, p80]",
    "graph_ms": "graph ms",
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
        return f"{row.ms_p50:.4g} [{row.ms_p20:.4g}, {row.ms_p80:.4g}]" if row.timed else row.status
    if column == "remark":
        status = row.status if row.timed and row.status != OK else ""
        return "; ".join(
            part for part in (status, row.reason, row.ran if row.timed else "", row.graph_reason) if part
        )
    value = getattr(row, column)
    if value is None or value == "":
        return ""
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
    for (case, direction), rows in grouped(result.rows).items():
        columns = used_columns(rows)
        lines += ["", f"## {case}, {direction}", "", "| " + " | ".join(COLUMNS[c] for c in columns) + " |"]
        lines.append("|" + "---|" * len(columns))
        for row in rows:
            lines.append("| " + " | ".join(cell(row, c).replace("|", "\\|") for c in columns) + " |")
    return "\n".join(lines) + "\n"
