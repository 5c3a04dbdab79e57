"""The data set as people have it: other columns, labels, folders and kinds of files."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imdb_classifier.checkpoints.checkpoint import STATE_FILE, read_json, write_json
from imdb_classifier.commands import evaluate, train
from imdb_classifier.data.formats import decode, decode_lines
from imdb_classifier.data.rows import Reading, Split
from imdb_classifier.data.sources import read_source
from imdb_classifier.data.splits import load_reviews
from imdb_classifier.messages import UserError
from imdb_classifier.training.setup import check_settings
from tiny_reviews import make_rows, train_arguments, write_csv
from tiny_splits import ROWS, as_split, read, write_folders


def test_kaggles_table_is_read_and_said_and_is_the_same_data(tmp_path: Path) -> None:
    plain = write_csv(tmp_path / "train.csv", ROWS)
    named = [(text, ("negative", "positive")[label]) for text, label in ROWS]
    kaggle = load_reviews([str(write_csv(tmp_path / "IMDB Dataset.csv", named, ("review", "sentiment")))])
    assert kaggle.fingerprint() == load_reviews([str(plain)]).fingerprint()
    assert kaggle.notes[:2] == ["columns: review and sentiment", 'labels: "negative" = 0, "positive" = 1']


def test_kaggles_tab_file_is_read_with_its_backslashes(tmp_path: Path) -> None:
    content = 'id\tsentiment\treview\n"1_8"\t1\t"A \\"moving\\"\tfilm"\n"2_3"\t0\t"dull"\n'
    (tmp_path / "labeledTrainData.tsv").write_text(content)
    splits, _ = read(tmp_path / "labeledTrainData.tsv")
    assert splits == {"train": Split(['A "moving"\tfilm', "dull"], [1, 0])}


@pytest.mark.parametrize("below", ["", "aclImdb"])
def test_stanfords_folder_is_read_without_what_has_no_label(below: str, tmp_path: Path) -> None:
    rows = sorted(ROWS, key=lambda row: row[1])
    for name, part in (("train", rows), ("test", rows[5:15])):
        folder = write_folders(tmp_path / below / name, part)
        (folder / "unsup").mkdir()
        (folder / "unsup" / "0_0.txt").write_text("no label")
        (folder / "labeledBow.feat").write_text("9 0:9")
        for left_behind in (".000_7.txt", "._000_7.txt", "~$0_7.txt", "000_7.txt~"):
            (folder / "pos" / left_behind).write_text("not read")
    (tmp_path / below / "imdb.vocab").write_text("the")
    splits, notes = read(tmp_path)
    assert splits == {"train": as_split(rows), "test": as_split(rows[5:15])}
    assert notes == ['labels: "neg" = 0, "pos" = 1']
    assert read(tmp_path / below / "test")[0] == {"train": as_split(rows[5:15])}


PAIRS: list[tuple[object, object, list[str]]] = [
    (0, 1, []),
    ("0", "1", []),
    (0.0, 1.0, ["labels: 0.0 = 0, 1.0 = 1"]),
    (False, True, ["labels: False = 0, True = 1"]),
    ("neg", "pos", ['labels: "neg" = 0, "pos" = 1']),
    ("NEGATIVE ", "Positive", ['labels: "NEGATIVE" = 0, "Positive" = 1']),
]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(("negative", "positive", "notes"), PAIRS, ids=str)
def test_labels_are_read_as_people_write_them(
    negative: object, positive: object, notes: list[str], suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"train.{suffix}"
    rows = [(text, (negative, positive)[label]) for text, label in ROWS]
    records = [{"text": text, "label": label} for text, label in rows]
    if suffix == "csv":
        write_csv(path, rows)
        # A table has no types.
        notes = [] if negative in ("0", 0) and type(negative) is int else notes
        notes = ['labels: "0.0" = 0, "1.0" = 1'] if type(negative) is float else notes
        notes = ['labels: "False" = 0, "True" = 1'] if type(negative) is bool else notes
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    splits, said = read(path)
    assert splits == {"train": as_split(ROWS)}
    assert all(type(label) is int for label in splits["train"].labels)
    assert said == notes


@pytest.mark.parametrize("kind", ["dictionary", "large", "int8"])
def test_parquet_keeps_its_strings_and_numbers_in_many_ways(kind: str, tmp_path: Path) -> None:
    import pyarrow.parquet

    split = as_split(ROWS)
    texts, labels = (
        pyarrow.array(split.texts),
        pyarrow.array([("neg", "pos")[label] for label in split.labels]),
    )
    if kind == "dictionary":
        texts, labels = texts.dictionary_encode(), labels.dictionary_encode()
    elif kind == "large":
        texts, labels = texts.cast(pyarrow.large_string()), labels.cast(pyarrow.large_string())
    else:
        labels = pyarrow.array(split.labels, pyarrow.int8())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": labels}), tmp_path / "train.parquet")
    assert read(tmp_path)[0] == {"train": split}


@pytest.mark.parametrize(
    ("names", "flipped"),
    [(["neg", "pos"], False), (["Positive", "Negative"], True), (["1", "2"], False)],
    ids=str,
)
@pytest.mark.parametrize("source", ["parquet", "Hub"])
def test_a_class_number_means_what_the_data_set_calls_it(
    names: list[str], flipped: bool, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    split = as_split(ROWS)
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    table = datasets.Dataset.from_dict({"text": split.texts, "label": split.labels}, features=features)
    if source == "parquet":
        table.to_parquet(tmp_path / "train.parquet")
        splits = read(tmp_path)[0]
    else:
        monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(train=table))
        splits = read_source(["somebody/reviews"])
    assert splits["train"].labels == [label ^ flipped for label in split.labels]


def test_rows_and_splits_of_a_hub_set_that_have_no_label_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets")
    texts = ["good", "bad", "so so", "dull"]
    loaded = datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"sentence": texts, "label": [1, 0, -1, 0]}),
        test=datasets.Dataset.from_dict({"sentence": texts, "label": [-1] * 4}),
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name: loaded)
    reading = Reading(text_column="sentence")
    assert read_source(["somebody/reviews"], reading) == {"train": Split(["good", "bad", "dull"], [1, 0, 0])}
    assert reading.notes[-1] == "test split left out: none of its 4 rows has a label"
    assert "1 of 4 rows have no text or no label" in capsys.readouterr().err
    with pytest.raises(UserError, match="somebody/reviews/train:3: label is -1, expected 0 or 1"):
        read_source(["somebody/reviews"], Reading(text_column="sentence", strict=True))


def test_rows_without_text_or_label_are_counted_over_all_files_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow.parquet

    write_csv(tmp_path / "test.csv", [*ROWS, ("", 1), ("so so", "")])
    holed = {
        "text": [*as_split(ROWS).texts, None, "so so", "dull"],
        "label": [*as_split(ROWS).labels, 1, None, 0],
    }
    pyarrow.parquet.write_table(pyarrow.table(holed), tmp_path / "train.parquet")
    folder = write_folders(tmp_path / "validation", sorted(ROWS, key=lambda row: row[1]))
    (folder / "neg" / "0.txt").write_text("\n")
    splits, _ = read(tmp_path)
    assert {name: len(split) for name, split in splits.items()} == {"train": 21, "validation": 20, "test": 20}
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: 5 of 66 rows have no text or no label and are left out")
    assert warning.endswith(f"the first is {tmp_path / 'test.csv'}:22: text is empty")


def test_a_text_of_any_length_is_a_review_and_the_limit_of_csv_stays_as_it_was(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    long = [("good " * 60_000, 1), ("bad\n\n" * 60_000, 0)]
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        path = write_csv(tmp_path / f"train.{suffix}", [*ROWS, *long], delimiter=delimiter)
        assert read(path)[0] == {"train": as_split([*ROWS, *long])}
        path.write_text(path.read_text() + '"lost')
        with pytest.raises(UserError, match="is never closed"):
            read(path)
    assert csv.field_size_limit() == limit


@pytest.fixture
def other_columns(tmp_path: Path) -> Path:
    """Reviews in columns of other names, beside columns of the usual names that hold something else."""
    path = tmp_path / "reviews" / "train.csv"
    path.parent.mkdir()
    with path.open("w", newline="") as file:
        rows = [
            (f"title {number}", 1 - label, text, label)
            for number, (text, label) in enumerate(make_rows(60, 2))
        ]
        csv.writer(file).writerows([("text", "label", "body", "verdict"), *rows])
    return path


COLUMNS = ("--text-column", "body", "--label-column", "verdict")


def test_columns_that_were_named_are_those_of_the_run_its_resumption_and_its_evaluation(
    other_columns: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = train_arguments(other_columns, run, "--epochs", "1")
    assert train.main([*arguments, *COLUMNS]) == 0
    assert "data: columns: body and verdict" in capsys.readouterr().out
    accuracies = []
    for more in ([], ["--dataset", str(other_columns), *COLUMNS]):
        assert evaluate.main(["--checkpoint", str(run), "--cpu", "--json", *more]) == 0
        accuracies.append(json.loads(capsys.readouterr().out)["loss"])
    assert accuracies[0] == accuracies[1]
    assert evaluate.main(["--checkpoint", str(run), "--cpu"]) == 0
    assert capsys.readouterr().out.startswith("data: columns: body and verdict\n")
    assert train.main([*arguments, *COLUMNS, "--resume"]) == 0
    capsys.readouterr()
    assert train.main([*arguments, "--resume"]) == 2
    assert "cannot resume: --text-column was body, now is None" in capsys.readouterr().err


def test_a_run_from_before_columns_could_be_named_is_resumed(finished_run: Path, tmp_path: Path) -> None:
    state = read_json(finished_run / "last" / STATE_FILE)
    settings = dict(state["settings"])
    for name in ("text_column", "label_column"):
        del state["settings"][name]
    write_json(tmp_path / STATE_FILE, state)
    check_settings(tmp_path, settings)


def test_a_column_without_a_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(train_arguments(tmp_path, tmp_path / "run", "--text-column", "")) == 2
    assert "argument --text-column: got an empty name" in capsys.readouterr().err


class Trickle(io.RawIOBase):
    """A pipe from which each read takes at most so many bytes; it cannot be gone back in."""

    def __init__(self, content: bytes, at_once: int) -> None:
        self.content, self.at_once = content, at_once

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        taken = self.content[: min(self.at_once, len(buffer))]
        self.content = self.content[len(taken) :]
        buffer[: len(taken)] = taken
        return len(taken)


CONTENTS: dict[str, bytes] = {
    "nothing": b"",
    "a newline": b"\n",
    "no newline at the end": b"good\nbad",
    "letters of one to four bytes": "a\u00e9\u20ac\U0001f600\n\U0001f600\u20ac\u00e9a\n".encode(),
    "carriage returns": b"good\r\nso\rso\r\n\r\nbad\r",
    "other ends of lines": "a\x0bb\x0cc\x1cd\x85e\u2028f\n\u2029g".encode(),
    "byte order mark": b"\xef\xbb\xbfgood\nbad\n",
    "two byte order marks": b"\xef\xbb\xbf\xef\xbb\xbfgood\nbad\n",
    "byte order mark later": b"good\n\xef\xbb\xbfbad\n",
    "half a byte order mark": b"\xef\xbb\ngood",
    "latin-1": b"good\ncaf\xe9 \nbad",
    "latin-1 behind a byte order mark": b"\xef\xbb\xbfgood\ncaf\xe9 \nbad",
    "latin-1 in the first line behind a byte order mark": b"\xef\xbb\xbfcaf\xe9 \nbad",
    "letter cut by a newline": b"good\n\xe2\x82\n\xac",
    "letter cut by the end": b"good\nbad \xf0\x9f\x98",
    "a long form of a newline": b"good\xc0\x8abad\n",
    "a surrogate": b"good\nbad \xed\xa0\x80\n",
    "UTF-16": "good\nbad\n".encode("utf-16"),
    "UTF-16 without a mark": "good\nbad\n".encode("utf-16-le"),
    "UTF-32": "good\nbad\n".encode("utf-32"),
}


def told(read: Callable[[], list[str]]) -> list[str] | str:
    try:
        return read()
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_lines_of_a_stream_are_those_of_the_whole_wherever_a_block_ends(content: bytes) -> None:
    whole = told(lambda: decode("file", content).split("\n"))
    # The text behind the last newline, where there is none, is no line of a stream.
    expected = whole[:-1] if isinstance(whole, list) and not whole[-1] else whole
    for at_once in range(1, len(content) + 2):
        for block in (1, 2, 3, 8192):
            file = io.BufferedReader(Trickle(content, at_once), block)
            assert told(lambda file=file: list(decode_lines("file", file))) == expected  # type: ignore[misc]


def test_a_byte_order_mark_is_no_text_and_moves_no_fault() -> None:
    assert decode("file", CONTENTS["byte order mark"]) == "good\nbad\n"
    expected = "file:2: byte 0xe9 is not UTF-8, expected UTF-8 text"
    assert told(lambda: [decode("file", CONTENTS["latin-1"])]) == expected
    assert told(lambda: [decode("file", CONTENTS["latin-1 behind a byte order mark"])]) == expected


def test_a_stream_is_read_no_further_than_the_line_that_is_asked_for() -> None:
    read = []

    def lines() -> Iterator[bytes]:
        for number in range(5):
            read.append(number)
            yield b"\xff\n" if number == 3 else b"good\n"

    decoded = decode_lines("file", lines())
    assert read == []
    assert [next(decoded), next(decoded)] == ["good", "good"]
    assert read == [0, 1]
