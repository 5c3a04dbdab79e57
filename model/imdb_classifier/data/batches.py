"""From reviews to batches: tokenized once, kept by content, in an order that a seed fixes."""

import hashlib
import json
import signal
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub import constants
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerFast

from imdb_classifier.data.rows import Split
from imdb_classifier.data.tokenization import encode

# Batches that are sorted by length together; wide enough to save padding, narrow enough to keep batches random.
WINDOW_IN_BATCHES = 32
# Part of the cache's key, so that a file of another layout is never looked at.
CACHE_FORMAT = 1
# A call of the tokenizer keeps offsets, masks and the cut-off rest of all its texts until it returns.
REVIEWS_AT_A_TIME = 1_000
# Writing a cache file takes seconds: what has stood half written for a day was left by a kill.
LEFTOVER_SECONDS = 24 * 3600


class TokenizedReviews(torch.utils.data.Dataset):
    """Token ids of one split in two flat tensors: review i is ids[starts[i]:starts[i + 1]]."""

    def __init__(self, ids: Tensor, lengths: Tensor, labels: Sequence[int]):
        self.ids = ids
        self.starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        self.labels = torch.tensor(labels, dtype=torch.int64)

    @classmethod
    def from_lists(cls, token_ids: Sequence[Sequence[int]], labels: Sequence[int]) -> "TokenizedReviews":
        flat = torch.tensor([token for ids in token_ids for token in ids], dtype=torch.int32)
        return cls(flat, torch.tensor([len(ids) for ids in token_ids]), labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, int]:
        return self.ids[self.starts[row] : self.starts[row + 1]], self.labels[row], row

    @property
    def lengths(self) -> list[int]:
        lengths: list[int] = self.starts.diff().tolist()
        return lengths


def tokenize(
    split: Split, tokenizer: PreTrainedTokenizerFast, max_length: int, cache_dir: Path | None = None
) -> TokenizedReviews:
    """Token ids of every review, cut at `max_length`; computed once and kept on disk by content.

    The cache file's name is a digest of the texts, the tokenizer and `max_length`, so it cannot be stale; a file
    that is not as it was written is made anew.
    """
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    # Calls leave their truncation and padding behind in the tokenizer; they are not part of what it is.
    settings |= {"truncation": None, "padding": None}
    key = [CACHE_FORMAT, max_length, settings, split.texts]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    folder = cache_dir or Path(constants.HF_HOME) / "imdb_classifier"
    folder.mkdir(parents=True, exist_ok=True)
    cache_file = folder / f"tokens-{digest}.bin"
    # the SHA-256 of what follows, and safetensors
    content = cache_file.read_bytes() if cache_file.exists() else b""
    if content[:32] != hashlib.sha256(content[32:]).digest():
        ids = []
        for at in range(0, len(split), REVIEWS_AT_A_TIME):
            encoded = encode(tokenizer, split.texts[at : at + REVIEWS_AT_A_TIME], max_length)
            ids += [torch.tensor(review, dtype=torch.int32) for review in encoded]
        lengths = torch.tensor([len(review) for review in ids], dtype=torch.int32)
        body = safetensors.torch.save({"ids": torch.cat(ids), "lengths": lengths})
        content = hashlib.sha256(body).digest() + body
        _write_whole(cache_file, content)
    tokens = safetensors.torch.load(content[32:])
    return TokenizedReviews(tokens["ids"], tokens["lengths"], split.labels)


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


def pad(reviews: Sequence[tuple[Tensor, Tensor, int]], pad_token_id: int) -> dict[str, Tensor]:
    """Collate B reviews, padded on the right to the longest.

    Returns: input_ids int64 [B,S], attention_mask int64 [B,S] with 1 = token, labels [B], row numbers [B].
    """
    ids, labels, rows = zip(*reviews, strict=True)
    lengths = torch.tensor([len(review) for review in ids])
    input_ids = pad_sequence(list(ids), batch_first=True, padding_value=pad_token_id).long()
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    batch = {"input_ids": input_ids, "attention_mask": mask}
    return batch | {"labels": torch.stack(labels), "rows": torch.tensor(rows)}


def make_loader(
    data: TokenizedReviews, batches: ReviewBatches, pad_token_id: int, workers: int = 0
) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(
        data,
        batch_sampler=batches,
        collate_fn=partial(pad, pad_token_id=pad_token_id),
        num_workers=workers,
        worker_init_fn=_leave_signals_to_parent,
        # Its own generator: starting an iterator must not draw from the one that dropout uses.
        generator=torch.Generator(),
    )


def _leave_signals_to_parent(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
