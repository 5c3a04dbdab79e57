"""Reviews are tokenized once, kept by content and batched by length; a tokenizer is trained and checked."""

import errno
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from imdb_classifier.data.batches import Collator, ReviewBatches, TokenizedReviews, make_loader, tokenize
from imdb_classifier.data.rows import Split
from imdb_classifier.data.tokenization import check_tokenizer, count_ids, load_tokenizer, train_tokenizer
from imdb_classifier.messages import UserError
from tiny_reviews import make_rows
from tiny_splits import as_split


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([text for text, _ in make_rows(40, seed=1)], 120, 24)


def test_tokens_are_those_of_the_tokenizer_cut_at_the_limit(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    split = as_split(make_rows(20, seed=11))
    data = tokenize(split, tokenizer, 12, tmp_path)
    expected = tokenizer(split.texts, truncation=True, max_length=12)["input_ids"]
    assert [data[row].tolist() for row in range(len(data))] == expected
    assert data.lengths == [len(ids) for ids in expected]
    assert max(data.lengths) == 12
    assert data.labels.tolist() == split.labels


def test_tokens_are_computed_once_and_kept_by_content(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = as_split(make_rows(20, seed=12))
    first = tokenize(split, tokenizer, 24, tmp_path)
    calls: list[int] = []
    original = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, texts, **kw: calls.append(1) or original(self, texts, **kw)
    )
    again = tokenize(split, tokenizer, 24, tmp_path)
    assert calls == []
    assert torch.equal(first.ids, again.ids) and torch.equal(first.starts, again.starts)
    # One letter more, another limit, another tokenizer: each is another content.
    tokenize(Split([split.texts[0] + "s", *split.texts[1:]], split.labels), tokenizer, 24, tmp_path)
    tokenize(split, tokenizer, 23, tmp_path)
    tokenize(split, train_tokenizer(split.texts, 90, 24), 24, tmp_path)
    tokenizer.truncation_side = "left"
    tokenize(split, tokenizer, 24, tmp_path)
    tokenizer.truncation_side = "right"
    assert len(calls) == 4


@pytest.mark.parametrize("harm", [b"", b"\0" * 32, None], ids=["emptied", "overwritten", "cut"])
def test_a_damaged_token_cache_is_made_anew(
    harm: bytes | None, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    split = as_split(make_rows(20, seed=13))
    first = tokenize(split, tokenizer, 24, tmp_path)
    (cache,) = tmp_path.iterdir()
    cache.write_bytes(cache.read_bytes()[:200] if harm is None else harm)
    assert torch.equal(tokenize(split, tokenizer, 24, tmp_path).ids, first.ids)


def test_every_bit_of_a_token_cache_is_checked(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    split = as_split(make_rows(20, seed=13))
    first = tokenize(split, tokenizer, 24, tmp_path)
    (cache,) = tmp_path.iterdir()
    whole = cache.read_bytes()
    draw = random.Random(0)
    for _ in range(30):
        harmed = bytearray(whole)
        harmed[draw.randrange(len(harmed))] ^= 1 << draw.randrange(8)
        cache.write_bytes(harmed)
        again = tokenize(split, tokenizer, 24, tmp_path)
        assert torch.equal(again.ids, first.ids) and torch.equal(again.starts, first.starts)
        assert cache.read_bytes() == whole


def test_a_token_cache_that_could_not_be_written_to_its_end_is_not_there(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = as_split(make_rows(20, seed=13))
    seen: list[str] = []

    def write_half(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        seen.extend(entry.name for entry in path.parent.iterdir())
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as full_disk, pytest.raises(OSError, match="No space left"):
        full_disk.setattr(Path, "write_bytes", write_half)
        tokenize(split, tokenizer, 24, tmp_path)
    # What a kill at that moment would leave has another name than a cache file.
    assert len(seen) == 1 and not seen[0].startswith("tokens-")
    assert list(tmp_path.iterdir()) == []
    assert len(tokenize(split, tokenizer, 24, tmp_path)) == 20


def test_what_a_kill_left_half_written_in_the_token_cache_goes_and_what_is_being_written_stays(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    left, being_written = (tmp_path / f".building-{n}-tokens-abc.bin" for n in (1, 2))
    mine = tmp_path / ".building-plans"
    for path in (left, being_written, mine):
        path.write_bytes(b"half")
    for path in (left, mine):
        os.utime(path, (0, 0))
    tokenize(Split(["a film"], [1]), tokenizer, 24, tmp_path)
    assert not left.exists()
    assert being_written.exists() and mine.exists()


def test_tokens_are_kept_in_hf_home_unless_told_otherwise(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    tokenize(as_split(make_rows(4, seed=13)), tokenizer, 24)
    assert len(list((tmp_path / "imdb_classifier").glob("tokens-*"))) == 1


LENGTHS = [(7 * row) % 97 + 3 for row in range(1_000)]


@pytest.mark.parametrize("group_by_length", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_hold_every_review_exactly_once(group_by_length: bool, shuffle: bool) -> None:
    batches = ReviewBatches(LENGTHS, 32, group_by_length=group_by_length, shuffle=shuffle)
    assert sorted(row for batch in batches for row in batch) == list(range(1_000))
    assert len(batches) == batches.total == 32
    assert sorted(map(len, batches)) == [8] + [32] * 31


def test_the_order_of_batches_follows_from_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return list(ReviewBatches(LENGTHS, 32, seed=seed, epoch=epoch))

    assert order(0, 0) == order(0, 0)
    distinct = {str(order(seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(distinct) == 16


@pytest.mark.parametrize("start", [0, 1, 17, 31, 32])
def test_an_epoch_entered_in_the_middle_has_the_batches_that_are_left(start: int) -> None:
    whole = list(ReviewBatches(LENGTHS, 32, seed=3, epoch=2))
    assert list(ReviewBatches(LENGTHS, 32, seed=3, epoch=2, start=start)) == whole[start:]


def test_grouping_by_length_removes_most_padding_and_keeps_long_and_short_mixed_over_time() -> None:
    def padded(batches: ReviewBatches) -> int:
        return sum(max(LENGTHS[row] for row in batch) * len(batch) for batch in batches)

    grouped, plain = ReviewBatches(LENGTHS, 16), ReviewBatches(LENGTHS, 16, group_by_length=False)
    assert padded(grouped) - sum(LENGTHS) < 0.2 * (padded(plain) - sum(LENGTHS))
    means = [sum(LENGTHS[row] for row in batch) / len(batch) for batch in grouped]
    assert means != sorted(means)
    assert means != sorted(means, reverse=True)


def test_a_batch_is_padded_on_the_right_to_its_longest_review() -> None:
    data = TokenizedReviews.from_lists([[2, 5, 3], [2, 3], [2, 7, 8, 9, 3]], [1, 0, 1])
    batch = Collator(pad_token_id=0, max_length=8)(data.__getitems__([2, 1]))
    assert batch["input_ids"].tolist() == [[2, 7, 8, 9, 3], [2, 3, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert batch["rows"].tolist() == [2, 1]
    assert batch["input_ids"].dtype == torch.int64


def test_a_packed_batch_holds_the_reviews_end_to_end_and_their_places() -> None:
    data = TokenizedReviews.from_lists([[2, 5, 3], [2, 3], [2, 7, 8, 9, 3]], [1, 0, 1])
    batch = Collator(pad_token_id=0, max_length=8, packed=True)(data.__getitems__([2, 1]))
    assert batch["input_ids"].tolist() == [[2, 7, 8, 9, 3, 2, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 7]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == 5
    assert (batch["labels"].tolist(), batch["rows"].tolist()) == ([1, 0], [2, 1])


@pytest.mark.parametrize("packed", [False, True])
def test_buckets_leave_few_shapes_and_change_no_token(packed: bool) -> None:
    data = TokenizedReviews.from_lists([[2] * length for length in LENGTHS], [0] * len(LENGTHS))
    collator, shapes = Collator(0, max(LENGTHS), packed, buckets=4), set()
    for rows in ReviewBatches(LENGTHS, 16):
        drawn = data.__getitems__(rows)
        whole = Collator(0, max(LENGTHS), packed)(drawn)["input_ids"]
        batch = collator(drawn)
        shapes.add(batch["input_ids"].shape)
        assert torch.equal(batch["input_ids"][:, : whole.shape[1]], whole)
        assert not batch["input_ids"][:, whole.shape[1] :].any()
        assert not packed or batch["max_length_q"] == max(LENGTHS)
    # the last batch has fewer reviews
    assert 1 < len(shapes) <= 5


def test_a_trained_tokenizer_survives_saving_and_is_the_same_every_time(tmp_path: Path) -> None:
    texts = [text for text, _ in make_rows(300, seed=14)]
    first, second = (train_tokenizer(texts, 200, 24) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    first.save_pretrained(tmp_path / "tokenizer")
    loaded = load_tokenizer(str(tmp_path / "tokenizer"), 24)
    sample = "The GREAT film, caf\u00e9 & unheard-of words"
    assert loaded(sample)["input_ids"] == first(sample)["input_ids"]
    assert loaded.decode(loaded("the film")["input_ids"]) == "[CLS] the film [SEP]"
    assert loaded.model_max_length == 24


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    check_tokenizer(tokenizer, "own", count_ids(tokenizer))
    with pytest.raises(UserError, match="ids, the model has"):
        check_tokenizer(tokenizer, "other", count_ids(tokenizer) - 1)


def test_a_worker_leaves_signals_to_its_parent() -> None:
    data = TokenizedReviews.from_lists([[2, 3]] * 4, [0, 1, 0, 1])
    batches = ReviewBatches([2] * 4, 2)
    numbers = (signal.SIGINT, signal.SIGTERM)
    loader = make_loader(data, batches, lambda drawn: [signal.getsignal(n) for n in numbers], workers=1)  # type: ignore[arg-type]
    assert [set(handlers) for handlers in loader] == [{signal.SIG_IGN}] * 2
