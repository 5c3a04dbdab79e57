"""Training learns and says what it did, and never starts with another model's optimizer."""

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from imdb_classifier.checkpoints import checkpoint, weights
from imdb_classifier.checkpoints.run_folder import Position, positions
from imdb_classifier.commands import predict, train
from imdb_classifier.configuration import PRESETS, TextClassifierConfig
from imdb_classifier.data.batches import TokenizedReviews
from imdb_classifier.messages import UserError
from imdb_classifier.modeling import TextClassifier
from imdb_classifier.training import guards, inference, launcher, reporting
from tiny_reviews import make_rows, train_arguments, write_csv, write_reviews
from tiny_runs import SOURCES, log_without_clock


def notebook_batches() -> tuple[TokenizedReviews, dict[str, torch.Tensor]]:
    """Reviews that a bag of words tells apart: token 10 or 11 says the label, the others nothing."""
    draw = random.Random(0)
    labels = [number % 2 for number in range(64)]
    ids = [[2, *draw.choices(range(20, 60), k=6), 10 + label, 3] for label in labels]
    data = TokenizedReviews.from_lists(ids, labels)
    return data, {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def train_as_the_notebook_does(
    model: TextClassifier, optimizer: torch.optim.Optimizer, steps: int
) -> list[float]:
    _, batch = notebook_batches()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_notebooks_flat_loss_is_reproduced_and_refused() -> None:
    torch.manual_seed(0)
    config = TextClassifierConfig(**PRESETS["notebook"], vocab_size=60, max_length=16)
    earlier = TextClassifier(config)
    optimizer = torch.optim.Adam(earlier.parameters(), lr=1e-3)
    # The notebook makes a new model in the cell of the loop and keeps the optimizer.
    model = TextClassifier(config)
    flat = train_as_the_notebook_does(model, optimizer, 60)
    assert max(flat) - min(flat) < 0.1
    assert sum(flat[-10:]) / 10 > 0.6

    with pytest.raises(UserError, match=r"holds 0 of the model's \d+ trainable parameters and \d+ others"):
        guards.check_optimizer(model, optimizer)

    right = torch.optim.Adam(model.parameters(), lr=1e-3)
    guards.check_optimizer(model, right)
    falling = train_as_the_notebook_does(model, right, 60)
    assert falling[-1] < 0.2


def drop_one(model: TextClassifier) -> list[torch.nn.Parameter]:
    return list(model.parameters())[1:]


def frozen_too(model: TextClassifier) -> list[torch.nn.Parameter]:
    model.embedding.weight.requires_grad_(False)
    return list(model.parameters())


def one_more(model: TextClassifier) -> list[torch.nn.Parameter]:
    return [*model.parameters(), torch.nn.Parameter(torch.zeros(1))]


@pytest.mark.parametrize("choose", [drop_one, frozen_too, one_more])
def test_an_optimizer_with_too_few_or_too_many_parameters_is_refused(choose: Any) -> None:
    model = TextClassifier(TextClassifierConfig(vocab_size=60, max_length=16))
    with pytest.raises(UserError, match="create it from the parameters of the model that is trained"):
        guards.check_optimizer(model, torch.optim.Adam(choose(model)))


def test_the_command_refuses_to_start_with_another_models_optimizer(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = torch.optim.Adam

    def notebooks_adam(parameters: Iterator[torch.nn.Parameter], **options: Any) -> torch.optim.Adam:
        return original(
            [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters], **options
        )

    monkeypatch.setattr("torch.optim.Adam", notebooks_adam)
    assert train.main(train_arguments(dataset, tmp_path / "run")) == 2
    assert "the optimizer holds 0 of the model's" in capsys.readouterr().err
    assert positions(tmp_path / "run") == []


def test_a_run_says_what_ran_and_leaves_metrics_plot_and_tensorboard(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train.main(train_arguments(dataset, run, "--train-accuracy", "pass")) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^attention: (sdpa|padfree) \(auto: .+\)$", printed, re.MULTILINE)
    line = r"epoch 2/2: loss \d\.\d{4}, accuracy train 0\.\d+, validation 0\.\d+, test 0\.\d+, \d+\.\d s"
    assert re.search(line, printed)
    chosen = re.search(
        r"chosen on validation: epoch (\d), validation accuracy ([\d.]+), test accuracy ([\d.]+)", printed
    )
    assert chosen is not None
    epochs = [record for record in log_without_clock(run) if "epoch/number" in record]
    assert [record["epoch/number"] for record in epochs] == [1, 2]
    best = max(epochs, key=lambda r: (r["epoch/validation_accuracy"], -r["epoch/validation_loss"]))
    assert best["epoch/number"] == int(chosen[1])
    assert f"{best['epoch/test_accuracy']:.4f}" == chosen[3]
    assert (run / "best").resolve().name == Position(int(chosen[1])).folder_name
    assert (run / reporting.PLOT_FILE).read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").iterdir())


def test_training_learns_the_label_from_words(tmp_path: Path) -> None:
    folder = write_reviews(tmp_path / "reviews", train=400, held_out=100)
    arguments = train_arguments(folder, tmp_path / "run", "--epochs", "8", "--learning-rate", "0.005")
    assert train.main(arguments) == 0
    state = checkpoint.read_json(tmp_path / "run" / "best" / checkpoint.STATE_FILE)["state"]
    assert max(record["test_accuracy"] for record in state["history"]) >= 0.9


def test_a_prediction_does_not_depend_on_the_batch_it_is_in(finished_run: Path, tmp_path: Path) -> None:
    model, tokenizer = weights.load_classifier((finished_run / "best").resolve())
    texts = [text for text, _ in make_rows(60, seed=20)]
    data = TokenizedReviews.from_lists(
        tokenizer(texts, truncation=True, max_length=24)["input_ids"], [0] * len(texts)
    )
    accelerator = launcher.make_accelerator("fp32", cpu=True)
    alone, *batched = (
        inference.evaluate(model, data, accelerator, batch_size=size).z for size in (1, 2, 7, 16, 60)
    )
    for z in batched:
        torch.testing.assert_close(z, alone, rtol=0, atol=2e-6)
    model.eval()
    row = data[0].long()[None]
    for length in (len(row[0]), 16, 20, 24):
        padded = torch.nn.functional.pad(row, (0, max(0, length - row.shape[1])))
        with torch.no_grad():
            logits = model(input_ids=padded, attention_mask=(padded != 0).long()).logits
        torch.testing.assert_close(logits[0, 1] - logits[0, 0], alone[0], rtol=0, atol=2e-6)


def test_bf16_trains_and_its_checkpoint_keeps_fp32_weights(dataset: Path, tmp_path: Path) -> None:
    program = "import sys; from imdb_classifier.commands.train import main; sys.exit(main(sys.argv[1:]))"
    arguments = train_arguments(dataset, tmp_path / "run", "--precision", "bf16")
    # Its own process, since accelerate fixes the precision of a process.
    subprocess.run(
        [sys.executable, "-c", program, *arguments], env={**os.environ, "PYTHONPATH": SOURCES}, check=True
    )
    tensors = weights.load_tensors(tmp_path / "run" / "last" / checkpoint.MODEL_FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_the_trained_model_predicts_from_the_command_line(finished_run: Path, capsys: Any) -> None:
    assert (
        predict.main(["--checkpoint", str(finished_run), "--json", "a great superb film", "an awful film"])
        == 0
    )
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert records[0]["logit"] > records[1]["logit"]


def test_a_set_in_one_file_trains_with_carved_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_csv(tmp_path / "train.csv", make_rows(60, seed=21))
    assert train.main(train_arguments(file, tmp_path / "run", "--epochs", "1")) == 0
    assert "data: no test split: 12 of 60 training reviews held out (fixed seed)" in capsys.readouterr().out
