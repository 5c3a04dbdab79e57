"""The training run: what it is made of, its one loop, and how it saves and goes on.

On one machine's CPU, two runs of the same command write the same checkpoints byte for byte, and so does a run that was
stopped, or killed after its first save, and resumed with that command: the order of the batches follows from (seed,
epoch), and a checkpoint holds the weights, the optimizer, the generators, the position and the sums of the epoch so
far. On a GPU that holds as far as its kernels repeat. The TensorBoard log may show a repeated step twice.
"""

import dataclasses
import time
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from imdb_classifier.checkpoints import checkpoint, weights
from imdb_classifier.checkpoints.checkpoint import Position
from imdb_classifier.data.batches import ReviewBatches, TokenizedReviews, make_loader
from imdb_classifier.messages import NonFiniteError, Stopped, warn
from imdb_classifier.modeling import TextClassifier
from imdb_classifier.training.guards import check_finite, non_finite_weights
from imdb_classifier.training.inference import Evaluation, evaluate
from imdb_classifier.training.reporting import Reporter
from imdb_classifier.training.signals import StopRequest

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerFast

STEPS_BETWEEN_METRICS = 20


@dataclass
class RunState:
    """What a checkpoint must know beside tensors. The sums are over the current epoch's batches so far."""

    position: Position = field(default_factory=Position)
    step: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: Position | None = None
    # fp16 steps that the scaler left out since the last one that was taken
    skipped_in_a_row: int = 0

    @property
    def best_record(self) -> dict[str, Any] | None:
        """The history's entry for the checkpoint that `best` names."""
        return None if self.best is None else self.history[self.best.epoch - 1]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "RunState":
        best = content["best"]
        return cls(
            **{**content, "position": Position(**content["position"]), "best": best and Position(**best)}
        )


@dataclass
class Run:
    """One training run. `settings` are the choices that decide its result and that a resumed run must repeat."""

    folder: Path
    options: Namespace
    settings: dict[str, Any]
    attention: str
    accelerator: "Accelerator"
    model: nn.Module
    optimizer: torch.optim.Optimizer
    tokenizer: "PreTrainedTokenizerFast"
    data: dict[str, TokenizedReviews]
    stop: StopRequest
    reporter: Reporter = field(init=False)
    state: RunState = field(default_factory=RunState)
    saved_at: Position | None = None
    # Beside the state: a clock would make equal runs write different checkpoints.
    epoch_began: float = 0.0

    @property
    def bare_model(self) -> TextClassifier:
        """The model without what accelerate wraps around it: its names are those that a checkpoint holds."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, TextClassifier):
            raise TypeError(
                f"expected a TextClassifier inside {type(self.model).__name__}, got {type(model).__name__}"
            )
        return model


def fit(run: Run) -> RunState:
    """Train to the last epoch; after each, evaluate, let validation choose the best, and save.

    Raises:
        NonFiniteError: a loss, gradient, weight or evaluation is NaN or infinite; the last checkpoint stands as it was.
        Stopped: a signal came; the state is saved.
    """
    with run.stop:
        while run.state.position.epoch < run.options.epochs:
            train_epoch(run)
            finish_epoch(run)
    return run.state


def train_epoch(run: Run) -> None:
    """The loop: the batches of the current epoch from the current position on."""
    state, options, epoch = run.state, run.options, run.state.position.epoch
    data = run.data["train"]
    batches = ReviewBatches(
        data.lengths,
        options.batch_size,
        seed=options.seed,
        epoch=epoch,
        group_by_length=options.group_by_length,
        start=state.position.batch,
    )
    loader = run.accelerator.prepare_data_loader(
        make_loader(data, batches, run.bare_model.config.pad_token_id, options.workers)
    )
    run.reporter.start_epoch(epoch + 1, options.epochs, state.position.batch, batches.total)
    run.model.train()
    run.epoch_began = time.monotonic()
    for batch in loader:
        rows = batch.pop("rows")
        output = run.model(**batch)
        run.accelerator.backward(output.loss)
        check_finite(run, output.loss, rows)
        run.optimizer.step()
        run.optimizer.zero_grad()

        loss, correct, seen = totals(run, output.loss, output.logits, batch["labels"])
        state.loss_sum += loss * seen
        state.correct += correct
        state.seen += seen
        state.step += 1
        state.position = Position(epoch, state.position.batch + 1)
        run.reporter.step(state.position.batch, seen, state.loss_sum / state.seen)
        if state.step % STEPS_BETWEEN_METRICS == 0:
            run.reporter.metrics(state.position, state.step, {"train/batch_loss": loss})
        stop_if_asked(run)
        if options.save_every and state.step % options.save_every == 0:
            save(run)
    run.reporter.end_epoch()


def totals(run: Run, loss: Tensor, logits: Tensor, labels: Tensor) -> tuple[float, int, int]:
    """(mean loss, correct, reviews) of a batch over all processes."""
    correct = (logits.argmax(dim=-1) == labels).sum()
    if run.accelerator.num_processes == 1:
        return loss.item(), int(correct), len(labels)
    seen = torch.full_like(correct, len(labels))
    loss_sum, correct, seen = run.accelerator.reduce((loss.detach() * seen, correct, seen), reduction="sum")
    return loss_sum.item() / int(seen), int(correct), int(seen)


def finish_epoch(run: Run) -> None:
    """Evaluate, record the epoch, move on to the next one and save."""
    state, trained = run.state, time.monotonic()
    validation, test = evaluate_split(run, "validation"), evaluate_split(run, "test")
    whole_train = evaluate_split(run, "train").accuracy if run.options.train_accuracy == "pass" else None
    epoch = state.position.epoch
    record = {
        "number": epoch + 1,
        "loss": state.loss_sum / state.seen,
        "train_accuracy": state.correct / state.seen if whole_train is None else whole_train,
        "validation_loss": validation.loss,
        "validation_accuracy": validation.accuracy,
        "test_accuracy": test.accuracy,
    }
    best = state.best_record
    state.history.append(record)
    state.position = Position(epoch + 1)
    if best is None or merit(record) > merit(best):
        state.best = state.position
    state.loss_sum, state.correct, state.seen = 0.0, 0, 0
    ended = time.monotonic()
    seconds = {"train_seconds": trained - run.epoch_began, "seconds": ended - run.epoch_began}
    # Before the save: a run killed in between drops what was logged beyond its checkpoint and logs it again.
    run.reporter.metrics(
        state.position, state.step, {f"epoch/{name}": value for name, value in (record | seconds).items()}
    )
    run.reporter.plot(state.history)
    save(run)
    run.reporter.say(
        f"epoch {epoch + 1}/{run.options.epochs}: loss {record['loss']:.4f}, accuracy train "
        f"{record['train_accuracy']:.4f}, validation {record['validation_accuracy']:.4f}, test "
        f"{record['test_accuracy']:.4f}, {seconds['seconds']:.1f} s"
    )


def evaluate_split(run: Run, name: str) -> Evaluation:
    try:
        return evaluate(
            run.model,
            run.data[name],
            run.accelerator,
            batch_size=run.options.batch_size,
            pad_token_id=run.bare_model.config.pad_token_id,
            workers=run.options.workers,
            after_batch=lambda reviews: stop_if_asked(run),
        )
    except NonFiniteError as error:
        raise NonFiniteError(
            f"evaluation on {name} after epoch {run.state.position.epoch + 1}: {error}; checkpoints are untouched"
        ) from None


def stop_if_asked(run: Run) -> None:
    """Answer a signal: save and leave. With several processes all leave if one was asked."""
    number = run.stop.number or 0
    if run.accelerator.num_processes > 1:
        asked = torch.tensor([number], device=run.accelerator.device)
        number = int(run.accelerator.gather(asked).max())
    if number:
        save(run)
        run.reporter.end_epoch()
        raise Stopped(f"stopped by signal {number}; add --resume to the command to go on", number)


def save(run: Run) -> None:
    """Write a checkpoint at the current position and drop those no longer needed.

    Raises:
        NonFiniteError: a weight is NaN or infinite, which no checkpoint may hold.
    """
    if run.saved_at == run.state.position:
        return
    broken = non_finite_weights(run.bare_model)
    if broken:
        raise NonFiniteError(
            f"weights became NaN or infinite ({', '.join(broken)}): nothing saved, the last checkpoint stands"
        )
    from accelerate.utils import gather_object

    states = gather_object([{name: value.cpu() for name, value in weights.rng_state().items()}])
    if run.accelerator.is_main_process:
        folder = run.folder / checkpoint.CHECKPOINTS / run.state.position.folder_name
        checkpoint.write_folder(folder, lambda building: _fill(run, building, states))
        checkpoint.settle(run.folder, run.state.position, run.state.best)
    run.accelerator.wait_for_everyone()
    run.saved_at = run.state.position


def _fill(run: Run, folder: Path, rng_states: list[dict[str, Tensor]]) -> None:
    weights.save_classifier(folder, run.bare_model, run.tokenizer)
    weights.save_optimizer(folder / checkpoint.OPTIMIZER_FILE, run.bare_model, run.optimizer)
    weights.save_rng(folder / checkpoint.RNG_FILE, rng_states)
    scaler = run.accelerator.scaler
    content = {
        "settings": run.settings,
        "state": run.state.to_json(),
        "scaler": None if scaler is None else scaler.state_dict(),
    }
    checkpoint.write_json(folder / checkpoint.STATE_FILE, content)


def restore(run: Run, folder: Path) -> None:
    """Put the run where the verified checkpoint `folder` left it; the model has its weights already."""
    content = checkpoint.read_json(folder / checkpoint.STATE_FILE)
    weights.load_optimizer(folder / checkpoint.OPTIMIZER_FILE, run.bare_model, run.optimizer)
    try:
        run.state, scaler_state = RunState.from_json(content["state"]), content["scaler"]
    except (KeyError, TypeError):
        raise checkpoint.other_version(folder) from None
    if run.accelerator.scaler is not None and scaler_state is not None:
        run.accelerator.scaler.load_state_dict(scaler_state)
    weights.load_rng(folder / checkpoint.RNG_FILE, run.accelerator.process_index)
    run.saved_at = run.state.position
    choose_best_again(run)
    if run.accelerator.is_main_process:
        # What stands after it is damaged, or it would have been chosen.
        checkpoint.drop_after(run.folder, run.state.position)
        # The run may have been killed between its save and this.
        checkpoint.settle(run.folder, run.state.position, run.state.best)


def merit(record: Mapping[str, Any]) -> tuple[float, float]:
    """What the best epoch has most of: validation accuracy and, where that is equal, as on few reviews, the lower loss."""
    return record["validation_accuracy"], -record["validation_loss"]


def choose_best_again(run: Run) -> None:
    """Among the epochs whose checkpoints are intact: the best one may be damaged, or deleted before a step back."""
    lost = run.state.best
    run.state.best = None
    for record in sorted(run.state.history, key=merit, reverse=True):
        position = Position(record["number"])
        if checkpoint.is_intact(run.folder / checkpoint.CHECKPOINTS / position.folder_name):
            run.state.best = position
            break
    if lost is not None and run.state.best != lost and run.accelerator.is_main_process:
        now = "none is left" if run.state.best is None else f"now it is epoch {run.state.best.epoch}"
        warn(f"the best checkpoint, of epoch {lost.epoch}, is missing or damaged; {now}")
