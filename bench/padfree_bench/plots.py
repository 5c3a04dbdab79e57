"""Pictures of result files: speed and memory against length, padding and head_dim, and the roofline."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from padfree_bench.results import UPPER_BOUND, Result, Row

# One colour a peer in every picture; the reds and oranges are padfree's.
COLOURS = [plt.get_cmap("tab20")(index) for index in (0, 4, 8, 10, 14, 16, 18, 1, 5, 9, 11, 15, 17, 19)]
OURS = ("#d62728", "#ff7f0e", "#e377c2", "#8c1a1a", "#bc5090", "#ffb000")
MARKERS = "osD^v<>P*X"


@dataclass(frozen=True)
class Sweep:
    """One line plot: rows of `group` against x, with every other axis fixed by the group's cases."""

    name: str
    group: str
    x_label: str
    x: Callable[[Row], float]
    y_label: str
    y: Callable[[Row], float | None]
    log_x: bool = False
    log_y: bool = True


def _padding_percent(row: Row) -> float:
    return 100 * (1 - (row.valid_fraction or 0))


SWEEPS = [
    Sweep(
        "speed-length",
        "length",
        "padded length S",
        lambda r: r.seq or 0,
        "ms",
        lambda r: r.ms_p50,
        log_x=True,
    ),
    Sweep(
        "memory-length",
        "length",
        "padded length S",
        lambda r: r.seq or 0,
        "peak MiB",
        lambda r: r.peak_mib,
        log_x=True,
    ),
    Sweep("speed-padding", "padding", "padding, % of the batch", _padding_percent, "ms", lambda r: r.ms_p50),
    Sweep(
        "memory-padding",
        "padding",
        "padding, % of the batch",
        _padding_percent,
        "peak MiB",
        lambda r: r.peak_mib,
    ),
    Sweep(
        "speed-head-dim",
        "imdb",
        "head_dim D",
        lambda r: r.head_dim or 0,
        "valid tokens/s",
        lambda r: r.tokens_per_s,
        log_x=True,
    ),
    Sweep(
        "speed-batch",
        "batch",
        "batch B",
        lambda r: r.batch or 0,
        "valid tokens/s",
        lambda r: r.tokens_per_s,
        log_x=True,
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


def draw_all(result: Result, folder: Path) -> list[Path]:
    """Write every picture the file has rows for, as SVG and PNG; returns the SVG paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for sweep in SWEEPS:
        for dtype, direction, rows in _panels(result, sweep):
            name = f"{result.suite}-{sweep.name}-{direction}-{dtype}"
            written.append(_save(_sweep_figure(result, sweep, rows, dtype, direction), folder / name))
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


def _panels(result: Result, sweep: Sweep) -> list[tuple[str, str, list[Row]]]:
    rows = [row for row in result.rows if row.group == sweep.group and sweep.y(row) is not None]
    if sweep.name == "speed-head-dim":
        rows = [row for row in rows if row.seq == 400]
    keys = dict.fromkeys((row.dtype, row.direction) for row in rows)
    panels = [(d, way, [r for r in rows if (r.dtype, r.direction) == (d, way)]) for d, way in keys]
    return [panel for panel in panels if len({sweep.x(row) for row in panel[2]}) > 1]


def _new_figure(title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(8.4, 4.8), layout="constrained")
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    return figure, axes


def _sweep_figure(result: Result, sweep: Sweep, rows: list[Row], dtype: str, direction: str) -> Any:
    figure, axes = _new_figure(f"{result.device}, {dtype}, {direction}", sweep.x_label, sweep.y_label)
    order = timed_peers(result)
    for index, peer in enumerate(order):
        points = sorted((sweep.x(row), sweep.y(row) or 0) for row in rows if row.peer == peer)
        if points:
            upper = any(row.peer == peer and row.status == UPPER_BOUND for row in rows)
            axes.plot(
                *zip(*points, strict=True),
                marker=MARKERS[index % len(MARKERS)],
                markersize=4,
                color=colour(peer, order),
                linestyle=":" if upper else "-",
                linewidth=2.2 if peer.startswith("padfree") else 1.2,
                label=f"{peer} (wrong answer)" if upper else peer,
            )
    if sweep.log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
    if sweep.log_y:
        axes.set_yscale("log")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _roofline_figure(result: Result, rows: list[Row], dtype: str) -> Any:
    """Useful FLOP per useful byte against what was reached, under the ceilings of the same run."""
    figure, axes = _new_figure(
        f"{result.device}, {dtype}, forward, useful work only", "useful FLOP / byte", "useful TFLOP/s"
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
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _bar_figures(result: Result, folder: Path) -> list[Path]:
    """Whole models and loops: one bar an implementation, with its p20 to p80."""
    written = []
    tables: dict[tuple[str, str], list[Row]] = {}
    for row in result.rows:
        if row.timed:
            tables.setdefault((row.case, row.direction), []).append(row)
    order = timed_peers(result)
    for (case, direction), rows in tables.items():
        figure, axes = _new_figure(f"{result.device}: {case}, {direction}", "ms (p20 to p80)", "")
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
    # No date inside, so that drawing the same figures twice changes no byte.
    figure.savefig(stem.with_name(stem.name + ".svg"), metadata={"Date": None})
    figure.savefig(stem.with_name(stem.name + ".png"), dpi=110)
    plt.close(figure)
    return stem.with_name(stem.name + ".svg")
