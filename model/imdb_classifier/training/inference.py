"""Logits of many reviews: shared by training's evaluations and by the evaluate and predict commands."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from imdb_classifier.attention import choose_attention
from imdb_classifier.data.batches import ReviewBatches, TokenizedReviews, make_loader
from imdb_classifier.messages import NonFiniteError, UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_attention(name: str, accelerator: Accelerator, precision: str) -> tuple[str, str]:
    """(name, reason) of the attention that will run; an explicit name that cannot run is a UserError."""
    try:
        return choose_attention(name, accelerator.device, DTYPES[precision])
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from None


@dataclass(frozen=True)
class Evaluation:
    """`z` [N] fp32, the logit of each review in the order of the rows, with mean loss and accuracy over them."""

    z: Tensor
    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: TokenizedReviews,
    accelerator: Accelerator,
    *,
    batch_size: int,
    workers: int = 0,
    after_batch: Callable[[int], None] = lambda reviews: None,
) -> Evaluation:
    """Classify every review in eval mode, in batches of like lengths.

    Args:
        model: as `accelerator.prepare` returned it.
        after_batch: called with the number of its reviews after each batch, over all processes; what it raises
            ends the evaluation.

    Raises:
        NonFiniteError: a logit is NaN or infinite, so that there is no loss and no label.
    """
    batches = ReviewBatches(data.lengths, batch_size, shuffle=False)
    pad_token_id = accelerator.unwrap_model(model).config.pad_token_id
    loader = accelerator.prepare_data_loader(make_loader(data, batches, pad_token_id, workers))
    was_training = model.training
    model.eval()
    z = torch.empty(len(data))
    try:
        for batch in loader:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            logits = model(**inputs).logits.float()
            # Rows travel along: several processes may repeat a review to fill the last batch.
            rows, margin = accelerator.gather((batch["rows"], logits[:, 1] - logits[:, 0]))
            z[rows.cpu()] = margin.cpu()
            after_batch(len(rows))
    finally:
        model.train(was_training)
    broken = (~z.isfinite()).nonzero().flatten().tolist()
    if broken:
        raise NonFiniteError(
            f"{len(broken):,} of {len(z):,} reviews get a logit that is NaN or infinite, "
            f"the first of them review {broken[0] + 1}"
        )
    labels = data.labels.double()
    return Evaluation(
        z,
        # In fp64, where the mean of finite losses is finite.
        F.binary_cross_entropy_with_logits(z.double(), labels).item(),
        ((z > 0) == (labels > 0)).double().mean().item(),
    )
