"""The one loop of a training run.

On one machine's CPU, two runs of the same command write the same checkpoints byte for byte, and so does a run that was
stopped, or killed after its first save, and resumed with that command: the order of the batches follows from (seed,
epoch), and a checkpoint holds the weights, the optimizer, the generators, the position and the sums of the epoch so
far. On a GPU that holds as far as its kernels repeat. The TensorBoard log may show a repeated step twice.
"""

import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch

from imdb_classifier.checkpoints.run_folder import Position
from imdb_classifier.data.batches import ReviewBatches, make_loader
from imdb_classifier.messages import NonFiniteError, Stopped
from imdb_classifier.training.graphs import GraphedStep
from imdb_classifier.training.guards import describe_fault
from imdb_classifier.training.inference import Evaluation, collator_for, evaluate
from imdb_classifier.training.run import Run
from imdb_classifier.training.saving import merit, save
from imdb_classifier.training.watch import STEPS_BETWEEN_READS, Reading


def fit(run: Run) -> None:
    """Train to the last epoch; after each, evaluate, let validation choose the best, and save.

    Raises NonFiniteError where a loss, gradient or evaluation is NaN or infinite, at most `STEPS_BETWEEN_READS` steps
    after it, in which no weight has changed, and where a weight that is saved would be; the last checkpoint stands as it
    was. Raises Stopped where a signal came; the state is saved.
    """
    run.step = partial(take_step, run)
    if run.options.cuda_graphs:
        run.step = GraphedStep(run.step)
    with run.stop:
        while run.state.position.epoch < run.options.epochs:
            train_epoch(run)
            finish_epoch(run)


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
        make_loader(data, batches, collator_for(run.bare_model, run.buckets), run.workers)
    )
    run.reporter.start_epoch(epoch + 1, options.epochs, state.position.batch, batches.total)
    run.model.train()
    run.watch.start_epoch(state.loss_sum, state.correct, state.seen, state.skipped_in_a_row)
    run.epoch_began, run.input_seconds = time.monotonic(), 0.0
    for batch in timed(run, loader):
        rows = batch.pop("rows")
        run.step(batch)
        state.step += 1
        state.position = Position(epoch, state.position.batch + 1)
        run.unread.append((state.position, rows))
        run.reporter.step(state.position.batch, len(rows) * run.accelerator.num_processes)
        if state.step % STEPS_BETWEEN_READS == 0:
            reading = read(run)
            run.reporter.metrics(state.position, state.step, {"train/batch_loss": reading.batch_loss})
        stop_if_asked(run)
        if options.save_every and state.step % options.save_every == 0:
            read(run)
            save(run)
    read(run)
    run.reporter.end_epoch()


def timed(run: Run, loader: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The batches, with what the host waits for them on the run's clock."""
    batches = iter(loader)
    while True:
        began = time.monotonic()
        batch = next(batches, None)
        run.input_seconds += time.monotonic() - began
        if batch is None:
            return
        yield batch


def take_step(run: Run, batch: dict[str, Any]) -> None:
    """One step of the optimizer; nothing in it waits for the device, so that a CUDA graph can hold it."""
    run.optimizer.zero_grad()
    output = run.model(**batch)
    run.accelerator.backward(output.loss)
    if run.accelerator.scaler is not None:
        run.accelerator.unscale_gradients(run.optimizer)
    run.watch.look(output.loss, output.logits, batch["labels"])
    run.optimizer.step()


def read(run: Run) -> Reading:
    """Wait for the device and take over its sums; NonFiniteError if one of the steps since the last time was broken."""
    state, reading = run.state, run.watch.read()
    if reading.broken >= 0:
        raise describe_fault(run, reading.broken - run.steps_read)
    run.steps_read += len(run.unread)
    run.unread.clear()
    state.loss_sum, state.correct, state.seen = reading.loss_sum, reading.correct, reading.seen
    state.skipped_in_a_row = reading.skipped_in_a_row
    if state.seen:
        run.reporter.mean_loss = state.loss_sum / state.seen
    return reading


def finish_epoch(run: Run) -> None:
    """Evaluate, record the epoch, move on to the next one and save."""
    state, trained = run.state, time.monotonic()
    validation, test = evaluate_split(run, "validation"), evaluate_split(run, "test")
    train_accuracy = state.correct / state.seen
    if run.options.train_accuracy == "pass":
        train_accuracy = evaluate_split(run, "train").accuracy
    number = state.position.epoch + 1
    record = {
        "number": number,
        "loss": state.loss_sum / state.seen,
        "train_accuracy": train_accuracy,
        "validation_loss": validation.loss,
        "validation_accuracy": validation.accuracy,
        "test_accuracy": test.accuracy,
    }
    best = state.best_record
    state.history.append(record)
    state.position = Position(number)
    if best is None or merit(record) > merit(best):
        state.best = state.position
    state.loss_sum, state.correct, state.seen = 0.0, 0, 0
    began, ended = run.epoch_began, time.monotonic()
    seconds = {"train_seconds": trained - began, "seconds": ended - began, "input_seconds": run.input_seconds}
    # Before the save: a run killed in between drops what was logged beyond its checkpoint and logs it again.
    values = {f"epoch/{name}": value for name, value in (record | seconds).items()}
    run.reporter.metrics(state.position, state.step, values)
    run.reporter.plot(state.history)
    save(run)
    run.reporter.say(
        f"epoch {number}/{run.options.epochs}: loss {record['loss']:.4f}, accuracy train "
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
            workers=run.workers,
            buckets=run.buckets,
            after_batch=lambda reviews: stop_if_asked(run),
        )
    except NonFiniteError as error:
        where = f"evaluation on {name} after epoch {run.state.position.epoch + 1}"
        raise NonFiniteError(f"{where}: {error}; checkpoints are untouched") from None


def stop_if_asked(run: Run) -> None:
    """Answer a signal: save and leave. With several processes all leave if one was asked, on GPUs after a read."""
    number = run.stop.number or 0
    if run.accelerator.num_processes > 1:
        if run.accelerator.device.type != "cpu" and run.unread:
            # Asking the others waits for this GPU.
            return
        asked = torch.tensor([number], device=run.accelerator.device)
        number = int(run.accelerator.gather(asked).max())
    if number:
        read(run)
        save(run)
        run.reporter.end_epoch()
        raise Stopped(f"stopped by signal {number}; add --resume to the command to go on", number)
