"""The workloads: what a case is, the named groups of cases, and how a command line picks from them."""

import itertools
import re
from dataclasses import dataclass, replace

import numpy as np
import torch

from padfree_bench.measuring.lengths import make_lengths

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DIRECTIONS = ("forward", "backward", "both")
HEADS = ((12, 64), (4, 8), (8, 16), (4, 32), (16, 128))
SPEC = re.compile(r"B(\d+)-H(\d+)-D(\d+)-S(\d+)(?:-(imdb|scaled|full|pad\d\d))?(?:-(fp32|fp16|bf16))?")


@dataclass(frozen=True)
class Case:
    """One padded batch: [batch, heads, seq, head_dim] in `dtype`, with lengths of one kind."""

    batch: int
    heads: int
    head_dim: int
    seq: int
    dtype: str
    lengths: str = "imdb"
    group: str = "imdb"

    @property
    def id(self) -> str:
        return f"B{self.batch}-H{self.heads}-D{self.head_dim}-S{self.seq}-{self.lengths}-{self.dtype}"

    def sequence_lengths(self) -> np.ndarray:
        """[batch] lengths, the same in every run."""
        return make_lengths(self.lengths, self.batch, self.seq)


def parse_case(text: str, dtype: str = "fp32") -> Case:
    """`B64-H12-D64-S400-imdb-bf16` as a Case; lengths (imdb) and dtype may be left out."""
    match = SPEC.fullmatch(text)
    if match is None:
        raise ValueError(f"shape must look like B64-H12-D64-S400-imdb-bf16 or name a group, got {text!r}")
    batch, heads, head_dim, seq = (int(number) for number in match.groups()[:4])
    if min(batch, heads, head_dim, seq) < 1:
        raise ValueError(f"shape needs sizes of at least 1, got {text!r}")
    return Case(batch, heads, head_dim, seq, match[6] or dtype, match[5] or "imdb", "chosen")


def gpu_groups() -> dict[str, list[Case]]:
    """Every named group at the size a data-centre GPU is measured with; dtype is filled in later."""
    imdb = [Case(64, heads, dim, seq, "bf16") for seq in (400, 512) for heads, dim in HEADS]
    full = [Case(64, heads, dim, seq, "bf16", "full", "full") for seq in (512, 400) for heads, dim in HEADS]
    padding = [Case(64, 12, 64, 512, "bf16", f"pad{percent:02d}", "padding") for percent in range(0, 100, 10)]
    sizes = [2**power for power in range(7, 17)]
    length = [Case(max(1, 65536 // seq), 12, 64, seq, "bf16", "scaled", "length") for seq in sizes]
    batch = [Case(2**power, 12, 64, 400, "bf16", "imdb", "batch") for power in range(10)]
    return {"imdb": imdb, "full": full, "padding": padding, "length": length, "batch": batch}


def cpu_groups() -> dict[str, list[Case]]:
    """The same groups at sizes that two CPU cores finish."""
    imdb = [Case(16, heads, dim, seq, "fp32") for seq in (400, 512) for heads, dim in HEADS]
    full = [Case(16, heads, dim, 400, "fp32", "full", "full") for heads, dim in HEADS]
    padding = [Case(16, 4, 8, 512, "fp32", f"pad{percent:02d}", "padding") for percent in range(0, 100, 10)]
    length = [
        Case(max(1, 4096 // seq), 4, 8, seq, "fp32", "scaled", "length")
        for seq in (128, 256, 512, 1024, 2048)
    ]
    batch = [Case(size, 4, 8, 400, "fp32", "imdb", "batch") for size in (1, 4, 16, 64)]
    return {"imdb": imdb, "full": full, "padding": padding, "length": length, "batch": batch}


def quick_cases(device: str) -> list[Case]:
    """A handful that touches every group and plot, for a smoke run."""
    if device == "cuda":
        specs = "B64-H12-D64-S400-imdb B64-H4-D8-S400-imdb B64-H12-D64-S512-full B64-H12-D64-S512-pad50"
        return [parse_case(spec, "bf16") for spec in specs.split()]
    imdb = [Case(4, heads, dim, 400, "fp32") for heads, dim in ((4, 8), (8, 16), (4, 32), (12, 64))]
    padding = [Case(4, 4, 8, 256, "fp32", f"pad{percent:02d}", "padding") for percent in (0, 50, 90)]
    length = [Case(1024 // seq, 4, 8, seq, "fp32", "scaled", "length") for seq in (128, 256, 512)]
    return imdb + padding + length


def choose_dtypes(text: str | None, default: str) -> list[str]:
    """Comma-separated dtypes; ValueError for an unknown one."""
    chosen = (text or default).split(",")
    for name in chosen:
        if name not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return chosen


def choose_cases(device: str, shapes: str | None, dtypes: str | None, quick: bool) -> list[Case]:
    """The cases a command line asks for, most telling first; of all groups one in turn.

    Args:
        device: "cpu" or "cuda"; decides the sizes and the default dtypes.
        shapes: comma-separated group names and explicit cases; all groups when None.
        dtypes: comma-separated names; on a GPU bf16 everywhere and fp16, fp32 for the imdb group when None.
        quick: a handful of cases instead of the groups.

    Raises:
        ValueError: an unknown group, a malformed shape or an unknown dtype.
    """
    chosen_dtypes = choose_dtypes(dtypes, "") if dtypes else None
    groups = gpu_groups() if device == "cuda" else cpu_groups()
    cases: list[Case]
    if shapes is None:
        # The first of every group, then the second: a run that is stopped early has points for every plot.
        turns = itertools.zip_longest(*groups.values())
        cases = quick_cases(device) if quick else [case for turn in turns for case in turn if case]
    else:
        cases = []
        for token in shapes.split(","):
            default = (chosen_dtypes or ["bf16" if device == "cuda" else "fp32"])[0]
            cases += groups[token] if token in groups else [parse_case(token, default)]
    if chosen_dtypes:
        return list(dict.fromkeys(replace(case, dtype=dtype) for dtype in chosen_dtypes for case in cases))
    if device == "cuda" and not quick and shapes is None:
        cases += [replace(case, dtype=dtype) for dtype in ("fp32", "fp16") for case in groups["imdb"]]
    return list(dict.fromkeys(cases))
