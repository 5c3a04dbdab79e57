"""Which files of a folder are read as a split, which are left alone, and which are refused as doubtful."""

from pathlib import Path

import pytest

from imdb_classifier.data.rows import Reading
from imdb_classifier.data.sources import read_source
from imdb_classifier.messages import UserError
from tiny_reviews import write_csv
from tiny_splits import ROWS, as_split, read, write_folders


@pytest.mark.parametrize(
    "left_behind",
    [
        ".ipynb_checkpoints/train-checkpoint.csv",
        ".git/train.csv",
        "__MACOSX/train.csv",
        "data/._train.csv",
        "data/.#train.csv",
        "data/~$train.csv",
        "data/train.csv~",
        "data~/train.csv",
        ".cache/train/pos/0.txt",
    ],
)
def test_what_editors_and_archivers_leave_behind_is_no_data(left_behind: str, tmp_path: Path) -> None:
    write_csv(tmp_path / "data" / "train.csv", ROWS)
    write_csv(tmp_path / left_behind, [("not to be read", 2)])
    assert read(tmp_path) == ({"train": as_split(ROWS)}, [])


def test_a_hidden_file_or_folder_that_was_named_is_taken(tmp_path: Path) -> None:
    file = write_csv(tmp_path / ".hidden" / "train.csv", ROWS)
    assert read(file.parent)[0] == read(file)[0] == {"train": as_split(ROWS)}


PARTS = {
    "shards": ("train-00000-of-00002.csv", "train-00001-of-00002.csv"),
    "shards as older sets name them": ("train-00000-of-00002-0f.csv", "train-00001-of-00002-0a.csv"),
    "parts": ("train_a.csv", "train_b.csv"),
}


@pytest.mark.parametrize("kind", PARTS)
def test_the_parts_of_a_split_are_read_in_order_and_named(kind: str, tmp_path: Path) -> None:
    first, second = (tmp_path / name for name in PARTS[kind])
    write_csv(first, ROWS[:8])
    write_csv(second, ROWS[8:])
    assert read(tmp_path) == ({"train": as_split(ROWS)}, [f"train: read from 2 files, {first}, {second}"])


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00002.csv",),
        ("train-00000-of-00001-0a.csv", "train-00000-of-00001-0f.csv"),
        ("train-00000-of-00002.csv", "train-00001-of-00003.csv"),
        ("train-00000-of-00002.csv", "train-more.csv"),
    ],
)
def test_numbered_parts_are_read_only_if_each_is_there_once(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        write_csv(tmp_path / name, ROWS)
    with pytest.raises(UserError, match=r"expected each of the \d parts of the train split once"):
        read(tmp_path)


DOUBTFUL = {
    "an older one": ("train.csv", "train-old.csv"),
    "another form": ("train-0.csv", "train-0.jsonl"),
    "packed": ("train.csv", "train.csv.gz"),
    "packed part": ("train-0.csv", "train-0.csv.gz"),
    "two names of one split": ("dev.csv", "validation.csv"),
    "two folders": ("first/train-0.csv", "second/train-0.csv"),
    "a folder of texts": ("train.csv", "train"),
}


def test_files_whose_names_say_no_split_are_named_and_not_read(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", ROWS)
    for name in ("train (1).csv", "train2.csv", "IMDB Dataset.csv", "reviews.tsv", ".hidden.csv", "notes.md"):
        write_csv(tmp_path / name, ROWS)
    reading = Reading()
    assert len(read_source([str(tmp_path)], reading)["train"]) == len(ROWS)
    assert any(
        note
        == "not read, since the name says no split: IMDB Dataset.csv, reviews.tsv, train (1).csv and 1 more"
        for note in reading.notes
    ), reading.notes


@pytest.mark.parametrize("kind", DOUBTFUL)
def test_files_that_could_each_be_the_split_are_refused_unless_they_are_named(
    kind: str, tmp_path: Path
) -> None:
    files = [tmp_path / name for name in DOUBTFUL[kind]]
    for file in files:
        if not file.suffix:
            write_folders(file, ROWS)
        elif file.suffix == ".csv":
            write_csv(file, ROWS)
        else:
            file.parent.mkdir(exist_ok=True)
            file.write_text("not read")
    with pytest.raises(UserError, match="each could be the (train|validation) split") as error:
        read(tmp_path)
    assert all(str(file) in str(error.value) for file in files)
    if kind == "an older one":
        reading = Reading()
        assert len(read_source([str(file) for file in files], reading)["train"]) == 2 * len(ROWS)
        assert reading.notes == [f"train: read from 2 files, {files[0]}, {files[1]}"]
