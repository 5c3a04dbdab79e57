"""`python -m bench cost-model`: how the cost model does against measured times, and its fitted constants anew.

Rows are those of `tune.json`, or of any file whose rows hold `costs` beside `p50_us`. A question is one pass over one case.
Each is predicted twice: with the constants of the model, and with `hit` and `miss` fitted to all other questions.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

import numpy as np

from padfree_bench.compiled.aot_calls import KERNELS
from padfree_bench.compiled.cost_model import H200, Batch, Constants, predict
from padfree_bench.compiled.costs import GPUS, Costs
from padfree_bench.measuring.cases import DTYPES, Case, parse_case
from padfree_bench.measuring.results import RESULTS

MEASURED = RESULTS / "h200" / "kernels.json"
ARCH = 90
FITTED = ("hit", "miss")
# Times closer than this have no order that a model could get wrong.
LEVEL = 0.03


@dataclass(frozen=True)
class Timed:
    """A kernel that was read and timed: for one pass over one case; `apart` as `predict` takes it."""

    passname: str
    case: Case
    costs: Costs
    us: float
    apart: int

    @property
    def question(self) -> str:
        return f"{self.passname} {self.case.id}"

    def predicted(self, constants: Constants) -> float:
        return predict(
            KERNELS[self.passname][0], self.costs, GPUS[ARCH], batch_of(self.case), constants, self.apart
        ).expected


def batch_of(case: Case) -> Batch:
    """What the model asks of a case."""
    return Batch(case.sequence_lengths(), case.heads, case.head_dim, case.seq, DTYPES[case.dtype].itemsize)


def read(path: Path) -> list[Timed]:
    """The rows of a file that were timed and hold costs; ValueError in one line where none do."""
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
        found = [row for row in rows if "costs" in row and "p50_us" in row]
        timed = [
            Timed(r["pass"], parse_case(r["case"]), Costs(**r["costs"]), r["p50_us"], r.get("apart", 0))
            for r in found
        ]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    if not timed:
        raise ValueError(f"{path} has no row with costs and p50_us")
    return timed


@dataclass(frozen=True)
class Verdict:
    """Over some rows: errors of predicted over measured, and pairs of one question that differ and are in order."""

    worst: float
    typical: float
    ordered: int
    pairs: int


def judge(rows: Sequence[Timed], predicted: Sequence[float]) -> Verdict:
    errors = [abs(us / row.us - 1) for row, us in zip(rows, predicted, strict=True)]
    pairs = [
        (us - other_us) * (row.us - other.us) > 0
        for (row, us), (other, other_us) in combinations(zip(rows, predicted, strict=True), 2)
        if row.question == other.question and abs(math.log(row.us / other.us)) > LEVEL
    ]
    return Verdict(max(errors), sum(errors) / len(errors), sum(pairs), len(pairs))


def fit(rows: Sequence[Timed], start: Constants = H200) -> Constants:
    """The constants with those of FITTED at the least squares of log(predicted / measured), by Gauss and Newton."""

    def residuals(logs: np.ndarray) -> np.ndarray:
        constants = start._replace(**dict(zip(FITTED, np.exp(logs).tolist(), strict=True)))
        return np.array([math.log(row.predicted(constants) / row.us) for row in rows])

    logs, step = np.log([getattr(start, name) for name in FITTED]), 0.01
    for _ in range(4):
        here = residuals(logs)
        slopes = [(residuals(logs + step * unit) - here) / step for unit in np.eye(len(FITTED))]
        change, *_ = np.linalg.lstsq(np.array(slopes).T, -here, rcond=None)
        logs = logs + np.clip(change, -0.5, 0.5)
    return start._replace(**dict(zip(FITTED, np.exp(logs).tolist(), strict=True)))


def left_out(rows: Sequence[Timed]) -> list[tuple[str, list[Timed], Constants]]:
    """(question, its rows, the constants fitted to the rows of every other question)."""
    by_question = sorted(rows, key=lambda row: row.question)
    groups = {name: list(group) for name, group in groupby(by_question, lambda row: row.question)}
    return [
        (name, mine, fit([row for other in groups if other != name for row in groups[other]]))
        for name, mine in groups.items()
    ]


def line(name: str, rows: Sequence[Timed], constants: Constants) -> str:
    v = judge(rows, [row.predicted(constants) for row in rows])
    share = f"{v.ordered / v.pairs:.0%} ({v.ordered} of {v.pairs})" if v.pairs else "-"
    fitted = ", ".join(f"{getattr(constants, field):.0f}" for field in FITTED)
    return f"| {name} | {len(rows)} | {v.typical:.1%} | {v.worst:.1%} | {share} | {fitted} |"


def main(argv: list[str]) -> int:
    """Print the table; status 2 with one line for a file that has no such rows."""
    options = argparse.ArgumentParser(prog="python -m bench cost-model", description=__doc__)
    options.add_argument(
        "files", nargs="*", type=Path, default=[MEASURED], help=f"default: {MEASURED.name} of h200"
    )
    try:
        rows = [row for path in options.parse_args(argv).files for row in read(path)]
    except ValueError as error:
        print(f"python -m bench cost-model: {error}", file=sys.stderr)
        return 2
    print(
        f"| rows | kernels | mean error | largest | pairs over {LEVEL:.0%} apart in order | {', '.join(FITTED)} (ns) |"
    )
    print("|---|---|---|---|---|---|")
    print(line("all, as the model is", rows, H200))
    print(line("all, fitted to them", rows, fit(rows)))
    for name, mine, constants in left_out(rows):
        print(line(f"{name}, fitted to the others", mine, constants))
    return 0
