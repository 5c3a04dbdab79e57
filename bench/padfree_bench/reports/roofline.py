"""The roofline: useful FLOP per useful byte against what was reached, under the ceilings of the same run."""

from itertools import cycle
from typing import Any

from padfree_bench.measuring.results import UPPER_BOUND, Result, Row
from padfree_bench.reports import drawing

# A forward computes 4·D FLOP for every exp2: 2·D for a score and 2·D for its share of the output.
FLOP_PER_EXP2 = 4
GREY = "#57606a"


def _forward(result: Result, dtype: str) -> list[Row]:
    return [row for row in result.rows if (row.dtype, row.direction) == (dtype, "forward")]


def drawn_rows(result: Result, dtype: str) -> list[Row]:
    """The forward rows that a roofline of this dtype shows: right answers that have both rates."""
    rows = _forward(result, dtype)
    return [row for row in rows if row.tflops and row.gb_per_s and row.status != UPPER_BOUND]


def intensity(row: Row) -> float:
    """Useful FLOP per useful byte."""
    return 1e3 * (row.tflops or 0) / (row.gb_per_s or 1)


def ceilings(measured: dict[str, Any], rows: list[Row], dtype: str) -> dict[str, list[tuple[float, float]]]:
    """Each measured limit as a line of two (FLOP / byte, FLOP/s) points.

    Bandwidth, matrix units, and exp2 for every head_dim at which it is the lower of the two roofs. The bandwidth's is
    that of a call whose bytes all cross the memory bus: what a cache keeps may lie above it.
    """
    bandwidth, peak = measured["bytes_per_s"], measured["flops_per_s"][dtype]
    exp2 = {dim: measured["exp2_per_s"] * FLOP_PER_EXP2 * dim for dim in {row.head_dim or 0 for row in rows}}
    flat = {f"exp2, D{dim}": rate for dim, rate in sorted(exp2.items()) if rate < peak}
    flat["matrix units"] = peak
    ridge = peak / bandwidth
    left = min(*map(intensity, rows), min(flat.values()) / bandwidth) / 2
    right = max(*map(intensity, rows), ridge) * 2
    roofs = {name: [(rate / bandwidth, rate), (right, rate)] for name, rate in flat.items()}
    return {"bandwidth, uncached": [(left, left * bandwidth), (ridge, peak)]} | roofs


def figure(result: Result, dtype: str) -> Any:
    """A colour a peer and a marker a head_dim, since each head_dim has its own exp2 roof."""
    rows = drawn_rows(result, dtype)
    title = f"roofline: forward of every case, useful work only, {dtype}, {result.device}"
    drawn, (axes,) = drawing.new_figure(title, drawing.not_run(_forward(result, dtype)), panel_inches=3.6)
    assert result.ceilings is not None
    styles = cycle(("--", "-.", ":", (0, (5, 1)), (0, (1, 1))))
    for label, points in ceilings(result.ceilings, rows, dtype).items():
        style = next(styles) if label.startswith("exp2") else "-"
        xs, ys = zip(*points, strict=True)
        shade = GREY if label.startswith("bandwidth") else "black"
        axes.plot(xs, [y / 1e12 for y in ys], color=shade, linestyle=style, label=label)
    shades = drawing.colours(drawing.timed_peers(result))
    markers = dict(zip(sorted({row.head_dim or 0 for row in rows}), cycle(drawing.MARKERS), strict=False))
    for peer in dict.fromkeys(row.peer for row in rows):
        axes.scatter([], [], s=18, color=shades[peer], label=peer)
        for dim, marker in markers.items():
            own = [row for row in rows if (row.peer, row.head_dim) == (peer, dim)]
            if own:
                reached = [row.tflops for row in own]
                axes.scatter(list(map(intensity, own)), reached, s=18, color=shades[peer], marker=marker)
    for dim, marker in markers.items():
        axes.scatter([], [], s=18, color=GREY, marker=marker, label=f"D{dim}")
    axes.set(xscale="log", yscale="log", xlabel="useful FLOP / byte", ylabel="useful TFLOP/s")
    drawing.label_decades(axes.xaxis)
    drawing.label_decades(axes.yaxis)
    drawing.add_legend(drawn)
    return drawn
