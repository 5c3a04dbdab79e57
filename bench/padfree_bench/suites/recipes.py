"""The ways to train that `train` compares: what each of them is, its model, and the batches that it is given."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from imdb_classifier.data.batches import Collator, ReviewBatches, TokenizedReviews
from padfree_bench.measuring.lengths import imdb_lengths
from padfree_bench.peers.base import compiled
from padfree_bench.suites import encoder, notebook_model
from padfree_bench.suites.models import EDGE, FIRST_TOKEN, LAST_TOKEN, PAD, ModelCase, check_padfree

# What a collator makes of a batch, on the device.
Inputs = dict[str, Any]
DROPOUT = 0.1


@dataclass(frozen=True)
class Recipe:
    """One way to train: the notebook's, but for what is said here.

    Args:
        note: the lever that it adds to the one before it, or what it is.
        attention: its name in transformers, of our own model.
        model: "ours", "notebook" (its own arithmetic) or "torch" (nn.TransformerEncoder).
        cls_only: the last layer computes row 0 only.
        grouped: batches of reviews of like length, in place of a random order padded to the cut.
        fused: an optimizer step of one launch.
        waits: the host reads each loss; if not, it reads the sums of 20 steps at once.
        packed: reviews end to end, so that nobody computes padding.
        buckets: batches are filled up to one of so many sizes, so that shapes repeat.
        compile_mode: of torch.compile, if it is used.
        graphs: the whole step is replayed as a CUDA graph, one for each shape.
    """

    name: str
    note: str
    attention: str = "sdpa"
    model: str = "ours"
    cls_only: bool = False
    grouped: bool = False
    fused: bool = False
    waits: bool = True
    packed: bool = False
    buckets: int = 0
    compile_mode: str | None = None
    graphs: bool = False


# Each of ours has the levers of those before it.
_CLS: dict[str, Any] = {"cls_only": True}
_GROUPED: dict[str, Any] = {**_CLS, "grouped": True}
_LAUNCHES: dict[str, Any] = {**_GROUPED, "fused": True}
_NO_WAIT: dict[str, Any] = {**_LAUNCHES, "waits": False}
_PADFREE: dict[str, Any] = {**_NO_WAIT, "attention": "padfree"}
_PACKED: dict[str, Any] = {**_PADFREE, "packed": True}
_BUCKETS: dict[str, Any] = {**_PACKED, "buckets": 8}

RECIPES = [
    Recipe("notebook", "the notebook's model and loop: random order, padded to 400", model="notebook"),
    Recipe("eager", "our model, eager attention, else as the notebook", "eager"),
    Recipe("nn.TransformerEncoder", "torch's own layers, else as the notebook", model="torch"),
    Recipe("sdpa", "our model, only the attention exchanged"),
    Recipe("compile-sdpa", "sdpa, torch.compile, fused Adam", fused=True, compile_mode="default"),
    Recipe(
        "compile-sdpa-graphs", "sdpa, reduce-overhead, fused Adam", fused=True, compile_mode="reduce-overhead"
    ),
    Recipe("sdpa+cls", "and the last layer for row 0 only", **_CLS),
    Recipe("sdpa+grouped", "and batches grouped by length", **_GROUPED),
    Recipe("sdpa+launches", "and a fused Adam", **_LAUNCHES),
    Recipe("ours-sdpa", "and no wait for a loss: sums on the device, read every 20 steps", **_NO_WAIT),
    Recipe("ours-padfree-padded", "and the fused attention", **_PADFREE),
    Recipe("ours-padfree", "and reviews packed end to end", **_PACKED),
    Recipe("ours-padfree+compile", "and torch.compile, 8 sizes", **_BUCKETS, compile_mode="default"),
    Recipe("ours-padfree+graphs", "not compiled: a CUDA graph of the step, 8 sizes", **_BUCKETS, graphs=True),
]


@dataclass
class Trainee:
    """A model, and forward(inputs) -> (mean loss, its logits: [B, 2], or the bare z [B])."""

    module: nn.Module
    forward: Callable[[Inputs], tuple[Tensor, Tensor]]
    attention: str

    def gradients(self, loss: Tensor) -> Tensor:
        """Of all parameters in one vector, in the order of our own names."""
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        found = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
        if isinstance(self.module, encoder.TorchEncoder):
            found = encoder.in_our_names(found)
        return torch.cat([found[name].flatten() for name in sorted(found)])


def bare(model: nn.Module) -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    """The notebook's loss, of a model that makes z [B] or [B, 1] of token ids."""
    loss_function = nn.BCEWithLogitsLoss()

    def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
        z = model(inputs["input_ids"]).view(-1)
        return loss_function(z, inputs["labels"].float()), z

    return forward


def ours(model: Any) -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    """Our model, which computes the loss itself."""

    def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
        out = model(**{name: value for name, value in inputs.items() if name != "rows"})
        return out.loss, out.logits

    return forward


def make_trainee(case: ModelCase, recipe: Recipe, device: torch.device) -> Trainee:
    """A recipe's model in fp32, with the same weights for all; Refused where it cannot run."""
    if recipe.attention == "padfree":
        check_padfree(device, torch.float32)
    if recipe.model == "torch":
        torch_model = encoder.TorchEncoder(case, "eager", DROPOUT).to(device)
        return Trainee(torch_model, bare(torch_model), "torch's own")
    source: Any = encoder.draw(case, recipe.attention, recipe.cls_only, DROPOUT)
    if recipe.model == "notebook":
        model = notebook_model.like(source).to(device)
        return Trainee(model, bare(model), "the notebook's")
    if recipe.packed:
        source.config.layout = "packed"
    source.to(device)
    # No call of ours goes backward twice through one graph.
    call = source
    if recipe.compile_mode:
        call = compiled(source, donate=True, mode=recipe.compile_mode)
    return Trainee(source, ours(call), f"attn_implementation={recipe.attention}")


def draw_reviews(case: ModelCase, seed: int) -> TokenizedReviews:
    """The reviews of an epoch: random tokens at IMDB's lengths, the last of each EDGE, and random labels."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.as_tensor(imdb_lengths(case.batches * case.batch, case.seq))
    ids = torch.randint(FIRST_TOKEN, LAST_TOKEN, (int(lengths.sum()),), generator=generator)
    ids[lengths.cumsum(0) - 1] = EDGE
    labels = torch.randint(0, 2, (len(lengths),), generator=generator)
    return TokenizedReviews(ids.int(), lengths, labels.tolist())


def order(
    case: ModelCase, recipe: Recipe, data: TokenizedReviews, seed: int, epoch: int = 0
) -> ReviewBatches:
    """The rows of each batch of an epoch, the same ones for all recipes that group or do not."""
    return ReviewBatches(data.lengths, case.batch, seed=seed, epoch=epoch, group_by_length=recipe.grouped)


def collator(case: ModelCase, recipe: Recipe) -> Collator:
    """How a recipe makes a batch. In random order one of 64 reviews is at the cut: all batches are as wide as that."""
    return Collator(PAD, case.seq, recipe.packed, recipe.buckets if recipe.grouped else 1)


def make_batches(
    case: ModelCase, recipe: Recipe, data: TokenizedReviews, device: torch.device, seed: int
) -> list[Inputs]:
    """All batches of an epoch, on the device before the clock starts."""
    collate = collator(case, recipe)
    rows_of_each = order(case, recipe, data, seed)
    return [send_to_device(collate(data.__getitems__(rows)), device) for rows in rows_of_each]
