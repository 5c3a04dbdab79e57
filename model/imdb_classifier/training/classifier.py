"""Answers for texts: a checkpoint that is loaded once, and any number of reviews in the memory of a few batches."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from imdb_classifier.checkpoints.run_folder import resolve
from imdb_classifier.checkpoints.weights import load_classifier
from imdb_classifier.configuration import LABELS
from imdb_classifier.data.batches import REVIEWS_AT_A_TIME, WINDOW_IN_BATCHES, TokenizedReviews
from imdb_classifier.data.rows import check_text, show
from imdb_classifier.data.tokenization import encode
from imdb_classifier.messages import NonFiniteError, UserError
from imdb_classifier.modeling import TextClassifier
from imdb_classifier.training import inference
from imdb_classifier.training.launcher import MAX_BATCH_SIZE, check_batch_size, make_accelerator


class Prediction(NamedTuple):
    """The `label` of a review, NEGATIVE or POSITIVE, its `probability`, and the `logit` of POSITIVE."""

    label: str
    probability: float
    logit: float


class Classifier:
    """A checkpoint that answers texts in their order: `classifier(texts)` all at once, `stream` as they come.

    Threads may share it and take turns. Several processes (torchrun) must ask for the same texts; each gets every
    answer.

    Attributes:
        accelerator: has the device, the precision and the processes.
        attention, reason: which attention runs, and why.
    """

    def __init__(
        self,
        model: TextClassifier,
        tokenizer: PreTrainedTokenizerFast,
        accelerator: Accelerator,
        *,
        attention: str,
        reason: str,
        batch_size: int,
        buckets: int = 0,
    ):
        self.max_length = model.config.max_length
        self.model = accelerator.prepare(model)
        self.tokenizer, self.accelerator, self.batch_size = tokenizer, accelerator, batch_size
        self.attention, self.reason, self.buckets = attention, reason, buckets
        # Of one thread, which may ask again in `after_batch`.
        self._turn = threading.RLock()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        attention: str = "auto",
        precision: str = "fp32",
        batch_size: int = 64,
        device: str | None = None,
        compiled: bool = False,
    ) -> "Classifier":
        """The classifier of a checkpoint, which is verified as in `load_classifier`.

        Args:
            path: the checkpoint's folder, or a run's for its best one.
            attention: one of `ATTENTION_NAMES`.
            precision: of the arithmetic, "fp32", "bf16" or "fp16"; weights stay fp32. One process keeps to one.
            batch_size: reviews at a time; `WINDOW_IN_BATCHES` batches are sorted by length together.
            device: "cpu", or None for a GPU if there is one.
            compiled: through torch.compile, which takes minutes at first and pays for very many reviews.

        Raises:
            ValueError: a precision, batch size or device that there is not.
            UserError: there is no such checkpoint, it is damaged, or what was asked for cannot run here.
        """
        if precision not in inference.DTYPES:
            raise ValueError(f"precision must be one of {', '.join(inference.DTYPES)}, got {precision!r}")
        if not (isinstance(batch_size, int) and 1 <= batch_size <= MAX_BATCH_SIZE):
            wanted = f"a whole number from 1 to {MAX_BATCH_SIZE:,}"
            raise ValueError(f"batch_size must be {wanted}, got {batch_size!r}")
        folder = resolve(Path(path))
        accelerator = make_accelerator(precision, device == "cpu", compiled)
        here = accelerator.device.type
        if device not in (None, here):
            raise ValueError(f"device must be None or {here!r}, which this process uses, got {device!r}")
        check_batch_size(batch_size, accelerator)
        name, reason = inference.resolve_attention(attention, accelerator, precision)
        model, tokenizer = load_classifier(folder, name)
        return cls(
            model,
            tokenizer,
            accelerator,
            attention=name,
            reason=reason,
            batch_size=batch_size,
            buckets=inference.buckets_for(compiled),
        )

    def __call__(self, texts: Iterable[str]) -> list[Prediction]:
        """The answers to all texts; raises what `stream` raises."""
        return list(self.stream(texts))

    def stream(
        self, texts: Iterable[str], after_batch: Callable[[int], None] = lambda reviews: None
    ) -> Iterator[Prediction]:
        """The answers one by one, however many texts there are: `WINDOW_IN_BATCHES` batches are held at a time.

        Args:
            texts: read no further than the window whose answers are asked for.
            after_batch: called with the number of its reviews after each batch.

        Raises:
            TypeError: `texts` is a single string, or one of them is no string; the message says which.
            ValueError: a text is blank or no valid Unicode.
            UserError: the tokenizer cannot encode a text.
            NonFiniteError: a logit is NaN or infinite.
        """
        if isinstance(texts, str):
            raise TypeError("texts is a single string, expected several: put it into a list")
        return self._stream(enumerate(texts), after_batch)

    def _stream(
        self, texts: Iterator[tuple[int, str]], after_batch: Callable[[int], None]
    ) -> Iterator[Prediction]:
        size = WINDOW_IN_BATCHES * self.batch_size
        # Without a name the window is gone before the next one is read.
        while answers := self._answer(list(islice(texts, size)), after_batch):
            yield from answers

    def _answer(self, window: list[tuple[int, str]], after_batch: Callable[[int], None]) -> list[Prediction]:
        if not window:
            return []
        for position, text in window:
            _check(f"texts[{position}]", text)
        # The tokenizer holds the settings of a call, and accelerate its loaders.
        with self._turn:
            z = self._logits([text for _, text in window], window[0][0] + 1, after_batch)
        pairs = zip(z.tolist(), z.sigmoid().tolist(), strict=True)
        return [Prediction(LABELS[int(logit > 0)], max(p, 1 - p), logit) for logit, p in pairs]

    def _logits(self, texts: list[str], first: int, after_batch: Callable[[int], None]) -> Tensor:
        ids: list[list[int]] = []
        for at in range(0, len(texts), REVIEWS_AT_A_TIME):
            ids += encode(self.tokenizer, texts[at : at + REVIEWS_AT_A_TIME], self.max_length)
        data = TokenizedReviews.from_lists(ids, [0] * len(ids))
        try:
            return inference.evaluate(
                self.model,
                data,
                self.accelerator,
                batch_size=self.batch_size,
                buckets=self.buckets,
                after_batch=after_batch,
            ).z
        except NonFiniteError as error:
            raise NonFiniteError(f"reviews {first:,} to {first + len(texts) - 1:,}: {error}") from None
        finally:
            # accelerate keeps every loader that it was ever given, and with it these reviews.
            self.accelerator._dataloaders.clear()


def _check(where: str, text: Any) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{where} is {show(text)}, expected a string")
    if not text.strip():
        raise ValueError(f"{where} is blank, expected a review")
    try:
        check_text(where, text)
    except UserError as error:
        raise ValueError(str(error)) from None
