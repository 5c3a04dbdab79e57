"""imdb-predict as a stream: windows are read, computed and printed one after the other, whatever the input is."""

import io
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imdb_classifier.commands import predict
from imdb_classifier.training import classifier, reporting
from tiny_reviews import make_rows
from tiny_runs import SOURCES, run_python

TEXTS = [text for text, _ in make_rows(30, seed=12)]
# Windows of 8 reviews.
SMALL = ["--cpu", "--batch-size", "4"]


@pytest.fixture
def two_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "WINDOW_IN_BATCHES", 2)


def records(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def standard_input(lines: Iterator[bytes]) -> Namespace:
    return Namespace(buffer=lines, isatty=lambda: False)


def test_windows_change_no_answer_and_no_order_wherever_the_reviews_come_from(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(finished_run), "--json"]
    assert predict.main([*arguments, "--cpu", *TEXTS]) == 0
    whole = records(capsys.readouterr().out)
    assert [(answer["line"], answer["text"]) for answer in whole] == list(enumerate(TEXTS, start=1))
    monkeypatch.setattr(classifier, "WINDOW_IN_BATCHES", 2)
    file = tmp_path / "reviews.txt"
    file.write_text("\n".join(TEXTS))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes())))
    for way in (TEXTS, ["--file", str(file)], []):
        assert predict.main([*arguments, *SMALL, *way]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        answers = records(captured.out)
        assert [answer.pop("logit") for answer in answers] == pytest.approx(
            [answer["logit"] for answer in whole], abs=2e-6
        )
        for answer, expected in zip(answers, whole, strict=True):
            probability = answer.pop("probability")
            assert probability == pytest.approx(expected["probability"], abs=2e-6)
            assert answer.items() <= expected.items()


def test_a_window_is_answered_before_the_next_one_is_read(
    finished_run: Path,
    two_batches: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answered = []

    def lines() -> Iterator[bytes]:
        for number in range(30):
            answered.append(len(answered) and answered[-1])
            answered[-1] += len(capsys.readouterr().out.splitlines())
            yield f"film {number}\n".encode()

    monkeypatch.setattr("sys.stdin", standard_input(lines()))
    assert predict.main(["--checkpoint", str(finished_run), *SMALL]) == 0
    assert answered == [number // 8 * 8 for number in range(30)]


def test_blank_lines_are_counted_over_the_borders_of_windows(
    finished_run: Path, two_batches: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "reviews.txt"
    # The borders lie behind the 8th and the 16th review: lines 10 and 20.
    lines = ["", *TEXTS[:7], "\t\r", TEXTS[7], " ", "", *TEXTS[8:16], "", *TEXTS[16:20], "", "", ""]
    file.write_text("\n".join(lines))
    assert predict.main(["--checkpoint", str(finished_run), "--json", *SMALL, "--file", str(file)]) == 0
    captured = capsys.readouterr()
    expected = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    assert [(answer["line"], answer["text"]) for answer in records(captured.out)] == expected
    said = "blank lines skipped: 5, the first is line 1; --json numbers the answers"
    assert captured.err == f"warning: {file}: {said}\n"


FAULTS = {
    "not UTF-8": (b"caf\xe9", "byte 0xe9 is not UTF-8, expected UTF-8 text"),
    "NUL": (b"a\0b", "text holds a NUL byte, expected plain text"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_line_in_the_third_window_is_told_behind_the_answers_of_two(
    fault: str,
    finished_run: Path,
    two_batches: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line, message = FAULTS[fault]
    file = tmp_path / "reviews.txt"
    good = [text.encode() for text in TEXTS]
    # Behind a byte order mark and a blank line; a line later and the third window would be whole.
    file.write_bytes(b"\xef\xbb\xbf" + b"\n".join([b"", *good[:22], line, *good[23:]]))
    assert predict.main(["--checkpoint", str(finished_run), "--json", *SMALL, "--file", str(file)]) == 2
    captured = capsys.readouterr()
    assert [answer["text"] for answer in records(captured.out)] == TEXTS[:16]
    assert captured.err == f"imdb-predict: error: {file}:24: {message}\n"


def test_answers_come_while_the_pipe_is_open_and_a_reader_may_leave(finished_run: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "imdb_classifier.commands.predict", "--checkpoint", str(finished_run)]
        + ["--cpu", "--batch-size", "1", "--json", "--file", "/dev/stdin"],
        # What it prints must reach the pipe by its own doing.
        env={**os.environ, "PYTHONPATH": SOURCES, "PYTHONUNBUFFERED": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout and process.stderr
    window = [f"film {number}\n" for number in range(32)]
    for _ in range(2):
        process.stdin.writelines(window)
        process.stdin.flush()
        answers = [json.loads(process.stdout.readline()) for _ in window]
        assert [answer["text"] + "\n" for answer in answers] == window
    process.stdout.close()
    process.stdin.writelines(window)
    process.stdin.close()
    assert process.wait() == 141
    assert process.stderr.read() == ""
    process.stderr.close()


# Each pair is what standard input holds, and the arguments; what was said goes to standard error.
BEFORE_TORCH = """
import io, json, sys
from imdb_classifier.commands.predict import main
for held, arguments in json.loads(sys.argv[1]):
    sys.stdin = io.TextIOWrapper(io.BytesIO(held.encode()))
    assert main(arguments) == 2
    assert "torch" not in sys.modules, arguments
"""


def test_what_needs_no_torch_to_be_seen_is_told_before_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text("\n \n" * 3_000)
    cases: list[tuple[str, list[str], str]] = [
        ("", [], "standard input: is empty, expected one review a line"),
        ("\ufeff\n", [], "standard input: is empty, expected one review a line"),
        ("\ufeff", [], "standard input: is empty, expected one review a line"),
        ("a\0b\n", [], "standard input:1: text holds a NUL byte, expected plain text"),
        ("", ["good", " "], "argument 2: text is empty, expected a review"),
        ("", ["good", "a\udc80"], "argument 2: text holds half a surrogate pair, expected valid Unicode"),
        ("", ["--file", "nowhere.txt"], "nowhere.txt: No such file or directory"),
        ("", ["--file", str(tmp_path)], f"{tmp_path}: Is a directory"),
        (
            "",
            ["--file", str(tmp_path / "blank.txt")],
            f"{tmp_path}/blank.txt: is empty, expected one review a line",
        ),
        ("", ["--file", "f", "a"], "reviews are given both as arguments and by --file, expected one of them"),
        (
            "good",
            ["--checkpoint", "nowhere"],
            "nowhere: no such checkpoint, train one with imdb-train or pass --checkpoint",
        ),
    ]
    shown = run_python("-c", BEFORE_TORCH, json.dumps([case[:2] for case in cases]))
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr.splitlines() == [f"imdb-predict: error: {message}" for _, _, message in cases]


def test_several_processes_share_no_pipe(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    reader, writer = os.pipe()
    os.write(writer, b"good\n")
    os.close(writer)
    monkeypatch.setattr("sys.stdin", standard_input(iter([b"good\n"])))
    try:
        for name, way in (("standard input", []), (f"/dev/fd/{reader}", ["--file", f"/dev/fd/{reader}"])):
            assert predict.main(["--checkpoint", str(finished_run), *SMALL, *way]) == 2
            said = "several processes cannot share it, expected --file with a regular file"
            assert capsys.readouterr().err == f"imdb-predict: error: {name}: {said}\n"
    finally:
        os.close(reader)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_counts_what_a_stream_has_answered_and_stays_out_of_the_answers(
    finished_run: Path, two_batches: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "reviews.txt"
    file.write_text("\n".join(TEXTS[:18]))
    arguments = ["--checkpoint", str(finished_run), "--json", *SMALL, "--file", str(file)]
    # As if each batch took ten seconds.
    monkeypatch.setattr(reporting, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr("sys.stderr", told := io.StringIO())
    assert predict.main(arguments) == 0
    expected = [rf"predict: review {done}, [\d,]+ reviews/s\n" for done in (4, 8, 12, 16, 18)]
    assert re.fullmatch("".join(expected), told.getvalue())

    # One terminal shows both, and a bar is drawn after each batch.
    monkeypatch.setattr(reporting, "tqdm", lambda **options: tqdm(**options, mininterval=0, miniters=1))
    tqdm = __import__("tqdm").tqdm
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setattr("sys.stdout", shown)
    for count, first, warned_at in ((18, "predict: 8review", 16), (7, "predict: 0review", 0)):
        file.write_text("\n".join([*TEXTS[: count - 1], "", TEXTS[count - 1]]))
        shown.seek(0)
        shown.truncate()
        assert predict.main(arguments) == 0
        lines = shown.getvalue().split("\n")
        assert first in lines[0] and "review/s" in lines[0]
        # As the terminal shows them.
        *seen, last = [line.rpartition("\r")[2] for line in lines]
        assert seen.pop(warned_at).startswith(f"warning: {file}: blank lines skipped: 1")
        texts = [json.loads(line)["text"] for line in seen]
        assert (texts, last) == (TEXTS[:count], "")
