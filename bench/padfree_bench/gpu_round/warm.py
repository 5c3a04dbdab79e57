"""Compile all that a part of the round will launch, side by side, into one Triton cache, without touching a GPU.

An item is a call of the library as a later step makes it, on CPU tensors of the same shapes and strides; under
`compile_only` its launches are compiled for sm_90 and not run. So the list cannot drift from what is launched. Whether
a cache that was brought along serves is not assumed but counted: a hit is Triton's own word for a kernel it found.
"""

import json
import logging
import lzma
import os
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

import padfree._dispatch
from padfree import testing
from padfree_bench.compiled.aot import compile_only
from padfree_bench.gpu_round import agreement, steps
from padfree_bench.gpu_round.carry import unpack
from padfree_bench.measuring import exp2_kernel, machine
from padfree_bench.measuring.cases import parse_case
from padfree_bench.measuring.headline import HEADLINE, TUNED_ROWS
from padfree_bench.measuring.processes import in_pool
from padfree_bench.peers import PEERS, padfree_peers
from padfree_bench.tuning import tune
from padfree_bench.tuning.work import ARCH, blank_inputs

CPU = torch.device("cpu")
# A name, and a call of the library as a later step makes it; nothing is computed, so what it returns is nothing.
Item = tuple[str, Callable[[], object]]
# Of its items a rehearsal compiles every so manieth.
SOME = 12


def items(part: str) -> list[Item]:
    """The calls of a part ("smoke", "main"), or those that only the tuned rows change ("tuned")."""
    if part == "tuned":
        return peers_on(HEADLINE, steps.OUR_PEERS) if tuned_rows().is_file() else []
    exp2 = ("exp2", launch_exp2)
    if part == "smoke":
        step = ("step", partial(train_step, "notebook", 400))
        return [*peers_on(HEADLINE, steps.OUR_FIRST_PEERS), exp2, step, *checks(agreement.all_cases(ARCH))]
    trained = [(preset, width) for preset in ("notebook", "d768") for width in (400, 396, 393)]
    return [
        *((f"tune {item}", partial(tune.compile_item, item)) for item in tune.warm_items()),
        *peers_on(steps.TABLE, steps.OUR_PEERS),
        exp2,
        *((f"train {preset} {width}", partial(train_step, preset, width)) for preset, width in trained),
        *((f"encoder {preset}", partial(encoder_step, preset)) for preset in steps.ENCODER_SIZES),
        *checks(agreement.touching_cases()),
        *peers_on((*steps.MORE, *steps.MEMORY), steps.OUR_FIRST_PEERS),
    ]


def checks(cases: list[agreement.Case]) -> list[Item]:
    return [(f"case {case.name}", partial(run_case, case)) for case in cases]


def peers_on(cases: Sequence[str], peers: Sequence[str]) -> list[Item]:
    return [(f"{case} {peer}", partial(run_peer, case, peer)) for case in cases for peer in peers]


def run_case(case: agreement.Case) -> None:
    testing.run(agreement.call_of(case, "triton"), case.inputs(CPU, case.draws[0]), **case.options)


def run_peer(case_id: str, name: str) -> None:
    """Forward alone and with its backward, of one of our own peers on one case of the tables."""
    padfree_peers.check_kernel = lambda query: None  # nothing runs here
    inputs = blank_inputs(parse_case(case_id), CPU)
    PEERS[name].prepare(inputs, False).forward()
    prepared = PEERS[name].prepare(inputs, True)
    torch.autograd.grad(prepared.forward(), prepared.leaves, prepared.d_out)


def launch_exp2() -> None:
    exp2_kernel.launch(torch.empty(exp2_kernel.BLOCK * 16))


def lengths_of(longest: int, remainder: int) -> list[int]:
    """Of 16 reviews, which specialise a launch as 64 do: the longest, and their sum as a remainder of 16."""
    others = [longest - 16] * 15
    others[0] -= (longest + sum(others) - remainder) % 16
    return [longest, *others]


def train_step(preset: str, longest: int) -> None:
    """A step of each of our recipes in bf16, padded to a width, and packed with sums of each kind that Triton tells apart."""
    from imdb_classifier.data.batches import TokenizedReviews  # imports transformers, which takes seconds
    from padfree_bench.suites import recipes, train

    padfree_peers.check_kernel = lambda query: None  # nothing runs here
    case = replace(train.SIZES[preset], ffn=32, batch=16)  # no kernel of ours sees the ffn
    # Filled up, compiled or captured, a step launches the same kernels.
    for recipe in (each for each in recipes.RECIPES if each.attention == "padfree" and not each.buckets):
        trainee = recipes.make_trainee(case, recipe, CPU)
        for remainder in (0, 4, 1) if recipe.packed else (0,):
            reviews = [[1] * length for length in lengths_of(longest, remainder)]
            drawn = TokenizedReviews.from_lists(reviews, [0] * 16).__getitems__(range(16))
            inputs = recipes.collator(case, recipe)(drawn)
            train.Training(recipe, trainee, torch.bfloat16).issue(inputs)


def encoder_step(preset: str) -> None:
    """Inference and training of our peers in bf16, on a batch like the suite's."""
    from padfree_bench.suites import encoder, models

    padfree_peers.check_kernel = lambda query: None  # nothing runs here
    case = replace(encoder.SIZES[preset], ffn=32, dtype="bf16")
    remainder = int(case.sequence_lengths().sum()) % 16
    batch = models.make_batch(lengths_of(case.seq, remainder), case.seq, CPU)
    for peer in (each for each in encoder.PEERS if each.attention == "padfree"):
        built = peer.build(case, batch, torch.bfloat16)
        for training in (False, True):
            models.make_call(built, training)()


def compile_item(item: Item) -> tuple[list[bool], float]:
    """(whether the cache had it, of every kernel that the item launches; CPU seconds of this process and its children)."""
    from triton import knobs

    hits: list[bool] = []
    begin = sum(os.times()[:4])
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    padfree._dispatch.why_not_device = lambda *_: None  # launches are compiled, not run
    use_tuned_rows()
    with compile_only(ARCH) as compiled:
        item[1]()
    for each in compiled:
        build_launcher(each.kernel)
    return hits, sum(os.times()[:4]) - begin


def tuned_rows() -> Path:
    """The file of the rows that the tune accepted; no file where this process is to take none."""
    return Path(os.environ.get(TUNED_ROWS, ""))


@cache
def use_tuned_rows() -> None:
    """Once a process: the rows that the tune accepted, as the suites of the same steps take them."""
    if tuned_rows().is_file():
        tune.apply_rows(tuned_rows())


def build_launcher(kernel: Any) -> None:
    """The C function that hands a kernel its arguments, which Triton 3.6 otherwise compiles at the first launch (0.4 s)."""
    from triton.backends.nvidia import driver

    if not hasattr(driver, "make_launcher"):
        return  # from 3.7 on one launcher serves all kernels
    # That a launcher cannot be loaded where there is no libcuda needs no word.
    logging.getLogger("triton.runtime.build").setLevel(logging.ERROR)
    try:
        driver.CudaLauncher(kernel.src, kernel.metadata)
    except (ImportError, AssertionError, OSError):
        pass  # no libcuda to load it with: the launch will make it, or has it in the cache now


def warm(todo: list[Item], jobs: int, quiet: bool = False) -> dict[str, Any]:
    """Compile the items in `jobs` processes; says what it knows after each, or only at the end if `quiet`."""
    begin, kernels, failed = time.monotonic(), Counter[str](), list[str]()
    seconds, summary = 0.0, dict[str, Any]()
    for done, (item, future) in enumerate(in_pool(compile_item, todo, jobs), start=1):
        try:
            hits, taken = future.result()
            kernels.update("hits" if hit else "compiled" for hit in hits)
            seconds += taken
        except Exception as error:  # noqa: BLE001 - the later step will say what is wrong with this call
            failed.append(f"{item[0]}: {str(error).splitlines()[0] if str(error) else error!r}")
        summary = {
            "items": done, "of": len(todo), **kernels, "core_seconds": seconds, "jobs": jobs,
            "seconds": time.monotonic() - begin, "failed": failed,
        }  # fmt: skip
        if not quiet or done == len(todo):
            print(json.dumps(summary), flush=True)
    return summary


def take_along() -> None:
    """The kernels that came along go into the cache; whether they serve is counted, and here is why they might not."""
    packed, cache = steps.CARRY / "triton-cache.tar.xz", os.environ.get("TRITON_CACHE_DIR")
    if not cache or not packed.is_file():
        return
    try:
        different = unpack(packed, Path(cache))
        print(f"kernels came along, made by {'; '.join(different) or 'the same compiler'}", flush=True)
    except (OSError, EOFError, KeyError, ValueError, lzma.LZMAError, tarfile.TarError) as error:
        print(f"{packed} is of no use: {error}", flush=True)


def main(part: str, *flags: str) -> int:
    """A rehearsal compiles a few of the items and says what all would take; what is to be packed is made from nothing."""
    todo, prepares = items(part), steps.PREPARE in flags
    some = todo[::SOME] if steps.REHEARSE in flags else todo
    if not prepares:
        take_along()
    summary = warm(some, min(16, machine.usable_cores()), prepares)
    if steps.REHEARSE in flags and summary:
        whole = summary["core_seconds"] * len(todo) / summary["items"]
        print(json.dumps(summary | {"all_items": len(todo), "predicted_seconds_on_16_cores": whole / 16}))
    if failed := summary.get("failed"):
        print(f"{len(failed)} of {summary['items']} calls did not compile; the first: {failed[0]}")
    return 1 if failed else 0
