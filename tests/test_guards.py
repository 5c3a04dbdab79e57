"""No optimizer step on a number that is not finite: the run stops, says where, and what was saved is good."""

import json
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from imdb_classifier.checkpoints import checkpoint, weights
from imdb_classifier.checkpoints.run_folder import Position, positions
from imdb_classifier.commands import evaluate, predict, train
from imdb_classifier.modeling import TextClassifier
from imdb_classifier.training import guards, loop
from imdb_classifier.training.run import Run, RunState
from tiny_reviews import train_arguments, write_reviews
from tiny_runs import STEPS_AN_EPOCH, assert_same_run


class Poison:
    """Puts a NaN into one place of the `step`-th training batch of a run, and counts the optimizer's steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, place: str, step: int):
        self.place, self.step = place, step
        self.batches = self.optimizer_steps = 0
        forward, adam_step = TextClassifier.forward, torch.optim.Adam.step

        def poisoned(model: TextClassifier, **inputs: Any) -> Any:
            if not model.training:
                return forward(model, **inputs)
            self.batches += 1
            if self.batches != self.step:
                return forward(model, **inputs)
            return getattr(self, place)(model, lambda: forward(model, **inputs), inputs)

        def counted(optimizer: torch.optim.Adam, *arguments: Any, **options: Any) -> Any:
            self.optimizer_steps += 1
            return adam_step(optimizer, *arguments, **options)

        monkeypatch.setattr(TextClassifier, "forward", poisoned)
        monkeypatch.setattr(torch.optim.Adam, "step", counted)

    def loss(self, model: TextClassifier, forward: Callable[[], Any], inputs: dict) -> Any:
        output = forward()
        output.loss = output.loss * float("nan")
        return output

    def gradient(self, model: TextClassifier, forward: Callable[[], Any], inputs: dict) -> Any:
        model.classification.weight.register_hook(lambda gradient: gradient * float("inf"))
        return forward()

    def weight(self, model: TextClassifier, forward: Callable[[], Any], inputs: dict) -> Any:
        with torch.no_grad():
            model.layers[0].mha.wq.bias[0] = float("nan")
        return forward()

    def data(self, model: TextClassifier, forward: Callable[[], Any], inputs: dict) -> Any:
        inputs["labels"] = torch.full_like(inputs["labels"], float("nan"), dtype=torch.float32)
        return forward()


@pytest.mark.parametrize("step", [1, 4, STEPS_AN_EPOCH + 2])
@pytest.mark.parametrize("place", ["loss", "gradient", "weight", "data"])
def test_a_nan_stops_the_run_before_the_optimizer_step(
    place: str,
    step: int,
    dataset: Path,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    arguments = train_arguments(dataset, run)
    with monkeypatch.context() as patch:
        poison = Poison(patch, place, step)
        assert train.main(arguments) == 3
    assert poison.optimizer_steps == step - 1
    (message,) = capsys.readouterr().err.splitlines()
    assert "stopped before the optimizer step" in message
    diagnostic = json.loads((run / guards.DIAGNOSTIC_FILE).read_text())
    assert diagnostic["step"] == step
    assert len(diagnostic["training_rows"]) == 8
    assert ("gradient norm" if place == "gradient" else "loss is nan") in diagnostic["what"]
    assert diagnostic["non_finite_weights"] == (["layers.0.mha.wq.bias"] if place == "weight" else [])
    saved = positions(run)
    assert saved == ([Position(1)] if step > STEPS_AN_EPOCH else [])
    # What stands is good: without the poison the run ends as if nothing had happened.
    assert train.main([*arguments, *(["--resume"] if saved else [])]) == 0
    assert_same_run(run, finished_run)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("train_accuracy", ["running", "pass"])
def test_a_nan_in_an_evaluation_stops_the_run_and_no_file_holds_it(
    value: float,
    train_accuracy: str,
    dataset: Path,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, forward = tmp_path / "run", TextClassifier.forward
    arguments = train_arguments(dataset, run, "--train-accuracy", train_accuracy)

    def poisoned(model: TextClassifier, **inputs: Any) -> Any:
        output = forward(model, **inputs)
        if not model.training and positions(run):
            output.logits = output.logits.index_fill(0, torch.tensor([0]), value)
        return output

    with monkeypatch.context() as patch:
        patch.setattr(TextClassifier, "forward", poisoned)
        assert train.main(arguments) == 3
    (message,) = capsys.readouterr().err.splitlines()
    assert "evaluation on validation after epoch 2: " in message
    assert "reviews get a logit that is NaN or infinite" in message
    assert positions(run) == [Position(1)]
    assert not re.search("NaN|Infinity", (run / "metrics.jsonl").read_text())
    if train_accuracy == "running":
        assert train.main([*arguments, "--resume"]) == 0
        assert_same_run(run, finished_run)


def test_a_learning_rate_that_blows_the_model_up_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_reviews(tmp_path / "reviews", train=8, held_out=4)
    arguments = train_arguments(folder, tmp_path / "run", "--learning-rate", "1e30")
    assert train.main(arguments) == 3
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert positions(tmp_path / "run") == []


def test_commands_that_only_read_do_not_print_nan(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(finished_run / "last", tmp_path / "checkpoint"))
    (folder / checkpoint.MANIFEST).unlink()
    tensors = weights.load_tensors(folder / checkpoint.MODEL_FILE)
    tensors["classification.weight"].fill_(3e38)
    weights.save_tensors(folder / checkpoint.MODEL_FILE, tensors)
    dataset = str(finished_run.parent / "reviews")
    assert evaluate.main(["--cpu", "--checkpoint", str(folder), "--dataset", dataset, "--json"]) == 3
    assert predict.main(["--cpu", "--checkpoint", str(folder), "--json", "a good film"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("get a logit that is NaN or infinite") == 2


def test_weights_that_became_infinite_are_not_saved(
    dataset: Path, tmp_path: Path, after_step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[TextClassifier] = []
    original = loop.check_finite

    def remember(run: Run, *arguments: Any) -> None:
        models[:] = [run.bare_model]
        original(run, *arguments)

    monkeypatch.setattr(loop, "check_finite", remember)
    after_step(3, lambda: models[0].classification.bias.data.fill_(float("inf")))
    run = tmp_path / "run"
    assert train.main(train_arguments(dataset, run, "--save-every", "1")) == 3
    assert positions(run) == [Position(0, 1), Position(0, 2)]


def test_fp16_overflows_are_searched_for_a_scale_but_not_forever(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([float("inf"), 0.0])
    module = torch.nn.Module()
    module.weight = parameter
    run = Namespace(
        accelerator=Namespace(
            scaler=object(), unscale_gradients=lambda optimizer: None, is_main_process=True
        ),
        optimizer=None,
        bare_model=module,
        state=RunState(),
        folder=tmp_path,
    )
    for _ in range(guards.MAX_SKIPPED_STEPS):
        guards.check_finite(run, torch.tensor(0.7), torch.arange(2))
        # A run that is resumed counts on.
        run.state = RunState.from_json(run.state.to_json())
    with pytest.raises(guards.NonFiniteError, match="gradient norm is inf"):
        guards.check_finite(run, torch.tensor(0.7), torch.arange(2))
