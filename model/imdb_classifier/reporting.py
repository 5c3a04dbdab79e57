"""What a run tells: a progress bar or plain lines, metrics as JSON lines and TensorBoard, a plot."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from imdb_classifier.checkpoint import Position

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "curves.png"
SECONDS_BETWEEN_LINES = 10.0


class Reporter:
    """Writes only where `active` (the main process); every method may be called everywhere."""

    def __init__(self, run_folder: Path, active: bool, position: Position):
        self.run_folder = run_folder
        self.active = active
        self._bar: Any = None
        self._board: Any = None
        self._said_at = 0.0
        if active:
            self._drop_metrics_after(position)
            self._file = (run_folder / METRICS_FILE).open("a", encoding="utf-8")
            self._board = self._open_board()

    def _drop_metrics_after(self, position: Position) -> None:
        """A resumed run repeats the batches after its checkpoint; their old lines would stand twice."""
        path = self.run_folder / METRICS_FILE
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                if Position(record["epoch"], record["batch"]) <= position:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                # The last line of a killed run may be cut short.
                continue
        rewritten = path.with_name(f".{path.name}")
        rewritten.write_text("".join(kept), encoding="utf-8")
        rewritten.replace(path)

    def _open_board(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.say("TensorBoard log: not written, pip install tensorboard to have one")
            return None
        return SummaryWriter(str(self.run_folder / "tensorboard"))

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
        self._label = f"epoch {number}/{epochs}"
        self._total = total
        self._done_before, self._began, self._reviews = done, time.monotonic(), 0
        self._said_at = self._began
        if self.active and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=self._label, unit="batch", leave=False)

    def step(self, done: int, reviews: int, mean_loss: float) -> None:
        """After each batch: `done` batches of the epoch, `reviews` in this one, the epoch's mean loss so far."""
        self._reviews += reviews
        now = time.monotonic()
        rate = self._reviews / max(now - self._began, 1e-9)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            self._bar.set_postfix_str(f"loss {mean_loss:.4f}, {rate:,.0f} reviews/s", refresh=False)
        elif now - self._said_at >= SECONDS_BETWEEN_LINES:
            self._said_at = now
            self.say(
                f"{self._label}: batch {done}/{self._total}, loss {mean_loss:.4f}, {rate:,.0f} reviews/s"
            )

    def end_epoch(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def plot(self, history: list[dict[str, Any]]) -> None:
        if not self.active:
            return
        try:
            from imdb_classifier.plotting import plot_history

            plot_history(history, self.run_folder / PLOT_FILE)
        except ModuleNotFoundError as error:
            self.say(f"plot: not drawn, pip install {error.name} to have one")

    def close(self) -> None:
        self.end_epoch()
        if self.active:
            self._file.close()
            if self._board is not None:
                self._board.close()
