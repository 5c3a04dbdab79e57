"""What a training run refuses to go on with: an optimizer of another model, NaN and infinity."""

import math

import torch
from torch import nn

from imdb_classifier.checkpoints.checkpoint import write_json
from imdb_classifier.checkpoints.run_folder import DIAGNOSTIC_FILE
from imdb_classifier.messages import NonFiniteError, UserError
from imdb_classifier.training.run import Run


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that does not hold exactly the model's trainable parameters.

    It is the notebook's fault: an optimizer made for an earlier model object leaves the one in the loop as it was,
    and the loss stays flat without any message.
    """
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if held != trainable:
        raise UserError(
            f"the optimizer holds {len(held & trainable)} of the model's {len(trainable)} trainable parameters and "
            f"{len(held - trainable)} others: create it from the parameters of the model that is trained"
        )


def describe_fault(run: Run, index: int) -> NonFiniteError:
    """The error for the step `run.unread[index]`, found to be not finite, with a diagnostic beside the checkpoints."""
    position, rows = run.unread[index]
    loss, norm, culprits = run.watch.fault()
    if run.accelerator.num_processes > 1:
        rows = run.accelerator.gather(rows)
    what = f"loss is {loss}"
    if math.isfinite(loss):
        what = f"gradient norm is {norm:g}" + ", too large to be squared in fp32" * math.isfinite(norm)
    diagnostic = {
        "what": what,
        "epoch": position.epoch + 1,
        "batch": position.batch,
        "step": run.state.step - len(run.unread) + index + 1,
        "training_rows": rows.tolist(),
        "non_finite_gradients": culprits,
        "non_finite_weights": non_finite_weights(run.bare_model),
    }
    if run.accelerator.is_main_process:
        write_json(run.folder / DIAGNOSTIC_FILE, diagnostic)
    return NonFiniteError(
        f"{what} at epoch {position.epoch + 1}, batch {position.batch}: no weight was changed by this step or after it, "
        f"checkpoints are untouched; see {run.folder / DIAGNOSTIC_FILE}"
    )


def non_finite_weights(model: nn.Module) -> list[str]:
    return sorted(name for name, tensor in model.state_dict().items() if not tensor.isfinite().all())
