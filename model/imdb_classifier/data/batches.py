"""From reviews to batches: tokenized once, kept by content, in an order that a seed fixes."""

import hashlib
import json
import signal
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub import constants
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerFast

from imdb_classifier.data.rows import Split
from imdb_classifier.data.tokenization import encode

# Batches that are sorted by length together; wide enough to save padding, narrow enough to keep batches random.
WINDOW_IN_BATCHES = 32
# Part of the cache's key, so that a file of another layout is never looked at.
CACHE_FORMAT = 2
DIGEST_BYTES = 32
# A call of the tokenizer keeps offsets, masks and the cut-off rest of all its texts until it returns.
REVIEWS_AT_A_TIME = 1_000
# Writing a cache file takes seconds: what has stood half written for a day was left by a kill.
LEFTOVER_SECONDS = 24 * 3600


class Drawn(NamedTuple):
    """B reviews out of a split: their token ids end to end int32 [T], lengths [B], labels [B], row numbers [B]."""

    ids: Tensor
    lengths: Tensor
    labels: Tensor
    rows: Tensor


class TokenizedReviews(torch.utils.data.Dataset):
    """Token ids of one split in two flat tensors: review i is ids[starts[i]:starts[i + 1]]."""

    def __init__(self, ids: Tensor, lengths: Tensor, labels: Sequence[int]):
        self.ids = ids
        self.starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        self.labels = torch.tensor(labels, dtype=torch.int64)

    @classmethod
    def from_lists(cls, token_ids: Sequence[Sequence[int]], labels: Sequence[int]) -> "TokenizedReviews":
        flat = torch.tensor([token for ids in token_ids for token in ids], dtype=torch.int32)
        return cls(flat, torch.tensor([len(ids) for ids in token_ids], dtype=torch.int64), labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> Tensor:
        return self.ids[self.starts[row] : self.starts[row + 1]]

    def __getitems__(self, rows: Sequence[int]) -> Drawn:
        """A whole batch at once, which is what a DataLoader asks for."""
        at = torch.as_tensor(rows)
        starts = self.starts[at]
        lengths = self.starts[at + 1] - starts
        ends = lengths.cumsum(0)
        where = torch.arange(int(ends[-1])) + (starts - ends + lengths).repeat_interleave(lengths)
        return Drawn(self.ids[where], lengths, self.labels[at], at)

    @property
    def lengths(self) -> list[int]:
        lengths: list[int] = self.starts.diff().tolist()
        return lengths


def tokenize(
    split: Split, tokenizer: PreTrainedTokenizerFast, max_length: int, cache_dir: Path | None = None
) -> TokenizedReviews:
    """Token ids of every review, cut at `max_length`; computed once and kept on disk by content.

    The cache file's name is a digest of the texts, the tokenizer and `max_length`, so it cannot be stale; a file
    that is not as it was written is made anew. It is mapped into memory, so nothing may write into it while it is in
    use; this function only ever puts another file in its place.
    """
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    # Calls leave their truncation and padding behind in the tokenizer; they are not part of what it is.
    settings |= {"truncation": None, "padding": None}
    key = [CACHE_FORMAT, max_length, tokenizer.truncation_side, settings, split.texts]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    folder = cache_dir or Path(constants.HF_HOME) / "imdb_classifier"
    folder.mkdir(parents=True, exist_ok=True)
    cache_file = folder / f"tokens-{digest}.bin"
    tokens = _read_cache(cache_file)
    if tokens is None:
        ids = []
        for at in range(0, len(split), REVIEWS_AT_A_TIME):
            encoded = encode(tokenizer, split.texts[at : at + REVIEWS_AT_A_TIME], max_length)
            ids += [torch.tensor(review, dtype=torch.int32) for review in encoded]
        lengths = torch.tensor([len(review) for review in ids], dtype=torch.int32)
        tokens = torch.cat([torch.tensor([len(ids)], dtype=torch.int32), lengths, *ids])
        _write_whole(cache_file, _sha256(tokens) + tokens.numpy().tobytes())
    reviews = int(tokens[0])
    return TokenizedReviews(tokens[1 + reviews :], tokens[1 : 1 + reviews], split.labels)


def _read_cache(file: Path) -> Tensor | None:
    """The int32 numbers of a cache file behind their SHA-256, mapped into memory; None unless it is as it was written.

    They are the number of reviews, the length of each, and all token ids.
    """
    size = file.stat().st_size if file.is_file() else 0
    if size % 4 or size <= DIGEST_BYTES:
        return None
    numbers = torch.from_file(str(file), shared=False, size=size // 4, dtype=torch.int32)
    digest, tokens = numbers[: DIGEST_BYTES // 4], numbers[DIGEST_BYTES // 4 :]
    return tokens if _sha256(tokens) == digest.numpy().tobytes() else None


def _sha256(numbers: Tensor) -> bytes:
    return hashlib.sha256(cast(Any, numbers.numpy())).digest()


def _write_whole(path: Path, content: bytes) -> None:
    """Write beside the final name and rename, so that a killed run leaves no half file."""
    # A name of its own, since another process, or one of the same number elsewhere, may be making the same file.
    building = path.with_name(f".building-{uuid.uuid4().hex[:12]}-{path.name}")
    try:
        building.write_bytes(content)
        building.replace(path)
    finally:
        building.unlink(missing_ok=True)
    for leftover in path.parent.glob(".building-*-tokens-*.bin"):
        # Another process may be deleting it too.
        with suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                leftover.unlink()


class ReviewBatches(Sampler[list[int]]):
    """Row numbers batch by batch, in an order that (seed, epoch) alone decide.

    Args:
        lengths: tokens of each review.
        shuffle: False keeps the order of the rows.
        group_by_length: sort the shuffled rows by length inside windows of `WINDOW_IN_BATCHES` batches, then
            shuffle the batches: less padding, while which reviews meet in a batch still changes every epoch.
        start: batches to leave out at the front, to go on in the middle of an epoch.
    """

    drop_last = False

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = True,
        group_by_length: bool = True,
        start: int = 0,
    ):
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(_mix(seed, epoch))
        order = list(range(len(lengths)))
        if shuffle:
            order = torch.randperm(len(lengths), generator=generator).tolist()
        if group_by_length:
            window = batch_size * WINDOW_IN_BATCHES if shuffle else len(order)
            windows = [order[at : at + window] for at in range(0, len(order), window)]
            order = [row for rows in windows for row in sorted(rows, key=lengths.__getitem__)]
        batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
        if group_by_length and shuffle:
            batches = [batches[at] for at in torch.randperm(len(batches), generator=generator).tolist()]
        self.total = len(batches)
        self.batches = batches[start:]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _mix(seed: int, epoch: int) -> int:
    """One generator seed for each (seed, epoch), so that neighbouring seeds share no epoch's order."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Collator:
    """Makes a model's inputs of a batch, with `labels` and `rows` [B].

    Args:
        pad_token_id: what fills up.
        packed: reviews end to end, input_ids and position_ids [1, T], cu_seq_lens_q int32 [B + 1] and max_length_q;
            otherwise padded on the right to the longest, input_ids and attention_mask int64 [B, S] with 1 = token.
        max_length: of a review.
        buckets: fill up to one of so many lengths, S or T, so that shapes repeat; 0 fills up no more than needed.
    """

    pad_token_id: int
    max_length: int
    packed: bool = False
    buckets: int = 0

    def __call__(self, drawn: Any) -> dict[str, Any]:
        """The inputs for a `Drawn`."""
        inputs = self._pack(drawn) if self.packed else self._pad(drawn)
        return inputs | {"labels": drawn.labels, "rows": drawn.rows}

    def _pad(self, drawn: Drawn) -> dict[str, Any]:
        lengths = drawn.lengths[:, None]
        is_token = torch.arange(self._filled(int(lengths.max()), self.max_length)) < lengths
        input_ids = torch.full(is_token.shape, self.pad_token_id)
        input_ids[is_token] = drawn.ids.long()
        return {"input_ids": input_ids, "attention_mask": is_token.long()}

    def _pack(self, drawn: Drawn) -> dict[str, Any]:
        tokens, reviews = len(drawn.ids), len(drawn.lengths)
        ends = drawn.lengths.cumsum(0)
        position_ids = torch.arange(tokens) - (ends - drawn.lengths).repeat_interleave(drawn.lengths)
        # Behind the last review, where it belongs to none.
        filler = self._filled(tokens, reviews * self.max_length) - tokens
        longest = self.max_length if self.buckets else int(drawn.lengths.max())
        return {
            "input_ids": pad(drawn.ids.long(), (0, filler), value=self.pad_token_id)[None],
            "position_ids": pad(position_ids, (0, filler))[None],
            "cu_seq_lens_q": pad(ends, (1, 0)).int(),
            "max_length_q": longest,
        }

    def _filled(self, length: int, most: int) -> int:
        """The next of `buckets` lengths up to `most`."""
        if not self.buckets:
            return length
        step = -(-most // self.buckets)
        return min(-(-length // step) * step, most)


def make_loader(
    data: TokenizedReviews, batches: ReviewBatches, collator: Collator, workers: int = 0
) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(
        data,
        batch_sampler=batches,
        collate_fn=collator,
        num_workers=workers,
        # From pinned memory a copy to the GPU runs while the host goes on.
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        # Its own generator: starting an iterator must not draw from the one that dropout uses.
        generator=torch.Generator(),
    )


def _start_worker(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
