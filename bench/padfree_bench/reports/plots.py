"""Pictures of result files: speed and memory against length, padding and head_dim, and the roofline."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from padfree_bench.measuring.results import FAULT, SECOND_WAVE, UPPER_BOUND, Result, Row, grouped
from padfree_bench.reports import drawing, roofline

LENGTHS = {"imdb": "IMDB lengths", "scaled": "IMDB lengths scaled to S", "full": "no padding"}
Y_LABELS = {"ms_p50": "ms", "tokens_per_s": "valid tokens/s", "peak_mib": "peak MiB"}


@dataclass(frozen=True)
class Sweep:
    """A picture of one group of cases: a panel a direction, the column `y` against `x`, as lines along a number.

    With `category`, the format of an x's name, points stand side by side and no line joins them. Times and rates
    carry their p20 to p80.
    """

    name: str
    group: str
    y: str
    x_label: str
    x: Callable[[Row], Any]
    log_x: bool = False
    category: str = ""


def _padding_percent(row: Row) -> float:
    return 100 * (1 - (row.valid_fraction or 0))


SWEEPS = (
    Sweep("speed-length", "length", "ms_p50", "padded length S", attrgetter("seq"), log_x=True),
    Sweep("memory-length", "length", "peak_mib", "padded length S", attrgetter("seq"), log_x=True),
    Sweep("speed-padding", "padding", "ms_p50", "padding, %", _padding_percent),
    Sweep("memory-padding", "padding", "peak_mib", "padding, %", _padding_percent),
    Sweep(
        "speed-head-dim", "imdb", "tokens_per_s", "heads H and head_dim D",
        attrgetter("head_dim", "heads"), category="H{1} D{0}",
    ),
    Sweep("speed-batch", "batch", "tokens_per_s", "batch B", attrgetter("batch"), log_x=True),
)  # fmt: skip


def shape_of(rows: list[Row]) -> str:
    """What all these rows share, such as `B16 H4 D8 S512, IMDB lengths`; what varies is left to the axis."""
    columns = {"B": "batch", "H": "heads", "D": "head_dim", "S": "seq", "": "lengths"}
    values = {letter: {getattr(row, name) for row in rows} for letter, name in columns.items()}
    shared = {letter: found.pop() for letter, found in values.items() if len(found) == 1}
    lengths = LENGTHS.get(shared.pop("", ""), "")
    return ", ".join(filter(None, (" ".join(f"{letter}{size}" for letter, size in shared.items()), lengths)))


def draw_all(result: Result, folder: Path) -> list[Path]:
    """Write every picture the file has rows for, as SVG and PNG; returns the SVG paths.

    What is at fault is not drawn, nor any peer a second time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in result.rows if row.status != FAULT and not row.peer.endswith(SECOND_WAVE)]
    with matplotlib.rc_context(drawing.STYLE):
        figures = _figures(replace(result, rows=rows))
        return [drawing.save_figure(figure, folder / f"{result.suite}-{name}") for name, figure in figures]


def _figures(result: Result) -> Iterator[tuple[str, Any]]:
    for sweep in SWEEPS:
        for dtype, panels in _panels(result, sweep).items():
            yield f"{sweep.name}-{dtype}", _sweep_figure(result, sweep, panels, dtype)
    for dtype in sorted({row.dtype for row in result.rows}):
        if roofline.drawn_rows(result, dtype):
            yield f"roofline-{dtype}", roofline.figure(result, dtype)
    for (case, direction), rows in grouped(result.rows).items():
        if direction in ("step", "inference", "training", "epoch", "predict") and any(
            row.timed for row in rows
        ):
            yield f"{case}-{direction}", _bar_figure(result, rows)


def _panels(result: Result, sweep: Sweep) -> dict[str, dict[str, list[Row]]]:
    """{dtype: {direction: rows}} of what the sweep draws; a line needs two points."""
    panels: dict[str, dict[str, list[Row]]] = {}
    for row in result.rows:
        drawn = row.group == sweep.group and getattr(row, sweep.y) is not None
        if drawn and (sweep.group != "imdb" or row.seq == 400):
            panels.setdefault(row.dtype, {}).setdefault(row.direction, []).append(row)
    for dtype, ways in panels.items():
        panels[dtype] = {way: rows for way, rows in ways.items() if len(set(map(sweep.x, rows))) > 1}
    return {dtype: ways for dtype, ways in panels.items() if ways}


def _sweep_figure(result: Result, sweep: Sweep, panels: dict[str, list[Row]], dtype: str) -> Any:
    every = [row for rows in panels.values() for row in rows]
    y_label, order = Y_LABELS[sweep.y], drawing.timed_peers(result)
    title = f"{y_label} by {sweep.x_label}: {shape_of(every)}, {dtype}, {result.device}"
    note = drawing.not_run([row for row in result.rows if row.group == sweep.group and row.dtype == dtype])
    figure, all_axes = drawing.new_figure(title, note, len(panels))
    for axes, (direction, rows) in zip(all_axes, panels.items(), strict=True):
        ticks = sorted(set(map(sweep.x, rows)))
        for peer in order:
            _draw_peer(axes, sweep, [row for row in rows if row.peer == peer], ticks, order)
        axes.set(xlabel=sweep.x_label, ylabel=y_label, yscale="log", title=direction)
        drawing.label_decades(axes.yaxis)
        if sweep.log_x:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:,.0f}")
        if sweep.category:
            axes.set_xticks(range(len(ticks)), [sweep.category.format(*tick) for tick in ticks], fontsize=8)
    wrong = any(row.status == UPPER_BOUND for row in every)
    marks = "hollow" if sweep.category else "dotted"
    drawing.add_legend(figure, f"{marks}: wrong answer, an upper bound" if wrong else None)
    return figure


def _band(sweep: Sweep, row: Row) -> tuple[float, float] | None:
    """Where the figure lies from p20 to p80 of the time; None for what is no time and no rate."""
    if not (row.ms_p20 and row.ms_p50 and row.ms_p80) or sweep.y == "peak_mib":
        return None
    low, high, y = row.ms_p20 / row.ms_p50, row.ms_p80 / row.ms_p50, getattr(row, sweep.y)
    # A rate falls where a time rises.
    return (y * low, y * high) if sweep.y == "ms_p50" else (y / high, y / low)


def _draw_peer(axes: Any, sweep: Sweep, rows: list[Row], ticks: list[Any], order: list[str]) -> None:
    """One peer's line along a number, or its points beside those of the others in each category."""
    if not rows:
        return
    rows = sorted(rows, key=sweep.x)
    peer, xs, ys = rows[0].peer, [sweep.x(row) for row in rows], [getattr(row, sweep.y) for row in rows]
    index, shade = order.index(peer), drawing.colours(order)[peer]
    marker = drawing.MARKERS[index % len(drawing.MARKERS)]
    upper = any(row.status == UPPER_BOUND for row in rows)
    bands = list(zip(*(band for row in rows if (band := _band(sweep, row))), strict=True))
    style = {"marker": marker, "markersize": 4, "color": shade, "label": peer}
    if sweep.category:
        xs = [ticks.index(x) + 0.7 * ((index + 0.5) / len(order) - 0.5) for x in xs]
        axes.plot(xs, ys, linestyle="none", fillstyle="none" if upper else "full", **style)
        if bands:
            axes.vlines(xs, *bands, color=shade, linewidth=1)
        return
    if bands:
        axes.fill_between(xs, *bands, color=shade, alpha=0.15, linewidth=0)
    width = 2.2 if peer.startswith("padfree") else 1.2
    axes.plot(xs, ys, linestyle=":" if upper else "-", linewidth=width, **style)


def _bar_figure(result: Result, rows: list[Row]) -> Any:
    """Whole models and loops: one bar an implementation, with its p20 to p80; who did not run has a line too."""
    title = f"{rows[0].case}, {rows[0].direction}, {result.device}"
    figure, (axes,) = drawing.new_figure(title, drawing.not_run(rows), panel_inches=0.7 + 0.28 * len(rows))
    order = [row.peer for row in rows]
    low, times, high = np.array([(row.ms_p20 or 0, row.ms_p50 or 0, row.ms_p80 or 0) for row in rows]).T
    # Epochs are read in seconds.
    scale, unit = (1e3, "s") if times.max() >= 1e4 else (1.0, "ms")
    low, times, high = low / scale, times / scale, high / scale
    spread, shades = (times - low, high - times), list(drawing.colours(order).values())
    axes.barh(order, times, xerr=spread, color=shades, capsize=3)
    for line, row in enumerate(rows):
        if not row.timed:
            axes.annotate(" not run", (0, line), va="center", fontsize=9)
    axes.set_xlabel(f"{unit} (p20 to p80)")
    axes.invert_yaxis()
    return figure
