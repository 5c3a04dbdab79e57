"""What every picture shares: colours, a width that a phone shows unscaled, the note on what did not run, saving."""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
# With no date inside either, drawing the same figures twice changes no byte.
matplotlib.rcParams["svg.hashsalt"] = "padfree"
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from padfree_bench.measuring.results import Result, Row

# One colour a peer in every picture; the reds and oranges are padfree's.
COLOURS = [plt.get_cmap("tab20")(index) for index in (0, 4, 8, 10, 14, 16, 18, 1, 5, 9, 11, 15, 17, 19)]
OURS = ("#d62728", "#ff7f0e", "#e377c2", "#8c1a1a", "#bc5090", "#ffb000")
MARKERS = "osD^v<>P*X"
# 420 CSS pixels: letters of 9 points stay 11 pixels high on a page 400 wide.
WIDTH_INCHES = 4.4
TITLE_COLUMNS = 50


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


def not_run(rows: list[Row]) -> str:
    """What a picture of these rows is about and does not show: padfree, where none of its rows has a figure."""
    ours = [row for row in rows if row.peer.startswith("padfree")]
    if not ours or any(row.timed or row.peak_mib is not None for row in ours):
        return ""
    return f"padfree: not run ({ours[0].reason.partition(':')[0]})"


def new_figure(title: str, note: str, panels: int = 1, panel_inches: float = 2.9) -> tuple[Any, list[Any]]:
    """A column of panels under its title; the note stands between them, where nobody misses it."""
    lines = textwrap.wrap(title, TITLE_COLUMNS) + ([note] if note else [])
    height = panel_inches * panels + 0.2 * len(lines)
    figure, axes = plt.subplots(
        panels, 1, figsize=(WIDTH_INCHES, height), squeeze=False, layout="constrained"
    )
    figure.suptitle("\n".join(lines), fontsize=10)
    figure.set_label(", ".join(part for part in (title, note) if part))
    for panel in axes[:, 0]:
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=9)
    return figure, list(axes[:, 0])


def add_legend(figure: Any, title: str | None = None) -> None:
    """What the panels show, once, below them; the figure grows by it, so that no panel shrinks."""
    entries = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    columns = 2 if len(entries) > 2 else 1
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.19 * (-(-len(entries) // columns) + bool(title)) + 0.1)
    figure.legend(
        entries.values(),
        entries.keys(),
        title=title,
        title_fontsize=9,
        fontsize=9,
        ncols=columns,
        loc="outside lower center",
        frameon=False,
        columnspacing=1.0,
        handletextpad=0.5,
        labelspacing=0.3,
    )


def save_figure(figure: Any, stem: Path) -> Path:
    """Write stem.svg and stem.png; the SVG says in words what it is a picture of."""
    figure.savefig(stem.with_name(stem.name + ".svg"), metadata={"Date": None, "Title": figure.get_label()})
    figure.savefig(stem.with_name(stem.name + ".png"), dpi=160)
    plt.close(figure)
    return stem.with_name(stem.name + ".svg")


def label_decades(axis: Any) -> None:
    """1, 2 and 5 of every decade on a logarithmic axis in plain figures; the decades alone where there are many."""
    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high < 300 * low else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1e6:,g} M" if value >= 1e6 else f"{value:,g}")
    )
    axis.set_minor_formatter(NullFormatter())
