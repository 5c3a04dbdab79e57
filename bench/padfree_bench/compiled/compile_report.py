"""`python -m bench compile-report`: what the compiler makes of every configuration, and the time it predicts.

Registers, shared memory, occupancy and instruction mixes are read from the compiled kernels. The times are
predictions of a static model (`cost_model`), to be confirmed or refuted by a measurement on a GPU.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import triton

from padfree_bench.compiled.aot import ARCHS, Arch, parse_arch, why_not_compile
from padfree_bench.compiled.aot_calls import VARIANTS, Target, table_targets
from padfree_bench.compiled.aot_facts import Facts, facts_of_targets
from padfree_bench.compiled.cost_model import GPUS, predict
from padfree_bench.measuring.cases import DTYPES
from padfree_bench.measuring.lengths import imdb_lengths
from padfree_bench.measuring.results import RESULTS

BATCH, SEQ = 64, 400
# (heads, head_dim): the notebook's, d_model 128 two ways, BERT-base, wide heads.
SHAPES = ((4, 8), (8, 16), (4, 32), (12, 64), (16, 128))
KERNELS = ("attention_forward_kernel", "query_gradient_kernel", "key_gradient_kernel")
VARIANT_HEAD_DIMS = (16, 64)
ASSUMPTIONS = (
    "Predictions, not measurements. Floors that assume perfectly overlapping CTAs and evenly spread work: issue, "
    "exp2 and matrix cycles of the loops over score tiles, and bytes (inputs at real rows, outputs at every row). "
    "`once` is what programs issue outside of these loops if all of it runs, and is not in the floor. `expected` adds it, "
    "the launch and the loads at a program's end that nothing hides; waves and uneven work are left out."
)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m bench compile-report", description=__doc__)
    options.add_argument(
        "--arch", nargs="+", default=["90"], help=f"of {', '.join(map(str, ARCHS))}; default 90"
    )
    options.add_argument(
        "--variants", nargs="+", default=["padded"], help=f"of {', '.join(VARIANTS)}, or all; default padded"
    )
    options.add_argument(
        "--dtypes", nargs="+", default=["bf16", "fp32"], help=f"of {', '.join(DTYPES)}; default bf16 fp32"
    )
    options.add_argument("--json", action="store_true", help="print the JSON instead of the tables")
    options.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilations at a time")
    options.add_argument("--output", default=str(RESULTS), help="folder for compile-report.json")
    return options


def targets_of(archs: tuple[Arch, ...], dtypes: tuple[str, ...], variants: tuple[str, ...]) -> list[Target]:
    """Every table row on the padded variant with the notebook's head_dim of 8, the other variants at the main head dims."""
    chosen = [t for t in table_targets(archs) if t.dtype in dtypes] if "padded" in variants else []
    chosen += [replace(t, head_dim=8) for t in chosen if t.head_dim == 16]
    others = tuple(variant for variant in variants if variant != "padded")
    more = table_targets(archs, others) if others else ()
    return chosen + [t for t in more if t.dtype in dtypes and t.head_dim in VARIANT_HEAD_DIMS]


def predictions(facts: list[Facts]) -> list[dict[str, Any]]:
    """Predicted floors at B64 S400 and IMDB lengths, for every shape, launch and 16-bit or fp32 dtype."""
    lengths = imdb_lengths(BATCH, SEQ)
    found: dict[tuple[Any, ...], Facts] = {}
    for fact in facts:
        if fact.variant == "padded" and fact.costs is not None:
            found.setdefault((fact.arch, fact.dtype, fact.head_dim, fact.kernel), fact)
    rows = []
    for arch, dtype in dict.fromkeys((fact.arch, fact.dtype) for fact in facts):
        for heads, head_dim in SHAPES:
            for kernel in KERNELS:
                compiled = found.get((arch, dtype, head_dim, kernel))
                if compiled is None or compiled.costs is None:
                    continue
                itemsize = getattr(torch, dtype).itemsize
                prediction = predict(kernel, compiled.costs, arch, lengths, heads, head_dim, SEQ, itemsize)
                shape = f"B{BATCH}-H{heads}-D{head_dim}-S{SEQ}-imdb"
                row = {"arch": arch, "dtype": dtype, "case": shape, "kernel": kernel, **asdict(prediction)}
                rows.append(
                    row
                    | {"floor": prediction.floor, "bound": prediction.bound, "expected": prediction.expected}
                )
    return rows


def to_json(facts: list[Facts]) -> dict[str, Any]:
    return {
        "kind": "compile-report",
        "assumptions": ASSUMPTIONS,
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "gpus": {str(arch): gpu._asdict() for arch, gpu in GPUS.items()},
        "kernels": [asdict(fact) for fact in facts],
        "predicted_us": predictions(facts),
    }


def _table(header: str, rows: Sequence[Sequence[object]]) -> str:
    names = header.split(" | ")
    lines = ["| " + header + " |", "|" + "---|" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def _mix(fact: Facts) -> str:
    mix = fact.costs.mix if fact.costs else {}
    return ", ".join(f"{name} {count}" for name, count in sorted(mix.items(), key=lambda item: -item[1]))


def markdown(facts: list[Facts]) -> str:
    """Three tables: resources, cycles a tile, predicted times."""
    resources = [
        [f.kernel.removesuffix("_kernel"), f.arch, f.dtype, f.head_dim, f.variant,
         f"{f.block_m}x{f.block_n} w{f.num_warps} s{f.num_stages}",
         f.registers, f.stack, f.spills, f.shared, f.ctas or "-", f.serialized or "-"]
        for f in facts
    ]  # fmt: skip
    cycles = [
        [f.kernel.removesuffix("_kernel"), f.arch, f.dtype, f.head_dim, f.variant, f"{c.block_m}x{c.block_n}",
         f"{c.issue:.0f}", f"{c.masked_issue:.0f}", f"{c.mufu:.0f}", f"{c.matrix:.0f}", c.bound,
         f"{c.repeats:.2f}", c.outside, _mix(f)]
        for f in facts
        if (c := f.costs) is not None
    ]  # fmt: skip
    times = [
        [r["case"], r["arch"], r["dtype"], r["kernel"].removesuffix("_kernel"),
         *(f"{r[name]:.1f}" for name in ("issue", "mufu", "matrix", "memory")), f"**{r['floor']:.1f}**", r["bound"],
         f"{r['once']:.1f}", f"{r['expected']:.1f}"]
        for r in predictions(facts)
    ]  # fmt: skip
    return "\n\n".join([
        f"# Compile report, Triton {triton.__version__}",
        "## Resources: registers a thread, bytes of stack, spilled, bytes of shared memory, CTAs a multiprocessor, and ptxas's advisory where matrix instructions are serialized",
        _table("kernel | arch | dtype | D | variant | tile | registers | stack | spills | shared | CTAs | serialized", resources),
        "## One score tile: cycles of a multiprocessor by bound, and what the full tiles' loop issues a warp",
        _table("kernel | arch | dtype | D | variant | tile | issue | issue, masked | exp2 | matrix | bound | repeats | outside | mix", cycles),
        f"## Predicted floor of a launch in µs (B{BATCH} S{SEQ}, IMDB lengths, padded queries and keys skipped)",
        ASSUMPTIONS,
        _table("case | arch | dtype | launch | issue | exp2 | matrix | memory | floor | bound | once | expected", times),
    ]) + "\n"  # fmt: skip


def main(argv: list[str]) -> int:
    """Compile, print, and write compile-report.json and .md; status 2 with one line for a wrong argument."""
    options = parser().parse_args(argv)
    variants = tuple(VARIANTS) if options.variants == ["all"] else tuple(options.variants)
    try:
        archs = tuple(parse_arch(text) for text in options.arch)
        for kind, names, known in (("variant", variants, VARIANTS), ("dtype", options.dtypes, DTYPES)):
            if unknown := [name for name in names if name not in known]:
                raise ValueError(f"{kind} must be one of {', '.join(known)}, got {unknown[0]!r}")
        if reason := why_not_compile():
            raise ValueError(reason)
    except ValueError as error:
        print(f"python -m bench compile-report: {error}", file=sys.stderr)
        return 2
    dtypes = tuple(str(DTYPES[name]).removeprefix("torch.") for name in options.dtypes)
    facts = facts_of_targets(targets_of(archs, dtypes, variants), options.jobs)
    text, content = markdown(facts), json.dumps(to_json(facts), indent=1) + "\n"
    folder = Path(options.output) / "compile"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compile-report.json").write_text(content)
    (folder / "compile-report.md").write_text(text)
    print(content if options.json else text)
    return 0
