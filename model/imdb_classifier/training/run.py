"""What a training run is made of: its state, the request to stop it, and the objects that work together in it."""

import dataclasses
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from imdb_classifier.checkpoints.run_folder import Position
from imdb_classifier.data.batches import TokenizedReviews
from imdb_classifier.modeling import TextClassifier
from imdb_classifier.training import inference
from imdb_classifier.training.reporting import Reporter
from imdb_classifier.training.watch import Watch

# A captured graph costs a second and not a compilation, so that there may be more of them.
GRAPH_BUCKETS = 16


@dataclass
class RunState:
    """What a checkpoint must know beside tensors. The sums are over the current epoch's batches so far."""

    position: Position = field(default_factory=Position)
    step: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: Position | None = None
    # fp16 steps that the scaler left out since the last one that was taken
    skipped_in_a_row: int = 0

    @property
    def best_record(self) -> dict[str, Any] | None:
        """The history's entry for the checkpoint that `best` names."""
        return None if self.best is None else self.history[self.best.epoch - 1]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "RunState":
        position, best = Position(**content["position"]), content["best"]
        return cls(**{**content, "position": position, "best": best and Position(**best)})


class StopRequest:
    """Ctrl-C and SIGTERM as a request that the loop answers between two steps.

    A context manager that notes the first signal in `number` and leaves at once on the second.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:
                # Only the main thread may install handlers; elsewhere no signal arrives.
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            os._exit(128 + number)
        self.number = number
        # os.write, because a signal may arrive in the middle of a print.
        descriptor = sys.__stderr__.fileno() if sys.__stderr__ else 2
        os.write(descriptor, b"\nstopping after this step; again to stop at once\n")


@dataclass
class Run:
    """One training run. `settings` are the choices that decide its result and that a resumed run must repeat."""

    folder: Path
    options: Namespace
    settings: dict[str, Any]
    attention: str
    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    tokenizer: PreTrainedTokenizerFast
    data: dict[str, TokenizedReviews]
    stop: StopRequest = field(default_factory=StopRequest)
    reporter: Reporter = field(init=False)
    watch: Watch = field(init=False)
    # Trains on a batch, the collator's without `rows`.
    step: Callable[[dict[str, Any]], None] = field(init=False)
    state: RunState = field(default_factory=RunState)
    saved_at: Position | None = None
    # Position after each step that the host has not read the outcome of, with its rows on the device.
    unread: list[tuple[Position, Tensor]] = field(default_factory=list)
    steps_read: int = 0
    # Beside the state: a clock would make equal runs write different checkpoints.
    epoch_began: float = 0.0
    # Of the epoch, in which the host waited for a batch.
    input_seconds: float = 0.0

    @property
    def buckets(self) -> int:
        """Of `Collator`: how many lengths batches are filled up to."""
        return GRAPH_BUCKETS if self.options.cuda_graphs else inference.buckets_for(self.options.compile)

    @property
    def workers(self) -> int:
        given: int | None = self.options.workers
        return inference.workers_for(self.accelerator) if given is None else given

    @property
    def bare_model(self) -> TextClassifier:
        """The model without what accelerate wraps around it: its names are those that a checkpoint holds."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, TextClassifier):
            kind, found = type(self.model).__name__, type(model).__name__
            raise TypeError(f"expected a TextClassifier inside {kind}, got {found}")
        return model
