"""What a run tells: a progress bar or plain lines, metrics as JSON lines and TensorBoard, a plot."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from imdb_classifier.checkpoints.run_folder import BOARD_FOLDER, METRICS_FILE, PLOT_FILE, Position

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """How far a pass over reviews is: a bar where standard error is a terminal, else a line every ten seconds.

    Args:
        label: what is going on, at the front of bar and line.
        total: steps of the whole pass, each a `unit`, or None where nobody knows; `done` of them are behind it already.
        say: where the lines go.
        active: False tells nothing.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str,
        say: Callable[[str], None],
        done: int = 0,
        active: bool = True,
    ):
        self.label, self.total, self.unit, self.say, self.done = label, total, unit, say, done
        self.active = active
        self._began = self._said_at = time.monotonic()
        self._reviews = 0
        # Without `disable=None` it would be drawn into a file as well.
        disable = None if active else True
        self._bar = tqdm(total=total, initial=done, desc=label, unit=unit, leave=False, disable=disable)

    def advance(self, steps: int, reviews: int, note: str = "") -> None:
        """After `steps` more steps, in which `reviews` were computed; `note` stands before their rate."""
        self.done += steps
        if self.total is not None:
            self.done = min(self.done, self.total)
        self._reviews += reviews
        now = time.monotonic()
        rate = f"{note}{self._reviews / max(now - self._began, 1e-9):,.0f} reviews/s"
        if not self._bar.disable:
            self._bar.update(self.done - self._bar.n)
            self._bar.set_postfix_str(rate, refresh=False)
        elif self.active and now - self._said_at >= SECONDS_BETWEEN_LINES:
            self._said_at = now
            of_total = "" if self.total is None else f"/{self.total:,}"
            self.say(f"{self.label}: {self.unit} {self.done:,}{of_total}, {rate}")

    def after_batch(self, reviews: int) -> None:
        """`advance` where a step is a review."""
        self.advance(reviews, reviews)

    def hide(self) -> None:
        """Take the bar off the terminal until the next step, so that a line can be printed in its place."""
        self._bar.clear()

    def close(self) -> None:
        self._bar.close()


@contextmanager
def progress_of(label: str, reviews: int | None, active: bool) -> Iterator[Progress]:
    """For a command whose standard output is its result: tells on standard error how many of `reviews` are done."""
    say = partial(print, file=sys.stderr, flush=True)
    with closing(Progress(label, reviews, "review", say, active=active)) as progress:
        yield progress


class Reporter:
    """Writes only where `active` (the main process); every method may be called everywhere."""

    def __init__(self, run_folder: Path, active: bool, position: Position):
        self.run_folder = run_folder
        self.active = active
        # Of the epoch so far, as it was last read from the device.
        self.mean_loss: float | None = None
        self._progress: Progress | None = None
        self._board: Any = None
        if active:
            drop_metrics_after(position, run_folder / METRICS_FILE)
            self._file = (run_folder / METRICS_FILE).open("a", encoding="utf-8")
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(run_folder / BOARD_FOLDER))
            except ImportError:
                self.say("TensorBoard log: not written, pip install tensorboard to have one")

    def say(self, line: str) -> None:
        if self.active:
            print(line, flush=True)

    def metrics(self, position: Position, step: int, values: dict[str, Any]) -> None:
        """One JSON line, and a TensorBoard point at `step` for each number."""
        if not self.active:
            return
        record = {"epoch": position.epoch, "batch": position.batch, "step": step, **values}
        self._file.write(json.dumps(record, sort_keys=True) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, step)

    def start_epoch(self, number: int, epochs: int, done: int, total: int) -> None:
        self.mean_loss = None
        if self.active:
            self._progress = Progress(f"epoch {number}/{epochs}", total, "batch", self.say, done)

    def step(self, done: int, reviews: int) -> None:
        """After each batch: `done` batches of the epoch, `reviews` in this one."""
        if self._progress is not None:
            known = "" if self.mean_loss is None else f"loss {self.mean_loss:.4f}, "
            self._progress.advance(done - self._progress.done, reviews, known)

    def end_epoch(self) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None

    def plot(self, history: list[dict[str, Any]]) -> None:
        if not self.active:
            return
        try:
            plot_history(history, self.run_folder / PLOT_FILE)
        except ModuleNotFoundError as error:
            self.say(f"plot: not drawn, pip install {error.name} to have one")

    def close(self) -> None:
        self.end_epoch()
        if self.active:
            self._file.close()
            if self._board is not None:
                self._board.close()


def drop_metrics_after(position: Position, path: Path) -> None:
    """A resumed run repeats the batches after its checkpoint; their old lines would stand twice."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        # The last line of a killed run may be cut short.
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            if Position(record["epoch"], record["batch"]) <= position:
                kept.append(line + "\n")
    rewritten = path.with_name(f".{path.name}")
    rewritten.write_text("".join(kept), encoding="utf-8")
    rewritten.replace(path)


def plot_history(history: list[dict[str, Any]], path: Path) -> None:
    """Draw the epochs' records (`loss`, `*_accuracy`) to a PNG at `path`."""
    # Without pyplot, which would look for a display.
    from matplotlib.figure import Figure

    epochs = [record["number"] for record in history]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    curves = [(left, "train", "loss"), (left, "validation", "validation_loss")]
    curves += [(right, name, f"{name}_accuracy") for name in ("train", "validation", "test")]
    for axes, label, key in curves:
        axes.plot(epochs, [record[key] for record in history], marker="o", label=label)
    best = max(history, key=lambda record: record["validation_accuracy"])
    right.axvline(best["number"], color="grey", linestyle=":", label="chosen on validation")
    for axes, ylabel in ((left, "loss (binary cross entropy)"), (right, "accuracy")):
        axes.set(xlabel="epoch", ylabel=ylabel, xticks=epochs)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
