"""No optimizer step on a number that is not finite: the run stops, says where, and what was saved is good."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from imdb_classifier.checkpoints import checkpoint, weights
from imdb_classifier.checkpoints.run_folder import Position, positions
from imdb_classifier.commands import evaluate, predict, train
from imdb_classifier.data.batches import ReviewBatches
from imdb_classifier.data.rows import Reading
from imdb_classifier.data.splits import load_reviews
from imdb_classifier.data.tokenization import encode, train_tokenizer
from imdb_classifier.modeling import TextClassifier
from imdb_classifier.training import guards
from imdb_classifier.training.watch import MAX_SKIPPED_STEPS, STEPS_BETWEEN_READS, Watch
from tiny_reviews import train_arguments, write_reviews
from tiny_runs import STEPS_AN_EPOCH, assert_same_run

# Whose results become NaN for one review.
MODULES = (
    "embedding",
    "layers.0.mha.dense",
    "layers.0.layernorm1",
    "layers.0.ffn.0",
    "layers.0.layernorm2",
    "layers.1.mha",
    "layers.1.ffn",
    "classification",
)
PLACES = (*MODULES, "loss", "gradient", "weight", "labels")


class Poison:
    """Puts a NaN into one place of the `step`-th training batch of a run, and keeps the weights of that moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, place: str, step: int):
        self.place, self.step, self.batches = place, step, 0
        self.weights: dict[str, torch.Tensor] = {}
        forward = TextClassifier.forward

        def poisoned(model: TextClassifier, **inputs: Any) -> Any:
            self.model = model
            self.batches += model.training
            if not model.training or self.batches != self.step:
                return forward(model, **inputs)
            plant = getattr(self, place if place in ("loss", "gradient", "weight", "labels") else "module")
            output = plant(model, lambda: forward(model, **inputs), inputs)
            self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            return output

        monkeypatch.setattr(TextClassifier, "forward", poisoned)

    def module(self, model: TextClassifier, forward: Callable[[], Any], inputs: dict) -> Any:
        # One review, and not one number, which dropout might leave out.
        hook = model.get_submodule(self.place).register_forward_hook(
            lambda module, arguments, output: output.index_fill(0, torch.tensor([0]), float("nan"))
        )
        output = forward()
        hook.remove()
        return output

    def loss(self, model: TextClassifier, forward: Callable[[], Any], inputs: dict) -> Any:
        output = forward()
        output.loss = output.loss * float("nan")
        return output

    def gradient(self, model: TextClassifier, forward: Callable[[], Any], inputs: dict) -> Any:
        def once(gradient: torch.Tensor) -> torch.Tensor:
            hook.remove()
            return gradient * float("inf")

        hook = model.classification.weight.register_hook(once)
        return forward()

    def weight(self, model: TextClassifier, forward: Callable[[], Any], inputs: dict) -> Any:
        with torch.no_grad():
            model.layers[0].mha.wq.bias[0] = float("nan")
        return forward()

    def labels(self, model: TextClassifier, forward: Callable[[], Any], inputs: dict) -> Any:
        inputs["labels"] = torch.full_like(inputs["labels"], float("nan"), dtype=torch.float32)
        return forward()

    def changed_weights(self) -> list[str]:
        now = self.model.state_dict()
        return [
            n
            for n, old in self.weights.items()
            if not torch.equal(now[n].view(torch.int32), old.view(torch.int32))
        ]


@pytest.mark.parametrize("step", [1, STEPS_AN_EPOCH + 2])
@pytest.mark.parametrize("place", PLACES)
def test_a_nan_stops_the_run_and_changes_no_weight(
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
    assert poison.changed_weights() == []
    (message,) = capsys.readouterr().err.splitlines()
    epoch, batch = divmod(step - 1, STEPS_AN_EPOCH)
    assert f"at epoch {epoch + 1}, batch {batch + 1}: no weight was changed" in message
    diagnostic = json.loads((run / guards.DIAGNOSTIC_FILE).read_text())
    assert (diagnostic["epoch"], diagnostic["batch"], diagnostic["step"]) == (epoch + 1, batch + 1, step)
    assert diagnostic["training_rows"] == rows_of(dataset, epoch)[batch]
    assert ("gradient norm" if place == "gradient" else "loss is nan") in diagnostic["what"]
    assert place != "gradient" or diagnostic["non_finite_gradients"] == ["classification.weight"]
    assert diagnostic["non_finite_weights"] == (["layers.0.mha.wq.bias"] if place == "weight" else [])
    saved = positions(run)
    assert saved == ([Position(1)] if step > STEPS_AN_EPOCH else [])
    # What stands is good: without the poison the run ends as if nothing had happened.
    assert train.main([*arguments, *(["--resume"] if saved else [])]) == 0
    assert_same_run(run, finished_run)


def rows_of(dataset: Path, epoch: int) -> list[list[int]]:
    """The rows of each batch of an epoch of `train_arguments`, from the rule that orders them."""
    reviews = load_reviews([str(dataset)], None, Reading(None, None, False))
    tokenizer = train_tokenizer(reviews.train.texts, 120, 24)
    lengths = [len(ids) for ids in encode(tokenizer, reviews.train.texts, 24)]
    return list(ReviewBatches(lengths, 8, seed=0, epoch=epoch))


@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_broken_step_is_reported_within_twenty(
    place: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = Poison(monkeypatch, place, step=3)
    assert train.main(train_arguments(dataset, tmp_path / "run", "--batch-size", "1")) == 3
    assert 3 < poison.batches <= 3 + STEPS_BETWEEN_READS
    assert poison.changed_weights() == []
    assert json.loads((tmp_path / "run" / guards.DIAGNOSTIC_FILE).read_text())["step"] == 3


def test_a_checkpoint_is_never_written_over_a_broken_step(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Poison(monkeypatch, "gradient", step=3)
    assert train.main(train_arguments(dataset, tmp_path / "run", "--save-every", "1")) == 3
    assert positions(tmp_path / "run") == [Position(0, 1), Position(0, 2)]


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
    forward = TextClassifier.forward

    def remember(model: TextClassifier, **inputs: Any) -> Any:
        models[:] = [model]
        return forward(model, **inputs)

    monkeypatch.setattr(TextClassifier, "forward", remember)
    after_step(3, lambda: models[0].classification.bias.data.fill_(float("inf")))
    run = tmp_path / "run"
    assert train.main(train_arguments(dataset, run, "--save-every", "1")) == 3
    assert positions(run) == [Position(0, 1), Position(0, 2)]


def make_watch(scaled: bool = False) -> tuple[Watch, torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    return Watch(optimizer, model.named_parameters(), scaled=scaled), model, optimizer


def step_on(
    watch: Watch,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    grow: float = 1.0,
    scaled: bool = False,
) -> None:
    optimizer.zero_grad()
    logits, labels = model(torch.ones(4, 3)), torch.tensor([0, 1, 1, 1])
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    model.bias.grad *= grow
    watch.look(loss, logits, labels)
    if scaled:
        # as a GradScaler tells it
        optimizer.found_inf = torch.tensor(float(math.isinf(grow)))
    optimizer.step()


def test_fp16_overflows_are_searched_for_a_scale_but_not_forever() -> None:
    watch, *parts = make_watch(scaled=True)
    for _ in range(MAX_SKIPPED_STEPS):
        step_on(watch, *parts, grow=float("inf"), scaled=True)
        # A run that is resumed counts on.
        reading = watch.read()
        watch.start_epoch(reading.loss_sum, reading.correct, reading.seen, reading.skipped_in_a_row)
    assert (reading.skipped_in_a_row, reading.broken) == (MAX_SKIPPED_STEPS, -1)
    step_on(watch, *parts, grow=float("inf"), scaled=True)
    assert watch.read().broken == MAX_SKIPPED_STEPS
    assert watch.fault()[1:] == (float("inf"), ["bias"])


def test_one_step_of_fp16_that_is_taken_ends_the_search() -> None:
    watch, *parts = make_watch(scaled=True)
    for grow in (float("inf"), float("inf"), 1.0, float("inf")):
        step_on(watch, *parts, grow=grow, scaled=True)
    assert (watch.read().skipped_in_a_row, watch.read().broken) == (1, -1)


def test_the_first_broken_step_is_the_one_that_is_told() -> None:
    watch, model, optimizer = make_watch()
    step_on(watch, model, optimizer)
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    for grow in (float("nan"), 1.0, float("inf")):
        step_on(watch, model, optimizer, grow)
    assert watch.read().broken == 1
    assert all(map(torch.equal, kept, model.parameters()))
    assert watch.fault()[2] == ["bias"]


def test_the_sums_of_a_watch_are_those_of_its_batches() -> None:
    watch, model, optimizer = make_watch()
    watch.start_epoch(10.0, 5, 8, 0)
    step_on(watch, model, optimizer)
    reading = watch.read()
    assert (reading.seen, reading.loss_sum) == (12, 10.0 + 4 * reading.batch_loss)
    assert reading.correct in (6, 8)  # one of four labels is 0, and all logits are equal


def test_a_gradient_that_adam_cannot_square_is_a_fault() -> None:
    watch, model, optimizer = make_watch()
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    step_on(watch, model, optimizer, grow=1e30)
    assert watch.read().broken == 0
    assert all(map(torch.equal, kept, model.parameters()))
    loss, norm, culprits = watch.fault()
    assert math.isfinite(loss) and norm > 1e28 and culprits == ["bias"]


def test_a_scaler_that_finds_nothing_does_not_undo_the_stop() -> None:
    watch, model, optimizer = make_watch(scaled=True)
    for _ in range(MAX_SKIPPED_STEPS + 1):
        step_on(watch, model, optimizer, grow=float("inf"), scaled=True)
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    step_on(watch, model, optimizer, scaled=True)
    assert all(map(torch.equal, kept, model.parameters()))


def test_a_watch_sums_over_all_processes_and_sees_what_another_one_lost() -> None:
    torch.manual_seed(0)
    model, others = torch.nn.Linear(3, 2), torch.tensor([1.5, 2.0, 4.0], dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    watch = Watch(optimizer, model.named_parameters(), reduce=lambda batch: batch + others)
    step_on(watch, model, optimizer)
    alone, *parts = make_watch()
    step_on(alone, *parts)
    reading, own = watch.read(), alone.read()
    assert (reading.seen, reading.correct) == (own.seen + 4, own.correct + 2)
    assert reading.loss_sum == own.loss_sum + 1.5
    others[0] = float("nan")
    step_on(watch, model, optimizer)
    assert watch.read().broken == 1
