"""The workloads: what a case is, the named groups of cases, and how a command line picks from them."""

import itertools
import re
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import torch

from padfree_bench.measuring.lengths import make_lengths

# Every suite, and what it measures.
SUITES = {
    "attention": "one attention call: every peer, forward, backward and both",
    "memory": "peak and extra memory of a call against length, no timing",
    "encoder": "the whole classifier, inference and a training step",
    "train": "a training step: the notebook's loop, what others offer, and each of our levers",
    "epoch": "an epoch of real reviews and predictions, the notebook's loops against ours",
    "hf": "a transformers BERT with eager, sdpa and padfree",
}
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


def groups(device: str) -> dict[str, list[Case]]:
    """Every named group: on "cuda" what a data-centre GPU is measured with, on "cpu" what two cores finish."""
    gpu = device == "cuda"
    size, heads, dim, dtype = (64, 12, 64, "bf16") if gpu else (16, 4, 8, "fp32")
    tokens, longest = (65536, 16) if gpu else (4096, 11)
    seqs, sizes = ((512, 400), range(10)) if gpu else ((400,), range(0, 8, 2))
    imdb = [Case(size, h, d, seq, dtype) for seq in (400, 512) for h, d in HEADS]
    full = [Case(size, h, d, seq, dtype, "full", "full") for seq in seqs for h, d in HEADS]
    padding = [Case(size, heads, dim, 512, dtype, f"pad{n:02d}", "padding") for n in range(0, 100, 10)]
    lengths = [2**power for power in range(7, longest + 1)]
    length = [Case(max(1, tokens // seq), heads, dim, seq, dtype, "scaled", "length") for seq in lengths]
    batch = [Case(2**power, heads, dim, 400, dtype, "imdb", "batch") for power in sizes]
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


def pick(what: str, text: str, known: Collection[str]) -> list[str]:
    """Comma-separated names; ValueError for an unknown one lists the known ones."""
    for name in (names := text.split(",")):
        if name not in known:
            raise ValueError(f"{what} must be one of {', '.join(known)}, got {name!r}")
    return names


def choose_dtypes(text: str | None, default: str) -> list[str]:
    """Comma-separated dtypes; ValueError for an unknown one."""
    return pick("dtype", text or default, DTYPES)


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
    gpu, named = device == "cuda", groups(device)
    chosen_dtypes = choose_dtypes(dtypes, "") if dtypes else None
    if shapes is not None:
        default = (chosen_dtypes or ["bf16" if gpu else "fp32"])[0]
        cases = [c for name in shapes.split(",") for c in named.get(name) or [parse_case(name, default)]]
    elif quick:
        cases = quick_cases(device)
    else:
        # The first of every group, then the second: a run that is stopped early has points for every plot.
        cases = [case for turn in itertools.zip_longest(*named.values()) for case in turn if case]
    if chosen_dtypes:
        cases = [replace(case, dtype=dtype) for dtype in chosen_dtypes for case in cases]
    elif gpu and not quick and shapes is None:
        cases += [replace(case, dtype=dtype) for dtype in ("fp32", "fp16") for case in named["imdb"]]
    return list(dict.fromkeys(cases))
