"""What a training run refuses to go on with: an optimizer of another model, NaN and infinity."""

import torch
from torch import Tensor, nn

from imdb_classifier.checkpoints.checkpoint import write_json
from imdb_classifier.checkpoints.run_folder import DIAGNOSTIC_FILE
from imdb_classifier.messages import NonFiniteError, UserError
from imdb_classifier.training.run import Run

# fp16 halves its loss scale after an overflow; from 2^16, this many in a row are no longer a search for a scale.
MAX_SKIPPED_STEPS = 40


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


def check_finite(run: Run, loss: Tensor, rows: Tensor) -> None:
    """Stop before the optimizer step on a loss or gradient that is NaN or infinite, and leave a diagnostic."""
    scaled = run.accelerator.scaler is not None
    if scaled:
        run.accelerator.unscale_gradients(run.optimizer)
    gradients = {name: p.grad for name, p in run.bare_model.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(gradients.values())
    loss_is_finite, norm_is_finite = torch.stack([loss.detach().float(), norm.float()]).isfinite().tolist()
    if loss_is_finite and norm_is_finite:
        run.state.skipped_in_a_row = 0
        return
    if loss_is_finite and scaled and run.state.skipped_in_a_row < MAX_SKIPPED_STEPS:
        # The scaler leaves out this step and lowers its scale, which is how fp16 finds one.
        run.state.skipped_in_a_row += 1
        return
    culprits = sorted(name for name, gradient in gradients.items() if not gradient.isfinite().all())
    what = f"gradient norm is {norm.item()}" if loss_is_finite else f"loss is {loss.item()}"
    position = run.state.position
    diagnostic = {
        "what": what,
        "epoch": position.epoch + 1,
        "batch": position.batch + 1,
        "step": run.state.step + 1,
        "training_rows": rows.tolist(),
        "non_finite_gradients": culprits,
        "non_finite_weights": non_finite_weights(run.bare_model),
    }
    if run.accelerator.is_main_process:
        write_json(run.folder / DIAGNOSTIC_FILE, diagnostic)
    raise NonFiniteError(
        f"{what} at epoch {position.epoch + 1}, batch {position.batch + 1}: stopped before the optimizer step, "
        f"checkpoints are untouched; see {run.folder / DIAGNOSTIC_FILE}"
    )


def non_finite_weights(model: nn.Module) -> list[str]:
    return sorted(name for name, tensor in model.state_dict().items() if not tensor.isfinite().all())
