"""Compile all that a part of the round will launch, side by side, into one Triton cache, without touching a GPU.

An item is a call of the library as a later step makes it, on CPU tensors of the same shapes and strides; under
`compile_only` its launches are compiled for sm_90 and not run. So the list cannot drift from what is launched. Whether
a cache that was brought along serves is not assumed but counted: a hit is Triton's own word for a kernel it found.
"""

import argparse
import json
import logging
import lzma
import os
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from padfree_bench.compiled.aot import compile_only
from padfree_bench.gpu_round import agreement, steps
from padfree_bench.gpu_round.carry import unpack
from padfree_bench.measuring.processes import in_pool

ARCH = 90
Item = tuple[str, ...]
# Of its items a rehearsal compiles every so manieth.
SOME = 12


def items(part: str) -> list[Item]:
    """The calls of a part ("smoke", "main"), or those that only the tuned rows change ("tuned")."""
    if part == "tuned":
        tuned = Path(os.environ.get("PADFREE_TUNED_ROWS", ""))
        return attention_items(steps.HEADLINE, steps.OUR_PEERS) if tuned.is_file() else []
    checks = [("case", str(index)) for index in range(len(agreement.all_cases(ARCH)))]
    first = [peer for peer in steps.FIRST_PEERS.split(",") if peer.startswith("padfree")]
    if part == "smoke":
        return [*attention_items(steps.HEADLINE, first), ("exp2",), *checks]
    table = (*steps.HEADLINE, *steps.CONTROL, *steps.OTHER_HEADS)
    more = (*steps.PRECISION, *steps.LONG, *steps.MEMORY)
    touching = [("touch", str(index)) for index in range(len(agreement.touching_cases()))]
    return [
        *(("tune", json.dumps(item)) for item in tune_items()),
        *attention_items(table, steps.OUR_PEERS),
        ("exp2",),
        *(("train", preset, str(width)) for preset in ("notebook", "d768") for width in (400, 393)),
        *touching,
        *attention_items(more, first),
    ]


def attention_items(cases: tuple[str, ...], peers: Any) -> list[Item]:
    return [("attention", case, peer) for case in cases for peer in peers]


def tune_items() -> Iterator[Any]:
    from padfree_bench.tuning.tune import warm_items

    yield from warm_items()


def run_item(kind: str, *args: str) -> None:
    """One call as a later step makes it; what it returns is nothing, for nothing is computed."""
    cpu = torch.device("cpu")
    if kind in ("case", "touch"):
        case = (agreement.all_cases(ARCH) if kind == "case" else agreement.touching_cases())[int(args[0])]
        call = agreement.call_of(case, "triton")
        options = dict(case.options)
        run_call(call, case.inputs(cpu, case.draws[0]), options)
    elif kind == "attention":
        run_peer(*args)
    elif kind == "exp2":
        from padfree_bench.measuring import exp2_kernel

        exp2_kernel.launch(torch.empty(exp2_kernel.BLOCK * 16))
    elif kind == "train":
        run_training_step(args[0], int(args[1]))


def run_call(call: Any, inputs: Any, options: dict[str, Any]) -> None:
    from padfree import testing

    testing.run(call, inputs, **options)


def run_peer(case_id: str, name: str) -> None:
    """Forward alone and with its backward, of one of our own peers on one case of the tables."""
    from padfree_bench.measuring.cases import DTYPES, parse_case
    from padfree_bench.measuring.inputs import Inputs
    from padfree_bench.peers import PEERS, padfree_peers

    padfree_peers.check_kernel = lambda query: None  # nothing runs here
    case = parse_case(case_id)
    lengths = torch.as_tensor(case.sequence_lengths())
    padding = torch.arange(case.seq) >= lengths[:, None]
    dtype = DTYPES[case.dtype]
    shape = (case.batch, case.seq, case.heads, case.head_dim)
    query, key, value, d_out = (torch.empty(shape, dtype=dtype).transpose(1, 2) for _ in range(4))
    inputs = Inputs(case, query, key, value, d_out, padding, lengths)
    for training in (False, True):
        prepared = PEERS[name].prepare(inputs, training)
        out = prepared.forward()
        if training:
            torch.autograd.grad(out, prepared.leaves, prepared.d_out)


def run_training_step(preset: str, width: int) -> None:
    """A step of our recipes in bf16 at one width of a batch; 16 reviews specialise a launch as 64 do."""
    from padfree_bench.peers import padfree_peers
    from padfree_bench.suites import train
    from padfree_bench.suites.models import make_batch

    padfree_peers.check_kernel = lambda query: None  # nothing runs here
    case = replace(train.SIZES[preset], ffn=32)  # no kernel of ours sees it
    cpu = torch.device("cpu")
    batch = make_batch([width - 5] * 16, width, cpu, 0)
    for recipe in train.RECIPES:
        if recipe.attention == "padfree":
            train.make_epoch(train.make_model(case, recipe, cpu), [batch], torch.bfloat16)()


def compile_item(item: Item) -> tuple[list[bool], float]:
    """(whether the cache had it, of every kernel that the item launches; CPU seconds of this process and its children)."""
    from triton import knobs

    import padfree._dispatch

    hits: list[bool] = []
    begin = sum(os.times()[:4])

    def listen(*, cache_hit: bool, **_: Any) -> None:
        hits.append(cache_hit)

    knobs.compilation.listener = listen
    padfree._dispatch.why_not_device = lambda *_: None  # launches are compiled, not run
    use_tuned_rows()
    kind, *args = item
    if kind == "tune":
        from padfree_bench.tuning import tune

        tune.compile_item(json.loads(args[0]))
    else:
        with compile_only(ARCH) as compiled:
            run_item(kind, *args)
        for each in compiled:
            build_launcher(each.kernel)
    return hits, sum(os.times()[:4]) - begin


@cache
def use_tuned_rows() -> None:
    """Once a process: the rows that the tune accepted, as the suites of the same steps take them."""
    if (rows := Path(os.environ.get("PADFREE_TUNED_ROWS", ""))).is_file():
        from padfree_bench.tuning.tune import apply_rows

        apply_rows(rows)


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
            failed.append(f"{' '.join(item)}: {str(error).splitlines()[0] if str(error) else error!r}")
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


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("part", choices=("smoke", "main", "tuned"))
    options.add_argument(
        steps.REHEARSE, action="store_true", help="a few of the items, and what all would take"
    )
    options.add_argument("--jobs", type=int, default=min(16, len(os.sched_getaffinity(0))))
    options.add_argument("--prepare", action="store_true", help="from nothing, and print the last line only")
    chosen = options.parse_args()
    if not chosen.prepare:
        take_along()
    todo = items(chosen.part)
    summary = warm(todo[::SOME] if chosen.rehearse else todo, chosen.jobs, chosen.prepare)
    if chosen.rehearse and summary:
        whole = summary["core_seconds"] * len(todo) / summary["items"]
        print(json.dumps(summary | {"all_items": len(todo), "predicted_seconds_on_16_cores": whole / 16}))
    if failed := summary.get("failed"):
        print(f"{len(failed)} of {summary['items']} calls did not compile; the first: {failed[0]}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
