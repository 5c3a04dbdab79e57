"""How long the sequences of a benchmark batch are."""

import json
from functools import cache
from pathlib import Path

import numpy as np

IMDB_CUT = 400


@cache
def imdb_histogram() -> tuple[np.ndarray, np.ndarray]:
    """(lengths, counts) of the IMDB training reviews in tokens, not cut."""
    content = json.loads((Path(__file__).parents[1] / "data" / "imdb_token_lengths.json").read_text())
    return np.asarray(content["lengths"]), np.asarray(content["counts"])


def imdb_lengths(batch: int, cut: int, seed: int = 0) -> np.ndarray:
    """[batch] review lengths cut at `cut`, in random order, one from each of `batch` equal shares of the reviews.

    The stratified draw makes every batch size represent the whole histogram; the longest equals `cut`, as
    in the padded batch that a tokenizer would return.
    """
    lengths, counts = imdb_histogram()
    random = np.random.default_rng(seed)
    ranks = (np.arange(batch) + random.random(batch)) / batch * counts.sum()
    drawn = np.minimum(lengths[np.searchsorted(np.cumsum(counts), ranks, side="right")], cut)
    drawn[-1] = cut
    return random.permutation(drawn)


def padded_lengths(batch: int, seq: int, fraction: float, seed: int = 0) -> np.ndarray:
    """[batch] evenly spread lengths in random order that leave about `fraction` of [batch, seq] to padding."""
    mean = (1 - fraction) * seq
    spread = min(mean - 1, seq - mean)
    drawn = np.linspace(mean - spread, mean + spread, batch) if batch > 1 else np.array([mean])
    return np.random.default_rng(seed).permutation(np.clip(np.rint(drawn), 1, seq).astype(np.int64))


def make_lengths(kind: str, batch: int, seq: int, seed: int = 0) -> np.ndarray:
    """Lengths of one kind: "imdb" (cut at seq), "scaled" (cut at 400, stretched to seq), "full", "padNN" (NN %)."""
    if kind == "imdb":
        return imdb_lengths(batch, seq, seed)
    if kind == "scaled":
        stretched = imdb_lengths(batch, IMDB_CUT, seed) * (seq / IMDB_CUT)
        return np.maximum(1, np.rint(stretched)).astype(np.int64)
    if kind == "full":
        return np.full(batch, seq, dtype=np.int64)
    if kind.startswith("pad") and kind[3:].isdigit() and int(kind[3:]) < 100:
        return padded_lengths(batch, seq, int(kind[3:]) / 100, seed)
    raise ValueError(f"lengths must be imdb, scaled, full or padNN (NN percent padding), got {kind!r}")
