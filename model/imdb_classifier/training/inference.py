"""Logits of many reviews: shared by training's evaluations and by the evaluate and predict commands."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from imdb_classifier.attention import choose_attention
from imdb_classifier.data.batches import Collator, ReviewBatches, TokenizedReviews, make_loader
from imdb_classifier.messages import NonFiniteError, UserError
from imdb_classifier.modeling import TextClassifier

COMPILE_BUCKETS = 8
# Packed batches hardly ever have as many tokens as another. Filled up by 1 % on average they do, and the kernel's launches
# are found again (DESIGN.md, "Launches"), at a third of the host's time.
REPEATING_BUCKETS = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_attention(name: str, accelerator: Accelerator, precision: str) -> tuple[str, str]:
    """(name, reason) of the attention that will run; an explicit name that cannot run is a UserError."""
    try:
        return choose_attention(name, accelerator.device, DTYPES[precision])
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from None


def buckets_for(compiled: bool) -> int:
    """How many lengths batches are filled up to, so that torch.compile sees few shapes."""
    return COMPILE_BUCKETS if compiled else 0


def workers_for(accelerator: Accelerator) -> int:
    """Processes that make batches: a GPU is faster than one could be collated and sent."""
    return 2 if accelerator.device.type == "cuda" else 0


def graphs_compiled() -> int:
    """By torch.compile in this process so far."""
    # Only here: it takes a second to import.
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def say_graphs(compiled: bool) -> str | None:
    """How many graphs torch.compile made, where it was asked to."""
    if not compiled:
        return None
    made = graphs_compiled()
    return (
        f"torch.compile: {made} graph{'s' * (made != 1)}, for batches filled up to {COMPILE_BUCKETS} lengths"
    )


def collator_for(model: TextClassifier, buckets: int = 0) -> Collator:
    """What makes batches of reviews for this model, packed if it packs."""
    config = model.config
    if not buckets and model.packs and model.device.type == "cuda":
        buckets = REPEATING_BUCKETS
    return Collator(config.pad_token_id, config.max_length, model.packs, buckets)


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
    buckets: int = 0,
    after_batch: Callable[[int], None] = lambda reviews: None,
) -> Evaluation:
    """Classify every review in eval mode, in batches of like lengths.

    Args:
        model: as `accelerator.prepare` returned it.
        buckets: as of `Collator`.
        after_batch: called with the number of its reviews after each batch, over all processes; what it raises
            ends the evaluation.

    Raises:
        NonFiniteError: a logit is NaN or infinite, so that there is no loss and no label.
    """
    batches = ReviewBatches(data.lengths, batch_size, shuffle=False)
    bare_model = accelerator.unwrap_model(model, keep_torch_compile=False)
    loader = accelerator.prepare_data_loader(
        make_loader(data, batches, collator_for(bare_model, buckets), workers)
    )
    was_training = model.training
    model.eval()
    answers = []
    try:
        for batch in loader:
            rows, _ = batch.pop("rows"), batch.pop("labels")
            logits = model(**batch).logits.float()
            # Rows travel along: several processes may repeat a review to fill the last batch.
            answers.append(accelerator.gather((rows, logits[:, 1] - logits[:, 0])))
            after_batch(len(answers[-1][0]))
    finally:
        model.train(was_training)
    z = torch.empty(len(data))
    # Only now, so that no batch waits for the one before it.
    z[torch.cat([rows for rows, _ in answers]).cpu()] = torch.cat([margin for _, margin in answers]).cpu()
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
