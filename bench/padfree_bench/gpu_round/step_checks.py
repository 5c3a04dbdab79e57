"""The classifier's training step on this device: it waits for nothing, a graph repeats it, and NaN changes no weight.

The step is imdb-train's own, on random reviews packed to a few shapes. Without a GPU PyTorch takes the kernel's place and
nothing is captured.
"""

import itertools
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from accelerate.utils import send_to_device

from imdb_classifier.configuration import TextClassifierConfig
from imdb_classifier.data.batches import Collator, TokenizedReviews
from imdb_classifier.modeling import TextClassifier
from imdb_classifier.training.graphs import GraphedStep
from imdb_classifier.training.launcher import make_accelerator
from imdb_classifier.training.loop import take_step
from imdb_classifier.training.run import GRAPH_BUCKETS, Run
from imdb_classifier.training.watch import Watch
from padfree.integrations.transformers import register
from padfree_bench.measuring.lengths import imdb_lengths

STEPS = 24


def make_batches(device: torch.device, reviews: int, longest: int) -> list[dict[str, Any]]:
    """Four batches of two shapes."""
    collator, batches = Collator(0, longest, packed=True, buckets=GRAPH_BUCKETS), []
    for seed, scale in enumerate((1.0, 0.5, 1.0, 0.5)):
        lengths = [max(1, int(n * scale)) for n in imdb_lengths(reviews, longest)]
        generator = torch.Generator().manual_seed(seed)
        ids = [torch.randint(1, 1000, (n,), generator=generator).tolist() for n in lengths]
        batch = collator(
            TokenizedReviews.from_lists(ids, [n % 2 for n in lengths]).__getitems__(range(reviews))
        )
        del batch["rows"]
        batches.append(send_to_device(batch, device))
    return batches


def make_run(longest: int, accelerator: Any) -> Run:
    """As much of a run as a step asks for."""
    torch.manual_seed(0)
    config = TextClassifierConfig(max_length=longest, vocab_size=1000)
    model = TextClassifier._from_config(config, attn_implementation="padfree")
    on_gpu = accelerator.device.type == "cuda"
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True, capturable=on_gpu)
    prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
    prepared.train()
    watch = Watch(optimizer, model.named_parameters())
    parts = {"model": prepared, "optimizer": prepared_optimizer, "accelerator": accelerator, "watch": watch}
    return cast(Run, SimpleNamespace(**parts, bare_model=model))


def take_steps(
    run: Run, step: Callable[[dict[str, Any]], None], batches: list[dict[str, Any]], count: int
) -> None:
    for batch in itertools.islice(itertools.cycle(batches), count):
        step(batch)


def check_steps(device: torch.device) -> list[str]:
    """What failed."""
    on_gpu, failed = device.type == "cuda", list[str]()
    register("triton" if on_gpu else "reference")
    reviews, longest = (64, 400) if on_gpu else (4, 40)
    accelerator = make_accelerator("bf16" if on_gpu else "fp32", cpu=not on_gpu)
    batches = make_batches(device, reviews, longest)
    plain = make_run(longest, accelerator)
    step = partial(take_step, plain)
    take_steps(plain, step, batches, 4)
    if on_gpu:
        # Every wait of the host is an error from here on.
        torch.cuda.set_sync_debug_mode("error")
    try:
        take_steps(plain, step, batches, STEPS - 4)
    except RuntimeError as error:
        failed.append(f"a step waits for the GPU: {str(error).splitlines()[0]}")
    finally:
        if on_gpu:
            torch.cuda.set_sync_debug_mode("default")
    reading = plain.watch.read()
    if reading.broken >= 0 or reading.seen != STEPS * reviews:
        failed.append(f"the watch read {reading}")
    if on_gpu:
        failed += compare_graphs(longest, accelerator, batches, plain)
    return failed + plant_nan(plain, step, batches)


def compare_graphs(longest: int, accelerator: Any, batches: list[dict[str, Any]], plain: Run) -> list[str]:
    """The same steps through `GraphedStep`, with dropout from the same generator: the losses agree, and so do weights."""
    graphed = make_run(longest, accelerator)
    step = GraphedStep(partial(take_step, graphed))
    take_steps(graphed, step, batches, STEPS)
    failed = []
    expected, found = plain.watch.read(), graphed.watch.read()
    if step.graphs == 0:
        failed.append("nothing was captured")
    # Dropout draws otherwise in a graph, so the sums are near and not equal.
    if not abs(found.loss_sum / expected.loss_sum - 1) < 0.02 or found.seen != expected.seen:
        failed.append(f"graphs: read {found}, launched one by one {expected}")
    return failed + plant_nan(graphed, step, batches)


def plant_nan(run: Run, step: Callable[[dict[str, Any]], None], batches: list[dict[str, Any]]) -> list[str]:
    """A weight that is NaN during one step: that step and those after it must change nothing, and the first must be told."""
    weights = {name: tensor.clone() for name, tensor in run.bare_model.state_dict().items()}
    steps_before = run.watch.read().seen // len(batches[0]["labels"])
    bias = run.bare_model.classification.bias.data
    kept = bias.clone()
    bias.fill_(float("nan"))
    step(batches[0])
    bias.copy_(kept)
    take_steps(run, step, batches, 4)
    changed = [
        name for name, tensor in run.bare_model.state_dict().items() if not torch.equal(tensor, weights[name])
    ]
    failed = [f"a step that was not finite changed {', '.join(changed)}"] if changed else []
    if (found := run.watch.read().broken) != steps_before:
        failed.append(f"step {steps_before} was not finite, the watch says {found}")
    return failed
