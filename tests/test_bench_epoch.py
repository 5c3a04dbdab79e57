"""The epoch suite: the passes of the notebook's cell, ours, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from imdb_classifier.data.batches import Collator
from imdb_classifier.data.tokenization import train_tokenizer
from padfree_bench import cli
from padfree_bench.measuring.results import NOT_RUN, OK, Row, load
from padfree_bench.measuring.timing import Sample
from padfree_bench.suites import epoch
from tiny_reviews import make_rows, write_csv

REVIEWS, LIMIT = 60, 20


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    rows = make_rows(REVIEWS, seed=1)
    file = write_csv(tmp_path / "reviews.csv", rows)
    train_tokenizer([text for text, _ in rows], 120, 400).save_pretrained(tmp_path / "tokenizer")
    line = f"epoch --quick --no-pictures --reviews {file} --tokenizer {tmp_path / 'tokenizer'} --output"
    return [*line.split(), str(tmp_path / "out"), "--limit", str(LIMIT)]


def rows_of(tmp_path: Path) -> list[Row]:
    return load(next(tmp_path.glob("out/*/epoch.json"))).rows


def test_both_loops_are_timed_where_both_are_right(arguments: list[str], tmp_path: Path) -> None:
    assert cli.main(arguments) == 0
    rows = rows_of(tmp_path)
    assert [(row.direction, row.peer) for row in rows] == [
        (direction, peer) for direction in ("epoch", "predict") for peer in epoch.PEERS
    ]
    assert [row.status for row in rows] == [OK, OK, NOT_RUN] * 2
    for row in rows[:2] + rows[3:5]:
        assert row.ms_p50 and row.reviews_per_s == pytest.approx(LIMIT / row.ms_p50 * 1e3, rel=1e-3)
    assert rows[2].reason.startswith("no GPU")


def test_the_notebooks_epoch_is_three_passes_and_ours_two(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[str] = []

    def trains(training: Any, batches: Any) -> None:
        passes.append(f"train {sum(len(batch['rows']) for batch in batches)}")

    def accuracy(model: Any, loader: Any, device: Any) -> float:
        assert not model.training and not torch.is_grad_enabled()
        passes.append(f"accuracy {len(loader.dataset)}")
        return 0.5

    def evaluate(model: Any, data: Any, accelerator: Any, **options: Any) -> Any:
        passes.append(f"evaluate {len(data)}")
        batch = Collator(0, 400)(data.__getitems__(range(len(data))))
        with torch.no_grad():
            logits = model.eval()(batch["input_ids"], batch["attention_mask"]).logits
        return SimpleNamespace(z=logits[:, 1] - logits[:, 0])

    def passes_of(calls: dict[str, Callable[[], object]], *rest: Any, **options: Any) -> dict[str, Sample]:
        for name, call in calls.items():
            passes.clear()
            call()
            found.append((name, *passes))
        return {name: Sample(1.0, 1.0, 1.0, 1) for name in calls}

    found: list[tuple[str, ...]] = []
    monkeypatch.setattr(epoch.Training, "epoch", trains)
    monkeypatch.setattr(epoch, "accuracy", accuracy)
    monkeypatch.setattr(epoch, "evaluate", evaluate)
    monkeypatch.setattr("padfree_bench.suites.contenders.measure", passes_of)
    assert cli.main(arguments) == 0
    assert found == [
        ("notebook", "train 20", "accuracy 20", "accuracy 20"),
        ("ours-sdpa", "train 20", "evaluate 20"),
        ("notebook", "accuracy 20"),
        ("ours-sdpa", "evaluate 20"),
    ]


def test_what_is_held_out_is_not_trained_on(arguments: list[str]) -> None:
    options = cli.parser().parse_args(arguments)
    trained, held_out, few = epoch.read_reviews(options, 400, seed=3)
    texts = lambda data: {tuple(data[row].tolist()) for row in range(len(data))}
    assert len(trained) == len(held_out) == LIMIT
    assert not texts(trained) & texts(held_out) and texts(few) <= texts(held_out)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--limit", "1"], "an epoch needs 4 reviews or more"),
        (["--dtypes", "fp32,bf16"], "one dtype a process"),
        (["--peers", "sdpa"], "peer must be one of notebook, ours-sdpa, ours-padfree"),
        (["--reviews", "no.parquet"], "no.parquet: no such file"),
    ],
)
def test_a_wrong_argument_is_one_line(
    more: list[str], said: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*arguments, *more]) == 2
    assert said in capsys.readouterr().err
