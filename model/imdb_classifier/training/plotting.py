"""The picture of a run: loss and accuracy by epoch."""

from pathlib import Path
from typing import Any

import matplotlib

# Before pyplot looks for a display.
matplotlib.use("Agg")
from matplotlib import pyplot


def plot_history(history: list[dict[str, Any]], path: Path) -> None:
    """Draw the epochs' records (`loss`, `*_accuracy`) to a PNG at `path`."""
    epochs = [record["number"] for record in history]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.plot(epochs, [record["loss"] for record in history], marker="o", label="train")
    left.plot(epochs, [record["validation_loss"] for record in history], marker="o", label="validation")
    left.set(xlabel="epoch", ylabel="loss (binary cross entropy)", xticks=epochs)
    for name in ("train", "validation", "test"):
        right.plot(epochs, [record[f"{name}_accuracy"] for record in history], marker="o", label=name)
    best = max(history, key=lambda record: record["validation_accuracy"])
    right.axvline(best["number"], color="grey", linestyle=":", label="chosen on validation")
    right.set(xlabel="epoch", ylabel="accuracy", xticks=epochs)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
