"""The roofline: useful FLOP per useful byte against what was reached, under the ceilings of the same run."""

from dataclasses import dataclass
from typing import Any

from padfree_bench.measuring.results import UPPER_BOUND, Result, Row
from padfree_bench.reports.drawing import (
    MARKERS,
    add_legend,
    colour,
    label_decades,
    new_figure,
    not_run,
    timed_peers,
)

# A forward computes 4·D FLOP for every exp2: 2·D for a score and 2·D for its share of the output.
FLOP_PER_EXP2 = 4


@dataclass(frozen=True)
class Ceiling:
    """One measured limit as a line of (FLOP / byte, FLOP/s) points."""

    label: str
    points: tuple[tuple[float, float], tuple[float, float]]


def drawn_rows(result: Result, dtype: str) -> list[Row]:
    """The forward rows that a roofline of this dtype shows: right answers that have both rates."""
    return [
        row
        for row in result.rows
        if row.dtype == dtype
        and row.direction == "forward"
        and row.tflops
        and row.gb_per_s
        and row.status != UPPER_BOUND
    ]


def intensity(row: Row) -> float:
    """Useful FLOP per useful byte."""
    return 1e3 * (row.tflops or 0) / (row.gb_per_s or 1)


def ceilings(measured: dict[str, Any], rows: list[Row], dtype: str) -> list[Ceiling]:
    """Bandwidth, matrix units, and exp2 for every head_dim at which it is the lower of the two roofs.

    The bandwidth's is that of a call whose bytes all cross the memory bus: what a cache keeps may lie above it.
    """
    bandwidth, peak = measured["bytes_per_s"], measured["flops_per_s"][dtype]
    exp2 = {dim: measured["exp2_per_s"] * FLOP_PER_EXP2 * dim for dim in {row.head_dim or 0 for row in rows}}
    flat = {f"exp2, D{dim}": rate for dim, rate in sorted(exp2.items()) if rate < peak}
    flat["matrix units"] = peak
    ridge = peak / bandwidth
    left = min(*(intensity(row) for row in rows), min(flat.values()) / bandwidth) / 2
    right = max(*(intensity(row) for row in rows), ridge) * 2
    slope = Ceiling("bandwidth, uncached", ((left, left * bandwidth), (ridge, peak)))
    return [
        slope,
        *(Ceiling(name, ((rate / bandwidth, rate), (right, rate))) for name, rate in flat.items()),
    ]


def figure(result: Result, dtype: str) -> Any:
    """A colour a peer and a marker a head_dim, since each head_dim has its own exp2 roof."""
    rows = drawn_rows(result, dtype)
    note = not_run([row for row in result.rows if row.dtype == dtype and row.direction == "forward"])
    title = f"roofline: forward of every case, useful work only, {dtype}, {result.device}"
    drawn, (axes,) = new_figure(title, note, panel_inches=3.6)
    assert result.ceilings is not None
    dims = sorted({row.head_dim or 0 for row in rows})
    styles = iter(("--", "-.", ":", (0, (5, 1)), (0, (1, 1))) * len(dims))
    for ceiling in ceilings(result.ceilings, rows, dtype):
        style = next(styles) if ceiling.label.startswith("exp2") else "-"
        xs, ys = zip(*ceiling.points, strict=True)
        shade = "#57606a" if ceiling.label.startswith("bandwidth") else "black"
        axes.plot(xs, [y / 1e12 for y in ys], color=shade, linestyle=style, label=ceiling.label)
    order = timed_peers(result)
    for peer in dict.fromkeys(row.peer for row in rows):
        axes.scatter([], [], s=18, color=colour(peer, order), label=peer)
        for index, dim in enumerate(dims):
            points = [(intensity(row), row.tflops) for row in rows if (row.peer, row.head_dim) == (peer, dim)]
            if points:
                axes.scatter(
                    *zip(*points, strict=True),
                    s=18,
                    color=colour(peer, order),
                    marker=MARKERS[index % len(MARKERS)],
                )
    for index, dim in enumerate(dims):
        axes.scatter([], [], s=18, color="#57606a", marker=MARKERS[index % len(MARKERS)], label=f"D{dim}")
    axes.set(xscale="log", yscale="log", xlabel="useful FLOP / byte", ylabel="useful TFLOP/s")
    label_decades(axes.xaxis)
    label_decades(axes.yaxis)
    add_legend(drawn)
    return drawn
