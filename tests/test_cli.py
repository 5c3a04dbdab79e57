"""The three commands as a user meets them: one answer whichever way it is asked for, and plain output."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from imdb_classifier.checkpoints import checkpoint
from imdb_classifier.checkpoints.run_folder import resolve
from imdb_classifier.commands import cli, evaluate, predict, train
from imdb_classifier.training import reporting
from tiny_reviews import make_rows, train_arguments, write_csv
from tiny_runs import run_python


@pytest.fixture
def three_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """The same two reviews as arguments, in a file with a byte order mark and CRLF, and on standard input."""
    (tmp_path / "reviews.txt").write_bytes("\ufeffa good film\r\na bad film\r\n".encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a good film\na bad film")))
    yield [["a good film", "a bad film"], ["--file", str(tmp_path / "reviews.txt")], []]


def test_predict_gives_the_same_answer_for_arguments_a_file_and_standard_input(
    finished_run: Path, three_ways: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for way in three_ways:
        assert predict.main(["--checkpoint", str(finished_run), "--json", *way]) == 0
        answers.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert answers[0] == answers[1] == answers[2]
    assert [record["text"] for record in answers[0]] == ["a good film", "a bad film"]
    for record in answers[0]:
        assert record["label"] == ("POSITIVE" if record["logit"] > 0 else "NEGATIVE")
        assert 0.5 <= record["probability"] <= 1


def test_predict_prints_label_probability_and_text_and_says_which_attention_ran(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict.main(["--checkpoint", str(finished_run), "--no-fused", "a good film"]) == 0
    captured = capsys.readouterr()
    label, probability, text = captured.out.rstrip("\n").split("\t")
    assert label in ("POSITIVE", "NEGATIVE")
    assert 0.5 <= float(probability) <= 1
    assert text == "a good film"
    assert captured.err.splitlines() == ["attention: sdpa (asked for)"]


def test_predict_skips_blank_lines_with_one_warning_and_numbers_its_answers(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "reviews.txt").write_text("good\n\nbad\r\n \t\r\nso so \n\n\n")
    arguments = ["--checkpoint", str(finished_run), "--file", str(tmp_path / "reviews.txt")]
    assert predict.main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    answers = [json.loads(line) for line in captured.out.splitlines()]
    assert [(answer["line"], answer["text"]) for answer in answers] == [
        (1, "good"),
        (3, "bad"),
        (5, "so so "),
    ]
    assert captured.err == (
        f"warning: {tmp_path / 'reviews.txt'}: blank lines skipped: 2, the first is line 2; --json numbers the answers\n"
    )
    assert predict.main(arguments) == 0
    assert [line.split("\t")[2] for line in capsys.readouterr().out.splitlines()] == ["good", "bad", "so so "]


def test_a_review_behind_two_dashes_may_start_with_one(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict.main(["--checkpoint", str(finished_run), "--json", "--", "-terrible", "--cpu"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["text"] for answer in answers] == ["-terrible", "--cpu"]


def test_the_table_of_predict_has_one_line_a_review_whatever_the_review_holds(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [
        "a\nb\tc\rd",
        "\x1b[31mred\x1b[0m \u2028 \u202e",
        r"a\nb",
        "caf\u00e9 \U0001f600",
        "x" + "\x85" * 100,
    ]
    assert predict.main(["--checkpoint", str(finished_run), *texts]) == 0
    lines = capsys.readouterr().out.removesuffix("\n").split("\n")
    shown = [line.split("\t")[2] for line in lines]
    assert [len(line.split("\t")) for line in lines] == [3] * len(texts)
    assert shown[:4] == [r"a\nb\tc\rd", r"\x1b[31mred\x1b[0m \u2028 \u202e", r"a\\nb", "caf\u00e9 \U0001f600"]
    assert all(line.isprintable() for line in shown)


def test_predict_answers_where_the_terminal_cannot_show_a_letter(finished_run: Path) -> None:
    for more in ([], ["--json"]):
        shown = run_python(
            "-m", "imdb_classifier.commands.predict", "--checkpoint", str(finished_run), "caf\u00e9", *more,
            PYTHONIOENCODING="ascii",
        )  # fmt: skip
        assert shown.returncode == 0, shown.stderr
        assert "caf\\xe9" in shown.stdout or "caf\\u00e9" in shown.stdout


def test_evaluate_scores_a_folder_that_holds_test_reviews_alone(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_csv(tmp_path / "test.csv", make_rows(10, seed=3))
    summaries = []
    for dataset in (tmp_path, finished_run.parent / "reviews"):
        arguments = ["--checkpoint", str(finished_run), "--dataset", str(dataset), "--json"]
        assert evaluate.main(arguments) == 0
        summaries.append(json.loads(capsys.readouterr().out))
    assert summaries[0]["loss"] == summaries[1]["loss"]


def test_evaluate_finds_the_same_logits_with_eager_and_sdpa(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logits = {}
    for name in ("eager", "sdpa"):
        file = tmp_path / f"{name}.jsonl"
        assert (
            evaluate.main(
                ["--checkpoint", str(finished_run), "--attention", name, "--logits", str(file), "--json"]
            )
            == 0
        )
        summary = json.loads(capsys.readouterr().out)
        assert (summary["attention"], summary["reviews"], summary["split"]) == (name, 10, "test")
        logits[name] = [json.loads(line)["logit"] for line in file.read_text().splitlines()]
    assert logits["sdpa"] == pytest.approx(logits["eager"], abs=1e-5)


def test_evaluate_reproduces_the_accuracy_that_training_reported(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = checkpoint.read_json(resolve(finished_run) / checkpoint.STATE_FILE)["state"]
    for split in ("validation", "test"):
        assert evaluate.main(["--checkpoint", str(finished_run), "--split", split, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["accuracy"] == state["history"][-1][f"{split}_accuracy"]


def test_the_choices_offered_are_the_names_the_model_knows() -> None:
    from imdb_classifier.configuration import PRESETS
    from imdb_classifier.training.inference import DTYPES
    from imdb_classifier.training.launcher import MAX_BATCH_SIZE

    assert set(cli.PRESET_CHOICES) == set(PRESETS)
    assert set(cli.PRECISION_CHOICES) == set(DTYPES)
    assert cli.MAX_BATCH_SIZE == MAX_BATCH_SIZE


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_progress_is_a_bar_on_a_terminal_and_a_line_now_and_then_elsewhere(
    command: str, finished_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main, words = {"evaluate": (evaluate.main, []), "predict": (predict.main, ["a film"] * 10)}[command]
    arguments = ["--cpu", "--checkpoint", str(finished_run), "--batch-size", "4", "--json", *words]
    label = {"evaluate": "test", "predict": "predict"}[command]

    assert main(arguments) == 0
    quick = capsys.readouterr()
    assert quick.err == ""
    # As if each batch took ten seconds.
    monkeypatch.setattr(reporting, "SECONDS_BETWEEN_LINES", 0)
    assert main(arguments) == 0
    told = capsys.readouterr()
    lines = [rf"{label}: review {done}/10, [\d,]+ reviews/s" for done in (4, 8, 10)]
    assert re.fullmatch("\n".join(lines) + "\n", told.err)

    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert label in terminal.getvalue() and "10" in terminal.getvalue() and "review/s" in terminal.getvalue()
    # Standard output holds the result and nothing else.
    for captured in (quick, told, shown):
        results = [{**json.loads(line), "seconds": 0} for line in captured.out.splitlines()]
        assert results == [{**json.loads(line), "seconds": 0} for line in quick.out.splitlines()]


def test_evaluate_keeps_to_the_limit_of_the_run_and_says_so(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train.main(train_arguments(dataset, run, "--epochs", "1", "--limit", "6")) == 0
    (record,) = checkpoint.read_json(resolve(run) / checkpoint.STATE_FILE)["state"]["history"]
    arguments = ["--cpu", "--checkpoint", str(run)]
    capsys.readouterr()

    def summary(*more: str) -> dict:
        assert evaluate.main([*arguments, *more, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    own = summary()
    assert (own["limit"], own["reviews"], own["accuracy"]) == (6, 6, record["test_accuracy"])
    assert evaluate.main(arguments) == 0
    assert "data: --limit 6 as in the run's training" in capsys.readouterr().out
    for more, limit, reviews in (
        (["--limit", "4"], 4, 4),
        (["--dataset", str(dataset)], None, 10),
        (["--split", "all"], None, 60),
    ):
        chosen = summary(*more)
        assert (chosen["limit"], chosen["reviews"]) == (limit, reviews)
