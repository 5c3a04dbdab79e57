"""No time without the right answer: an output and gradients against fp64 before the clock starts."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from padfree_bench.measuring.cases import DTYPES
from padfree_bench.measuring.inputs import Answer, Inputs, plain_attention

# ‖x - truth‖ / ‖truth‖ over the real rows, at most. TF32 (near 3e-4) must not pass as fp32.
LIMITS = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 4e-2}
# Below fp32 an implementation may err as much as the plain formula in that dtype does, times this.
BUDGET_FACTOR = 4.0


def limit_of(dtype: str, own_error: float, limits: dict[str, float] = LIMITS) -> float:
    """The largest relative error that passes where the plain formula in this dtype makes `own_error`."""
    if dtype == "fp32" or math.isnan(own_error):
        return limits[dtype]
    # A quarter of eps is what rounding the result alone costs.
    return min(limits[dtype], BUDGET_FACTOR * max(own_error, torch.finfo(DTYPES[dtype]).eps / 4))


@dataclass
class Truth(Answer):
    """The answer in fp64, and by result the relative error up to which a peer's counts as right."""

    limits: dict[str, float]


@dataclass(frozen=True)
class Verdict:
    """Largest absolute error of the output, relative errors and their limits by name, and which are over them."""

    max_error: float
    relative: dict[str, float]
    limits: dict[str, float]

    @property
    def wrong(self) -> list[str]:
        # `not <=` and not `>`: NaN is wrong too.
        return [name for name, error in self.relative.items() if not error <= self.limits.get(name, 0.0)]

    def reason(self) -> str:
        wrong = [(name, self.relative[name], self.limits.get(name, 0.0)) for name in self.wrong]
        errors = ", ".join(f"{name} {error:.1e} (limit {limit:.0e})" for name, error, limit in wrong)
        return f"wrong answer, not timed: relative error {errors}"


def compute_truth(inputs: Inputs) -> Truth:
    """The exact answer and the limits that follow from the plain formula's own rounding on the same inputs."""
    dtype, truth = inputs.case.dtype, plain_attention(inputs, torch.float64)
    own = truth if dtype == "fp32" else plain_attention(inputs, DTYPES[dtype])
    limits = {}
    for name, exact in vars(truth).items():
        limits[name] = limit_of(dtype, relative_error(getattr(own, name), exact, inputs.keep)[0])
    return Truth(**vars(truth), limits=limits)


def relative_error(actual: Tensor, truth: Tensor, keep: Tensor) -> tuple[float, float]:
    """(relative, largest absolute) error over the real rows; actual and truth [B, H, S, D], keep [B, S]."""
    rows = keep[:, None, :, None]
    difference = torch.where(rows, actual.double() - truth, 0.0)
    expected = torch.where(rows, truth, 0.0)
    return float(difference.norm() / expected.norm()), float(difference.abs().max())


def check(answer: Iterable[tuple[str, Tensor]], inputs: Inputs, truth: Truth) -> Verdict:
    """Compare results by name, "out" the first of them; one of another shape is wrong too."""
    relative, largest = dict[str, float](), dict[str, float]()
    for name, actual in answer:
        expected = getattr(truth, name)
        if actual.shape != expected.shape:
            return Verdict(math.nan, {f"shape {tuple(actual.shape)}": math.nan}, truth.limits)
        relative[name], largest[name] = relative_error(actual, expected, inputs.keep)
    return Verdict(largest["out"], relative, truth.limits)
