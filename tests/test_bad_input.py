"""Bad input to the three commands is one line that names it, and status 2."""

import errno
import io
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bad_files import FILE_FAULTS, STRICT_FAULTS
from bad_sources import SOURCE_FAULTS
from bad_tokenizers import TOKENIZER_FAULTS
from imdb_classifier.checkpoints import checkpoint
from imdb_classifier.checkpoints.run_folder import CHECKPOINTS
from imdb_classifier.commands import evaluate, predict, train
from imdb_classifier.data.sources import read_source
from tiny_reviews import train_arguments, write_reviews


def spoken_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error, without the warnings that may precede it."""
    captured = capsys.readouterr().err
    lines = [line for line in captured.splitlines() if not line.startswith("warning: ")]
    assert "Traceback" not in captured
    assert len(lines) == 1, captured
    return lines[0]


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_a_faulty_file_is_one_line_that_says_where_and_status_2(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, content, expected = FILE_FAULTS[fault]
    (tmp_path / name).write_bytes(content)
    # CPU time, which other work on the machine does not use up
    began = time.process_time()
    assert train.main(train_arguments(tmp_path / name, tmp_path / "run")) == 2
    assert time.process_time() - began < 2
    message = spoken_error(capsys)
    assert message.startswith("imdb-train: error: ")
    assert expected in message


@pytest.mark.parametrize("fault", STRICT_FAULTS)
def test_a_row_without_text_or_label_is_left_out_with_a_warning_or_refused_if_asked(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, content, expected = STRICT_FAULTS[fault]
    file = tmp_path / name
    file.write_bytes(content)
    assert train.main(train_arguments(file, tmp_path / "run", "--strict-data")) == 2
    assert expected in spoken_error(capsys)
    assert len(read_source([str(file)])["train"]) == 4
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: 1 of 5 rows have no text or no label and are left out")
    assert warning.endswith(expected.removesuffix(", expected 0 or 1").removesuffix(", expected a review"))


def replaced(arguments: list[str], option: str, *values: str) -> list[str]:
    at = arguments.index(option)
    return [*arguments[:at], option, *values, *arguments[at + 2 :]]


# option and value put in place of a good one, what the message must say
OPTION_FAULTS: dict[str, tuple[str, str, str]] = {
    "batch size 0": ("--batch-size", "0", "argument --batch-size: 0 is out of range, expected 1 or more"),
    "batch size -1": ("--batch-size", "-1", "argument --batch-size: -1 is out of range"),
    "batch size in words": ("--batch-size", "many", "argument --batch-size: 'many' is not a whole number"),
    "epochs 0": ("--epochs", "0", "argument --epochs: 0 is out of range"),
    "max length 1": ("--max-length", "1", "argument --max-length: 1 is out of range, expected 2 or more"),
    "max length of 10^14": ("--max-length", str(10**14), "is out of range, expected at most 1000000"),
    "vocabulary of 2^63 - 1": ("--vocabulary-size", str(2**63 - 1), "expected at most 1000000"),
    "limit 1": ("--limit", "1", "argument --limit: 1 is out of range, expected 2 or more"),
    "learning rate 1e300": ("--learning-rate", "1e300", "expected above 0 and at most 1e+30"),
    "learning rate 0": ("--learning-rate", "0", "argument --learning-rate: 0 is out of range"),
    "learning rate nan": ("--learning-rate", "nan", "argument --learning-rate: nan is out of range"),
    "learning rate inf": ("--learning-rate", "inf", "argument --learning-rate: inf is out of range"),
    "seed -1": ("--seed", "-1", "argument --seed: -1 is out of range"),
    "seed beyond 64 bits": ("--seed", str(2**70), "argument --seed: "),
    "unknown attention": ("--attention", "flash", "argument --attention: invalid choice: 'flash'"),
    "unknown preset": ("--preset", "huge", "argument --preset: invalid choice: 'huge'"),
    "unknown precision": ("--precision", "fp8", "argument --precision: invalid choice: 'fp8'"),
    "unknown option": ("--bach-size", "8", "unrecognized arguments: --bach-size"),
    "no such file": ("--dataset", "./nowhere.csv", "nowhere.csv: no such file or folder"),
    "no such folder": ("--dataset", "/nowhere/at/all", "/nowhere/at/all: no such file or folder"),
    "Hub set without a Hub": (
        "--dataset",
        "nobody/nothing",
        "'nobody/nothing' was not found in the local cache",
    ),
    "Hub tokenizer without a Hub": (
        "--tokenizer",
        "nobody/nothing",
        "'nobody/nothing' was not found in the local",
    ),
    "no such tokenizer folder": ("--tokenizer", "./nowhere", "./nowhere: holds no tokenizer.json"),
    "fp16 on a CPU": ("--precision", "fp16", "precision fp16 cannot run here"),
    "fused without a GPU": ("--attention", "padfree", "attention 'padfree' cannot run"),
    "no such text column": ("--text-column", "body", "test.csv:1: no column named body, got 'text, label'"),
    "no such label column": ("--label-column", "stars", "test.csv:1: no column named stars"),
    "one column for both": ("--text-column", "label", "--text-column and --label-column both name label"),
    "resume of nothing": ("--resume", "", "holds no run to resume"),
    "resume and overwrite": ("--resume", "--overwrite", "not allowed with argument"),
}


@pytest.mark.parametrize("fault", OPTION_FAULTS)
def test_a_faulty_option_is_one_line_that_names_it_and_status_2(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "Hub set without a Hub":
        pytest.importorskip("datasets")
    option, value, expected = OPTION_FAULTS[fault]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = train_arguments(write_reviews(tmp_path / "reviews"), tmp_path / "run")
    if option in arguments:
        arguments = replaced(arguments, option, value)
    else:
        arguments += [option, value] if value else [option]
    assert train.main(arguments) == 2
    assert expected in spoken_error(capsys)


def make_output_a_file(folder: Path) -> list[str]:
    (folder / "run").write_text("")
    return []


def make_output_below_a_file(folder: Path) -> list[str]:
    (folder / "file").write_text("")
    return ["--output-dir", str(folder / "file" / "run")]


SITUATIONS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    **SOURCE_FAULTS,
    **TOKENIZER_FAULTS,
    "output is a file": (make_output_a_file, "run: is a file, expected a folder"),
    "output below a file": (make_output_below_a_file, "Not a directory"),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_situation_that_cannot_work_is_one_line_and_status_2(
    situation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, expected = SITUATIONS[situation]
    (tmp_path / "made").mkdir()
    changed = make(tmp_path / "made")
    dataset = write_reviews(tmp_path / "reviews")
    output = tmp_path / "made" / "run"
    # Later options win, so the situation's own stand at the end.
    assert train.main(train_arguments(dataset, output, *changed)) == 2
    assert expected in spoken_error(capsys)


def test_the_fault_tables_hold_at_least_forty_cases() -> None:
    assert len(FILE_FAULTS) + len(OPTION_FAULTS) + len(SITUATIONS) >= 40


def test_a_full_disk_is_one_line_and_leaves_no_half_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes = Path.write_bytes

    def no_space(self: Path, content: bytes) -> int:
        if self.is_relative_to(tmp_path / "cache"):
            return write_bytes(self, content)
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    dataset = write_reviews(tmp_path / "reviews")
    monkeypatch.setattr(Path, "write_bytes", no_space)
    assert train.main(train_arguments(dataset, tmp_path / "run")) == 2
    assert "No space left on device; free some space and resume" in spoken_error(capsys)
    assert list((tmp_path / "run" / CHECKPOINTS).iterdir()) == []


def test_a_disk_that_fills_up_while_the_tokenizer_is_saved_is_one_line_too(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerFast

    def no_space(self: PreTrainedTokenizerFast, folder: Path) -> None:
        # A bare Exception, as tokenizers raises it.
        raise Exception("No space left on device (os error 28)")  # noqa: TRY002

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", no_space)
    assert train.main(train_arguments(dataset, tmp_path / "run")) == 2
    message = spoken_error(capsys)
    assert message.endswith("tokenizer.json: No space left on device; free some space and resume")
    assert list((tmp_path / "run" / CHECKPOINTS).iterdir()) == []


def test_a_run_is_not_mixed_with_another_in_the_same_folder(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = finished_run.parent / "reviews"
    assert train.main(train_arguments(dataset, finished_run)) == 2
    assert "holds a run already, pass --resume, --overwrite" in spoken_error(capsys)


def test_a_run_is_not_resumed_with_other_settings(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = finished_run.parent / "reviews"
    arguments = train_arguments(dataset, finished_run, "--resume", "--learning-rate", "0.5")
    assert train.main(arguments) == 2
    assert "cannot resume: --learning-rate was 0.001, now is 0.5" in spoken_error(capsys)


@pytest.mark.parametrize(
    "content",
    [
        "null",
        "[]",
        "{}",
        '{"settings": []}',
        '{"settings": {"dataset": [1]}}',
        '{"settings": {"dataset": 5}}',
        '{"settings": {"dataset": {"a": 1}}}',
        '{"settings": {"dataset": ["a"], "text_column": 5}}',
    ],
)
def test_a_checkpoint_that_names_no_dataset_is_one_line(
    content: str, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(finished_run / "last", tmp_path / "checkpoint"))
    (folder / checkpoint.STATE_FILE).write_text(content)
    assert evaluate.main(["--checkpoint", str(folder)]) == 2
    assert checkpoint.STATE_FILE in spoken_error(capsys)


PREDICT_FAULTS: dict[str, tuple[list[str], bytes, str]] = {
    "no checkpoint": (["--checkpoint", "/nowhere", "a"], b"", "/nowhere: no such checkpoint"),
    "checkpoint is a file": (["--checkpoint", __file__, "a"], b"", "is a file, expected a checkpoint folder"),
    "empty argument": (["a", ""], b"", "argument 2: text is empty"),
    "empty input": ([], b"", "standard input: is empty"),
    "blank lines only": ([], b"\n \n", "standard input: is empty"),
    "NUL behind a blank line": ([], b"good\n\nb\0ad\n", "standard input:3: text holds a NUL byte"),
    "review with a dash": (
        ["-terrible"],
        b"",
        "unrecognized arguments: -terrible; put -- before a review that",
    ),
    "review with the letter of an option": (
        ["-horrible film"],
        b"",
        "arguments: -horrible film; put -- before a",
    ),
    "review like two options": (["--c"], b"", "; put -- before a review that starts with a dash"),
    "input not UTF-8": ([], b"good\n\xff\n", "standard input:2: byte 0xff is not UTF-8"),
    "NUL in input": ([], b"go\0od\n", "standard input:1: text holds a NUL byte"),
    "file and argument": (["--file", __file__, "a"], b"", "both as arguments and by --file"),
    "no such file": (["--file", "/nowhere.txt"], b"", "/nowhere.txt: No such file or directory"),
    "folder as a file": (["--file", "/"], b"", "/: Is a directory"),
}


@pytest.mark.parametrize("fault", PREDICT_FAULTS)
def test_faulty_input_to_predict_is_one_line_and_status_2(
    fault: str, finished_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, standard_input, expected = PREDICT_FAULTS[fault]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(standard_input)))
    if "--checkpoint" not in arguments:
        arguments = ["--checkpoint", str(finished_run), *arguments]
    assert predict.main(arguments) == 2
    assert expected in spoken_error(capsys)
