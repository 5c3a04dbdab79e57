"""Pictures of result files: speed and memory against length, padding and head_dim, and the roofline."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from padfree_bench.measuring.results import FAULT, SECOND_WAVE, UPPER_BOUND, Result, Row, grouped
from padfree_bench.reports import roofline
from padfree_bench.reports.drawing import (
    MARKERS,
    add_legend,
    colour,
    label_decades,
    new_figure,
    not_run,
    save_figure,
    timed_peers,
)

LENGTHS = {"imdb": "IMDB lengths", "scaled": "IMDB lengths scaled to S", "full": "no padding"}


@dataclass(frozen=True)
class Sweep:
    """A picture of one group of cases: a panel a direction, `y` against `x`, as lines along a number.

    With `label`, which names each x, the xs are categories: points stand side by side and no line joins them. Times
    and rates carry their p20 to p80.
    """

    name: str
    group: str
    x_label: str
    x: Callable[[Row], Any]
    y_label: str
    y: Callable[[Row], float | None]
    log_x: bool = True
    label: Callable[[Any], str] | None = None


def _length(row: Row) -> int:
    return row.seq or 0


def _padding_percent(row: Row) -> float:
    return 100 * (1 - (row.valid_fraction or 0))


def _heads(row: Row) -> tuple[int, int]:
    return row.head_dim or 0, row.heads or 0


SWEEPS = [
    Sweep("speed-length", "length", "padded length S", _length, "ms", lambda r: r.ms_p50),
    Sweep("memory-length", "length", "padded length S", _length, "peak MiB", lambda r: r.peak_mib),
    Sweep("speed-padding", "padding", "padding, %", _padding_percent, "ms", lambda r: r.ms_p50, log_x=False),
    Sweep(
        "memory-padding",
        "padding",
        "padding, %",
        _padding_percent,
        "peak MiB",
        lambda r: r.peak_mib,
        log_x=False,
    ),
    Sweep(
        "speed-head-dim",
        "imdb",
        "heads H and head_dim D",
        _heads,
        "valid tokens/s",
        lambda r: r.tokens_per_s,
        log_x=False,
        label=lambda heads: f"H{heads[1]} D{heads[0]}",
    ),
    Sweep(
        "speed-batch", "batch", "batch B", lambda r: r.batch or 0, "valid tokens/s", lambda r: r.tokens_per_s
    ),
]


def shape_of(rows: list[Row]) -> str:
    """What all these rows share, such as `B16 H4 D8 S512, IMDB lengths`; what varies is left to the axis."""
    shared = []
    for letter, name in (("B", "batch"), ("H", "heads"), ("D", "head_dim"), ("S", "seq")):
        values = {getattr(row, name) for row in rows}
        if len(values) == 1:
            shared.append(f"{letter}{values.pop()}")
    lengths = {row.lengths for row in rows}
    kind = LENGTHS.get(lengths.pop(), "") if len(lengths) == 1 else ""
    return ", ".join(part for part in (" ".join(shared), kind) if part)


def is_drawn(row: Row) -> bool:
    """Not what is at fault, and no peer a second time."""
    return row.status != FAULT and not row.peer.endswith(SECOND_WAVE)


def draw_all(result: Result, folder: Path) -> list[Path]:
    """Write every picture the file has rows for, as SVG and PNG; returns the SVG paths."""
    folder.mkdir(parents=True, exist_ok=True)
    result = replace(result, rows=[row for row in result.rows if is_drawn(row)])
    figures = {}
    for sweep in SWEEPS:
        for dtype, panels in _panels(result, sweep).items():
            figures[f"{sweep.name}-{dtype}"] = _sweep_figure(result, sweep, panels, dtype)
    for dtype in sorted({row.dtype for row in result.rows}):
        if roofline.drawn_rows(result, dtype):
            figures[f"roofline-{dtype}"] = roofline.figure(result, dtype)
    for (case, direction), rows in grouped(result.rows).items():
        if direction in ("step", "inference", "training") and any(row.timed for row in rows):
            figures[f"{case}-{direction}"] = _bar_figure(result, rows)
    return [save_figure(figure, folder / f"{result.suite}-{name}") for name, figure in figures.items()]


def _panels(result: Result, sweep: Sweep) -> dict[str, dict[str, list[Row]]]:
    """{dtype: {direction: rows}} of what the sweep draws; a line needs two points."""
    rows = [row for row in result.rows if row.group == sweep.group and sweep.y(row) is not None]
    if sweep.group == "imdb":
        rows = [row for row in rows if row.seq == 400]
    panels: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        panels.setdefault(row.dtype, {}).setdefault(row.direction, []).append(row)
    drawn = {
        dtype: {way: these for way, these in ways.items() if len({sweep.x(row) for row in these}) > 1}
        for dtype, ways in panels.items()
    }
    return {dtype: ways for dtype, ways in drawn.items() if ways}


def _sweep_figure(result: Result, sweep: Sweep, panels: dict[str, list[Row]], dtype: str) -> Any:
    every = [row for rows in panels.values() for row in rows]
    title = f"{sweep.y_label} by {sweep.x_label}: {shape_of(every)}, {dtype}, {result.device}"
    note = not_run([row for row in result.rows if row.group == sweep.group and row.dtype == dtype])
    figure, all_axes = new_figure(title, note, len(panels))
    order = timed_peers(result)
    for axes, (direction, rows) in zip(all_axes, panels.items(), strict=True):
        ticks = sorted({sweep.x(row) for row in rows})
        for peer in order:
            _peer(axes, sweep, [row for row in rows if row.peer == peer], ticks, order)
        axes.set(xlabel=sweep.x_label, ylabel=sweep.y_label, yscale="log")
        label_decades(axes.yaxis)
        axes.set_title(direction, fontsize=10)
        if sweep.log_x:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:,.0f}")
        if sweep.label:
            axes.set_xticks(range(len(ticks)), [sweep.label(tick) for tick in ticks], fontsize=8)
    wrong = any(row.status == UPPER_BOUND for row in every)
    marks = "hollow" if sweep.label else "dotted"
    add_legend(figure, f"{marks}: wrong answer, an upper bound" if wrong else None)
    return figure


def _band(sweep: Sweep, row: Row) -> tuple[float, float] | None:
    """Where the figure lies from p20 to p80 of the time; None for what is no time and no rate."""
    if not (row.ms_p20 and row.ms_p50 and row.ms_p80) or sweep.y_label not in ("ms", "valid tokens/s"):
        return None
    low, high = row.ms_p20 / row.ms_p50, row.ms_p80 / row.ms_p50
    # A rate falls where a time rises.
    low, high = (low, high) if sweep.y_label == "ms" else (1 / high, 1 / low)
    y = sweep.y(row) or 0.0
    return y * low, y * high


def _peer(axes: Any, sweep: Sweep, rows: list[Row], ticks: list[Any], order: list[str]) -> None:
    """One peer's line along a number, or its points beside those of the others in each category."""
    if not rows:
        return
    peer = rows[0].peer
    index = order.index(peer)
    upper = any(row.status == UPPER_BOUND for row in rows)
    rows = sorted(rows, key=sweep.x)
    ys = [sweep.y(row) or 0.0 for row in rows]
    style: dict[str, Any] = {
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4,
        "color": colour(peer, order),
        "linestyle": ":" if upper else "-",
        "linewidth": 2.2 if peer.startswith("padfree") else 1.2,
        "label": peer,
    }
    bands = [band for row in rows if (band := _band(sweep, row))]
    if sweep.label:
        beside = 0.7 * ((index + 0.5) / len(order) - 0.5)
        xs = [ticks.index(sweep.x(row)) + beside for row in rows]
        axes.plot(xs, ys, **style | {"linestyle": "none", "fillstyle": "none" if upper else "full"})
        if bands:
            axes.vlines(xs, *zip(*bands, strict=True), color=style["color"], linewidth=1)
        return
    xs = [sweep.x(row) for row in rows]
    if bands:
        axes.fill_between(xs, *zip(*bands, strict=True), color=style["color"], alpha=0.15, linewidth=0)
    axes.plot(xs, ys, **style)


def _bar_figure(result: Result, rows: list[Row]) -> Any:
    """Whole models and loops: one bar an implementation, with its p20 to p80; who did not run has a line too."""
    title = f"{rows[0].case}, {rows[0].direction}, {result.device}"
    figure, (axes,) = new_figure(title, not_run(rows), panel_inches=0.7 + 0.28 * len(rows))
    order = [row.peer for row in rows]
    times = [row.ms_p50 or 0 for row in rows]
    spread = [[t - (r.ms_p20 or 0) for t, r in zip(times, rows, strict=True)]]
    spread.append([(r.ms_p80 or 0) - t for t, r in zip(times, rows, strict=True)])
    axes.barh(order, times, xerr=spread, color=[colour(peer, order) for peer in order], capsize=3)
    for line, row in enumerate(rows):
        if not row.timed:
            axes.annotate(" not run", (0, line), va="center", fontsize=9)
    axes.set_xlabel("ms (p20 to p80)")
    axes.invert_yaxis()
    return figure
