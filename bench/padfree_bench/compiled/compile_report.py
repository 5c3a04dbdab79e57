"""`python -m bench compile-report`: what the compiler makes of every configuration, and the time it predicts.

Registers, shared memory, occupancy and instruction mixes are read from the compiled kernels. The times are
predictions of a static model (`cost_model`), to be confirmed or refuted by a measurement on a GPU.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton

from padfree_bench.compiled.aot import ARCHS, Arch, why_not_compile
from padfree_bench.compiled.aot_calls import VARIANTS, Target, table_targets
from padfree_bench.compiled.aot_facts import Facts, facts_of_target
from padfree_bench.compiled.cost_model import MOVED, Batch, predict
from padfree_bench.compiled.costs import GPUS, H100
from padfree_bench.measuring.cases import DTYPES
from padfree_bench.measuring.lengths import make_lengths
from padfree_bench.measuring.results import RESULTS

BATCH, SEQ = 64, 400
# (heads, head_dim): the notebook's, d_model 128 two ways, BERT-base, wide heads.
SHAPES = ((4, 8), (8, 16), (4, 32), (12, 64), (16, 128))
VARIANT_HEAD_DIMS = (16, 64)
# The variants whose time is predicted, and the lengths of their batch.
WORKLOADS = {"padded": "imdb", "lengths": "imdb", "dense": "full"}
CARDS = (*GPUS.items(), (90, H100))
ASSUMPTIONS = (
    "Predictions, not measurements. What each unit of the GPU needs at least: issue slots, exp2 and the matrix units for all "
    "instructions, the memory for bytes that the L2 does not serve. The largest of them is the floor. `waits` is the share of "
    "a program's time in which it needs none of them: it waits for an instruction before or for a load. `expected` is the "
    "launch: waits covered by as many programs as fit at once, and the tail. bench/README.md says how far to trust it."
)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m bench compile-report", description=__doc__)
    add = options.add_argument
    add("--arch", nargs="+", default=["90"], help=f"of {', '.join(map(str, ARCHS))}; default 90")
    add(
        "--variants",
        nargs="+",
        default=list(WORKLOADS),
        help=f"of {', '.join(VARIANTS)}, or all; default {' '.join(WORKLOADS)}",
    )
    add("--dtypes", nargs="+", default=["bf16", "fp32"], help=f"of {', '.join(DTYPES)}; default bf16 fp32")
    add("--json", action="store_true", help="print the JSON instead of the tables")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="compilations at a time")
    add("--output", default=str(RESULTS), help="folder for compile-report.json")
    return options


def targets_of(archs: tuple[Arch, ...], dtypes: tuple[str, ...], variants: tuple[str, ...]) -> list[Target]:
    """Every table row on the padded variant, the other variants at the main head dims; WORKLOADS at the notebook's 8 too."""
    first = table_targets(archs, tuple(name for name in variants if name == "padded"))
    others = table_targets(archs, tuple(name for name in variants if name != "padded"))
    both = chain(first, (t for t in others if t.head_dim in VARIANT_HEAD_DIMS))
    chosen = [t for t in both if t.dtype in dtypes]
    narrow = [replace(t, head_dim=8) for t in chosen if t.head_dim == 16]
    chosen += [t for t in narrow if t.variant in WORKLOADS or t.passname == "attn_mask_gradient"]
    return list(dict.fromkeys(chosen))


def predictions(facts: list[Facts]) -> list[dict[str, Any]]:
    """Predicted times at B64 S400 of WORKLOADS, for every card, shape, launch and dtype that was compiled."""
    rows = []
    known: dict[tuple[Any, ...], Facts] = {}
    for f in facts:
        if f["costs"] is not None:
            known.setdefault(
                (f["arch"], f["dtype"], f["precision"], f["variant"], f["head_dim"], f["kernel"]), f
            )
    multiplied = dict.fromkeys((f["dtype"], f["precision"]) for f in facts)
    lengths = {kind: make_lengths(kind, BATCH, SEQ) for kind in WORKLOADS.values()}
    asked = product(CARDS, multiplied, WORKLOADS.items(), SHAPES, MOVED)
    for (arch, gpu), (dtype, precision), (variant, kind), (heads, head_dim), kernel in asked:
        if found := known.get((arch, dtype, precision, variant, head_dim, kernel)):
            batch = Batch(lengths[kind], heads, head_dim, SEQ, getattr(torch, dtype).itemsize)
            times = asdict(predict(kernel, found["costs"], gpu, batch, apart=batch.together))
            case = f"B{BATCH}-H{heads}-D{head_dim}-S{SEQ}-{kind}"
            rows.append({
                "gpu": gpu.name, "dtype": dtype, "precision": precision, "case": case, "variant": variant,
                "kernel": kernel, **times, "excluded": found["excluded"],
            })  # fmt: skip
    return rows


def to_json(facts: list[Facts]) -> str:
    content = {
        "kind": "compile-report",
        "assumptions": ASSUMPTIONS,
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "gpus": [gpu._asdict() for _, gpu in CARDS],
        "kernels": facts,
        "predicted_us": predictions(facts),
    }
    return json.dumps(content, indent=1, default=asdict) + "\n"


def _table(header: str, rows: Iterable[Sequence[object]]) -> str:
    lines = [f"| {header} |", "|" + "---|" * len(header.split(" | "))]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def _kernel(fact: Facts) -> list[object]:
    """The cells that say which kernel a line is about."""
    name, dtype = fact["kernel"].removesuffix("_kernel"), _multiplied(fact)
    return [name, fact["arch"], dtype, fact["head_dim"], fact["variant"]]


def _multiplied(row: dict[str, Any]) -> str:
    """The dtype, and how it is multiplied where it may be either way."""
    return row["dtype"] + f" {row['precision']}" * (row["dtype"] == "float32")


def markdown(facts: list[Facts]) -> str:
    """Three tables: resources, cycles a tile, predicted times."""
    resources = [
        [*_kernel(f), "{block_m}x{block_n} w{num_warps} s{num_stages}".format_map(f),
         *(f[name] for name in ("registers", "stack", "spills", "shared")), f["ctas"] or "-", f["serialized"] or "-"]
        for f in facts
    ]  # fmt: skip
    cycles = [
        [*_kernel(f), f"{c.block_m}x{c.block_n}",
         *(f"{number:.0f}" for number in (c.issue(c.loop), c.issue(c.masked_loop), c.mufu, c.matrix)), c.bound,
         f"{c.repeats:.2f}", c.outside,
         ", ".join(f"{name} {count}" for name, count in sorted(c.mix.items(), key=lambda item: -item[1]))]
        for f in facts
        if (c := f["costs"]) is not None
    ]  # fmt: skip
    times = [
        [r["case"], r["gpu"], _multiplied(r), r["variant"], r["kernel"].removesuffix("_kernel"),
         *(f"{r[name]:.1f}" for name in ("issue", "mufu", "matrix", "memory")), f"{r['floor']:.1f}", r["bound"],
         f"{r['waiting']:.0%}", f"**{r['expected']:.1f}**", r["excluded"] or "-"]
        for r in predictions(facts)
    ]  # fmt: skip
    return "\n\n".join([
        f"# Compile report, Triton {triton.__version__}",
        "## Resources: registers a thread, bytes of stack, spilled, bytes of shared memory, CTAs a multiprocessor, and ptxas's advisory where matrix instructions are serialized",
        _table("kernel | arch | dtype | D | variant | tile | registers | stack | spills | shared | CTAs | serialized", resources),
        "## One score tile: cycles of a multiprocessor by bound, and what the full tiles' loop issues a warp",
        _table("kernel | arch | dtype | D | variant | tile | issue | issue, masked | exp2 | matrix | bound | repeats | outside | mix", cycles),
        f"## Predicted time of a launch in µs (B{BATCH} S{SEQ}; IMDB lengths by a mask or by `lengths`, padded queries and keys skipped; or no padding: `dense`)",
        ASSUMPTIONS,
        _table("case | GPU | dtype | variant | launch | issue | exp2 | matrix | memory | floor | bound | waits | expected | not modelled", times),
    ]) + "\n"  # fmt: skip


def main(argv: list[str]) -> int:
    """Compile, print, and write compile-report.json and .md; status 2 with one line for a wrong argument."""
    options = parser().parse_args(argv)
    if options.variants == ["all"]:
        options.variants = list(VARIANTS)
    archs = {str(arch): arch for arch in ARCHS}
    known: dict[str, dict[str, Any]] = {"arch": archs, "variants": VARIANTS, "dtypes": DTYPES}
    faults = [
        f"{kind.removesuffix('s')} must be one of {', '.join(names)}, got {given!r}"
        for kind, names in known.items() for given in vars(options)[kind] if given not in names
    ]  # fmt: skip
    if fault := next(iter(faults), why_not_compile()):
        print(f"python -m bench compile-report: {fault}", file=sys.stderr)
        return 2
    dtypes = tuple(str(DTYPES[name]).removeprefix("torch.") for name in options.dtypes)
    targets = targets_of(tuple(archs[name] for name in options.arch), dtypes, tuple(options.variants))
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        facts = list(chain.from_iterable(pool.map(facts_of_target, targets)))
    text, content = markdown(facts), to_json(facts)
    folder = Path(options.output) / "compile"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compile-report.json").write_text(content)
    (folder / "compile-report.md").write_text(text)
    print(content if options.json else text)
    return 0
