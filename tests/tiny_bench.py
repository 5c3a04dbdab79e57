"""What the tests of the benchmark share: a small case timed in moments, and results that nobody measured."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from padfree_bench.measuring.cases import Case
from padfree_bench.measuring.ceilings import Ceilings
from padfree_bench.measuring.results import NOT_RUN, OK, Result, Row
from padfree_bench.measuring.timing import Effort
from padfree_bench.peers import Peer
from padfree_bench.suites import attention

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SMALL = Case(3, 2, 8, 40, "fp32", "pad50")
CEILINGS = Ceilings(1e10, {"fp32": 1e11}, 1e9)

CASE = "B64-H12-D64-S400-imdb-bf16"
NO_GPU = "no GPU: padfree's kernel did not run"


def rows_of(case: Case, peers: list[Peer], directions: list[str], ceilings: Ceilings = CEILINGS) -> list[Row]:
    """The rows that the attention suite makes of this case, timed five times."""
    effort, result = Effort(seconds=0.02, least=5, most=5, warmup=1), Result("attention", {})
    session: Any = SimpleNamespace(device=CPU, effort=effort, ceilings=ceilings, seed=0, result=result)
    return [row for part in attention.run_case(session, case, peers, directions) for row in part]


def a_row(peer: str, ms: float | None, case: str = CASE, spread: float = 0.0, **other: Any) -> Row:
    """A row of a peer that took `ms`, or, if that is None, did not run."""
    row = Row("attention", case, "imdb", "forward", peer, OK)
    if numbers := [int(number) for number in re.findall(r"\d+", case)[:4]]:
        shape = dict(zip(("batch", "heads", "head_dim", "seq"), numbers, strict=True))
        *_, lengths, dtype = case.split("-")
        row = replace(row, dtype=dtype, lengths=lengths, valid_fraction=0.6, **shape)
    if ms is None:
        return replace(row, **{"status": NOT_RUN, "reason": NO_GPU} | other)
    timed = {"ms_p20": ms * (1 - spread), "ms_p50": ms, "ms_p80": ms * (1 + spread), "peak_mib": ms}
    rates = {"tokens_per_s": 1e6, "tflops": 0.1, "gb_per_s": 1.0}
    # as many digits as a file keeps
    speed = {name: float(f"{rate / ms:.4g}") for name, rate in rates.items()}
    return replace(row, **timed | speed | other)


def as_graph(ms: float) -> dict[str, float]:
    """The figures of a row whose calls were also replayed as a graph."""
    return {"graph_p20": ms, "graph_ms": ms, "graph_p80": ms}


def result_of(rows: list[Row], device: str = "GPU", **environment: Any) -> Result:
    kind = "cpu" if device.startswith("CPU") else "cuda"
    facts = {
        "device": device, "device_type": kind, "cpu": "a CPU", "cores": 2, "load_before": 0.5,
        "versions": {"torch": "2", "triton": "3"}, "command": "python -m bench attention", "commit": "d" * 40,
        "started": "2026-11-28T10:00:00+00:00",
    }  # fmt: skip
    ceilings = {"bytes_per_s": 1e11, "flops_per_s": {"fp32": 2e11, "bf16": 2e11}, "exp2_per_s": 1e9}
    return Result("attention", facts | environment, rows, ceilings)
