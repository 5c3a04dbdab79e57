"""What every picture shares: style, colours, a width that a phone shows unscaled, the note on what did not run, saving."""

import textwrap
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

from padfree_bench.measuring.results import Result, Row
from padfree_bench.reports.standing import is_ours

STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.titlesize": 10,
    "axes.titlesize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.title_fontsize": 9,
    "legend.frameon": False,
    "legend.columnspacing": 1.0,
    "legend.handletextpad": 0.5,
    "legend.labelspacing": 0.3,
    "savefig.dpi": 160,
    # With no date inside either, drawing the same figures twice changes no byte.
    "svg.hashsalt": "padfree",
}
# One colour a peer in every picture; the reds and oranges are padfree's.
COLOURS = [plt.get_cmap("tab20")(index) for index in (0, 4, 8, 10, 14, 16, 18, 1, 5, 9, 11, 15, 17, 19)]
OURS = ("#d62728", "#ff7f0e", "#e377c2", "#8c1a1a", "#bc5090", "#ffb000")
MARKERS = "osD^v<>P*X"
# 420 CSS pixels: letters of 9 points stay 11 pixels high on a page 400 wide.
WIDTH_INCHES = 4.4
TITLE_COLUMNS = 50


def colours(peers: list[str]) -> dict[str, Any]:
    """By peer its colour, which its place among these decides."""
    ours, others = cycle(OURS), zip(peers, cycle(COLOURS), strict=False)
    return {peer: next(ours) if is_ours(peer) else colour for peer, colour in others}


def has_figure(row: Row) -> bool:
    return row.timed or row.peak_mib is not None


def timed_peers(result: Result) -> list[str]:
    """The peers that have figures, in the file's order: it decides their colours and markers."""
    return list(dict.fromkeys(row.peer for row in result.rows if has_figure(row)))


def not_run(rows: list[Row]) -> str:
    """What a picture of these rows is about and does not show: padfree, where none of its rows has a figure."""
    ours = [row for row in rows if row.peer.startswith("padfree")]
    if not ours or any(map(has_figure, ours)):
        return ""
    return f"padfree: not run ({ours[0].reason.partition(':')[0]})"


def new_figure(title: str, note: str, panels: int = 1, panel_inches: float = 2.9) -> tuple[Any, list[Any]]:
    """A column of panels under its title; the note stands between them, where nobody misses it."""
    lines = textwrap.wrap(title, TITLE_COLUMNS) + ([note] if note else [])
    size = WIDTH_INCHES, panel_inches * panels + 0.2 * len(lines)
    figure, axes = plt.subplots(panels, 1, figsize=size, squeeze=False, layout="constrained")
    figure.suptitle("\n".join(lines))
    figure.set_label(", ".join(filter(None, (title, note))))
    return figure, list(axes[:, 0])


def add_legend(figure: Any, title: str | None = None) -> None:
    """What the panels show, once, below them; the figure grows by it, so that no panel shrinks."""
    shown = [axes.get_legend_handles_labels() for axes in figure.axes]
    entries = {label: handle for pair in shown for handle, label in zip(*pair, strict=True)}
    columns = 2 if len(entries) > 2 else 1
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.19 * (-(-len(entries) // columns) + bool(title)) + 0.1)
    where = "outside lower center"
    figure.legend(entries.values(), entries.keys(), title=title, ncols=columns, loc=where)


def save_figure(figure: Any, stem: Path) -> Path:
    """Write stem.svg and stem.png; the SVG says in words what it is a picture of."""
    figure.savefig(f"{stem}.svg", metadata={"Date": None, "Title": figure.get_label()})
    figure.savefig(f"{stem}.png")
    plt.close(figure)
    return Path(f"{stem}.svg")


def label_decades(axis: Any) -> None:
    """1, 2 and 5 of every decade on a logarithmic axis in plain figures; the decades alone where there are many."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axis.set_major_formatter(lambda x, _: f"{x / 1e6:,g} M" if x >= 1e6 else f"{x:,g}")
    axis.set_minor_formatter(NullFormatter())
