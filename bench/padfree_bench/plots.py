"""Pictures of result files: speed and memory against length, padding and head_dim, and the roofline."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
# With no date inside either, drawing the same figures twice changes no byte.
matplotlib.rcParams["svg.hashsalt"] = "padfree"
import matplotlib.pyplot as plt

from padfree_bench.results import FAULT, SECOND_WAVE, UPPER_BOUND, Result, Row, grouped

# One colour a peer in every picture; the reds and oranges are padfree's.
COLOURS = [plt.get_cmap("tab20")(index) for index in (0, 4, 8, 10, 14, 16, 18, 1, 5, 9, 11, 15, 17, 19)]
OURS = ("#d62728", "#ff7f0e", "#e377c2", "#8c1a1a", "#bc5090", "#ffb000")
MARKERS = "osD^v<>P*X"
LENGTHS = {"imdb": "IMDB lengths", "scaled": "IMDB lengths scaled to S", "full": "no padding"}
PANEL_INCHES = (3.6, 3.8)


@dataclass(frozen=True)
class Sweep:
    """A line plot of one group of cases: a panel a direction, `y` against `x`; `label` names each x instead.

    Times and rates stand in a band from p20 to p80.
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


def colour(peer: str, order: list[str]) -> Any:
    ours = [name for name in order if name.startswith(("padfree", "ours"))]
    if peer in ours:
        return OURS[ours.index(peer) % len(OURS)]
    return COLOURS[order.index(peer) % len(COLOURS)]


def timed_peers(result: Result) -> list[str]:
    """The peers that have figures, in the file's order: it decides their colours and markers."""
    return list(
        dict.fromkeys(row.peer for row in result.rows if row.ms_p50 is not None or row.peak_mib is not None)
    )


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
    written = []
    for sweep in SWEEPS:
        for dtype, panels in _panels(result, sweep).items():
            name = f"{result.suite}-{sweep.name}-{dtype}"
            written.append(_save(_sweep_figure(result, sweep, panels, dtype), folder / name))
    roofline = [row for row in result.rows if row.tflops and row.gb_per_s and row.status != UPPER_BOUND]
    for dtype in sorted({row.dtype for row in roofline}):
        chosen = [row for row in roofline if row.dtype == dtype and row.direction == "forward"]
        if chosen:
            written.append(
                _save(_roofline_figure(result, chosen, dtype), folder / f"{result.suite}-roofline-{dtype}")
            )
    if any(row.direction in ("step", "inference", "training") for row in result.rows):
        written += _bar_figures(result, folder)
    return written


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
    width, height = PANEL_INCHES
    figure, all_axes = plt.subplots(
        1,
        len(panels),
        figsize=(width * len(panels) + 2.4, height),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    every = [row for rows in panels.values() for row in rows]
    order = timed_peers(result)
    figure.suptitle(f"{shape_of(every)}, {dtype}, {result.device}".removeprefix(", "), fontsize=11)
    for axes, (direction, rows) in zip(all_axes[0], panels.items(), strict=True):
        ticks = sorted({sweep.x(row) for row in rows})
        for index, peer in enumerate(order):
            _line(axes, sweep, [row for row in rows if row.peer == peer], ticks, index, colour(peer, order))
        axes.set(title=direction, xlabel=sweep.x_label, yscale="log")
        axes.grid(alpha=0.3)
        if sweep.log_x:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:,.0f}")
        if sweep.label:
            axes.set_xticks(range(len(ticks)), [sweep.label(tick) for tick in ticks], fontsize=8)
    all_axes[0][0].set_ylabel(sweep.y_label)
    entries = {
        label: line
        for axes in all_axes[0]
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    blank = plt.Line2D([], [], linestyle="none")
    entries |= {label: blank for label in not_run(result, sweep.group)}
    figure.legend(entries.values(), entries.keys(), fontsize=8, loc="outside right center", frameon=False)
    return figure


def not_run(result: Result, group: str) -> list[str]:
    """What the picture is about and does not show: padfree, where none of its rows in this group has a figure."""
    rows = [row for row in result.rows if row.group == group and row.peer.startswith("padfree")]
    if any(row.timed for row in rows):
        return []
    return [f"padfree: not run\n({row.reason.partition(':')[0]})" for row in rows[:1]]


def _band(sweep: Sweep, row: Row) -> tuple[float, float] | None:
    """Where the figure lies from p20 to p80 of the time; None for what is no time and no rate."""
    if not (row.ms_p20 and row.ms_p50 and row.ms_p80) or sweep.y_label not in ("ms", "valid tokens/s"):
        return None
    low, high = row.ms_p20 / row.ms_p50, row.ms_p80 / row.ms_p50
    # A rate falls where a time rises.
    low, high = (low, high) if sweep.y_label == "ms" else (1 / high, 1 / low)
    y = sweep.y(row) or 0.0
    return y * low, y * high


def _line(axes: Any, sweep: Sweep, rows: list[Row], ticks: list[Any], index: int, shade: Any) -> None:
    if not rows:
        return
    peer = rows[0].peer
    upper = any(row.status == UPPER_BOUND for row in rows)
    rows = sorted(rows, key=sweep.x)
    xs = [ticks.index(sweep.x(row)) if sweep.label else sweep.x(row) for row in rows]
    ys = [sweep.y(row) or 0.0 for row in rows]
    if bands := [band for row in rows if (band := _band(sweep, row))]:
        axes.fill_between(xs, *zip(*bands, strict=True), color=shade, alpha=0.15, linewidth=0)
    axes.plot(
        xs,
        ys,
        marker=MARKERS[index % len(MARKERS)],
        markersize=4,
        color=shade,
        linestyle=":" if upper else "-",
        linewidth=2.2 if peer.startswith("padfree") else 1.2,
        label=f"{peer} (wrong answer)" if upper else peer,
    )


def _new_figure(title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(9.6, 4.8), layout="constrained")
    axes.set(xlabel=x_label, ylabel=y_label)
    figure.suptitle(title, fontsize=11)
    axes.grid(alpha=0.3)
    return figure, axes


def _roofline_figure(result: Result, rows: list[Row], dtype: str) -> Any:
    """Useful FLOP per useful byte against what was reached, under the ceilings of the same run."""
    figure, axes = _new_figure(
        f"roofline: forward of every case, useful work only, {dtype}, {result.device}",
        "useful FLOP / byte",
        "useful TFLOP/s",
    )
    assert result.ceilings is not None
    bandwidth, peak = result.ceilings["bytes_per_s"], result.ceilings["flops_per_s"][dtype]
    intensities = [1e3 * (row.tflops or 0) / (row.gb_per_s or 1) for row in rows]
    edges = [
        min([*intensities, peak / bandwidth]) / 2,
        peak / bandwidth,
        max([*intensities, peak / bandwidth]) * 2,
    ]
    axes.plot(
        edges, [min(peak, bandwidth * x) / 1e12 for x in edges], color="black", label="measured ceilings"
    )
    order = timed_peers(result)
    for peer in dict.fromkeys(row.peer for row in rows):
        points = [(x, row.tflops) for x, row in zip(intensities, rows, strict=True) if row.peer == peer]
        axes.scatter(*zip(*points, strict=True), s=18, color=colour(peer, order), label=peer)
    axes.set(xscale="log", yscale="log")
    figure.legend(fontsize=8, loc="outside right center", frameon=False)
    return figure


def _bar_figures(result: Result, folder: Path) -> list[Path]:
    """Whole models and loops: one bar an implementation, with its p20 to p80."""
    written = []
    order = timed_peers(result)
    for (case, direction), rows in grouped([row for row in result.rows if row.timed]).items():
        figure, axes = _new_figure(f"{case}, {direction}, {result.device}", "ms (p20 to p80)", "")
        times = [row.ms_p50 or 0 for row in rows]
        spread = [
            [(r.ms_p50 or 0) - (r.ms_p20 or 0) for r in rows],
            [(r.ms_p80 or 0) - (r.ms_p50 or 0) for r in rows],
        ]
        axes.barh(
            [r.peer for r in rows], times, xerr=spread, color=[colour(r.peer, order) for r in rows], capsize=3
        )
        axes.invert_yaxis()
        written.append(_save(figure, folder / f"{result.suite}-{case}-{direction}"))
    return written


def _save(figure: Any, stem: Path) -> Path:
    figure.savefig(stem.with_name(stem.name + ".svg"), metadata={"Date": None})
    figure.savefig(stem.with_name(stem.name + ".png"), dpi=110)
    plt.close(figure)
    return stem.with_name(stem.name + ".svg")
