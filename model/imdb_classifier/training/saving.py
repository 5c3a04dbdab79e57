"""How a run saves itself, goes on from a checkpoint, and chooses the best of its epochs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor

from imdb_classifier.checkpoints import checkpoint, run_folder, weights
from imdb_classifier.checkpoints.run_folder import Position
from imdb_classifier.messages import NonFiniteError, warn
from imdb_classifier.training.guards import non_finite_weights
from imdb_classifier.training.run import Run, RunState


def save(run: Run) -> None:
    """Write a checkpoint and drop those no longer needed; NonFiniteError rather than save NaN or infinite weights."""
    if run.saved_at == run.state.position:
        return
    broken = non_finite_weights(run.bare_model)
    if broken:
        what = f"weights became NaN or infinite ({', '.join(broken)})"
        raise NonFiniteError(f"{what}: nothing saved, the last checkpoint stands")
    states = gather_object([{name: value.cpu() for name, value in weights.rng_state().items()}])
    if run.accelerator.is_main_process:
        folder = run.state.position.folder_in(run.folder)
        checkpoint.write_folder(folder, lambda building: _fill(run, building, states))
        run_folder.settle(run.folder, run.state.position, run.state.best)
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
        for position in run_folder.positions(run.folder):
            if position > run.state.position:
                checkpoint.remove(position.folder_in(run.folder))
        # The run may have been killed between its save and this.
        run_folder.settle(run.folder, run.state.position, run.state.best)


def merit(record: Mapping[str, Any]) -> tuple[float, float]:
    """What the best epoch has most of: validation accuracy and, where that is equal, as on few reviews, the lower loss."""
    return record["validation_accuracy"], -record["validation_loss"]


def choose_best_again(run: Run) -> None:
    """Among the epochs whose checkpoints are intact: the best one may be damaged, or deleted before a step back."""
    lost = run.state.best
    run.state.best = None
    for record in sorted(run.state.history, key=merit, reverse=True):
        position = Position(record["number"])
        if checkpoint.is_intact(position.folder_in(run.folder)):
            run.state.best = position
            break
    if lost is not None and run.state.best != lost and run.accelerator.is_main_process:
        now = "none is left" if run.state.best is None else f"now it is epoch {run.state.best.epoch}"
        warn(f"the best checkpoint, of epoch {lost.epoch}, is missing or damaged; {now}")
