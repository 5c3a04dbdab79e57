"""No time without the right answer: a peer's output and gradients against fp64 before the clock starts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from padfree_bench.inputs import Inputs, Truth
from padfree_bench.peers.base import Prepared

# ‖x - truth‖ / ‖truth‖ over the real rows. TF32 (near 3e-4) must not pass as fp32, bf16 rounding must pass.
LIMITS = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 4e-2}


@dataclass(frozen=True)
class Verdict:
    """Largest absolute error of the output, relative errors by name, and which of them are over the limit."""

    max_error: float
    relative: dict[str, float]
    limit: float

    @property
    def wrong(self) -> list[str]:
        # `not <=` and not `>`: NaN is wrong too.
        return [name for name, error in self.relative.items() if not error <= self.limit]

    def reason(self) -> str:
        errors = ", ".join(f"{name} {self.relative[name]:.1e}" for name in self.wrong)
        return f"wrong answer, not timed: relative error {errors} (limit {self.limit:.0e})"


def relative_error(actual: Tensor, truth: Tensor, keep: Tensor) -> tuple[float, float]:
    """(relative, largest absolute) error over the real rows; actual and truth [B, H, S, D], keep [B, S]."""
    rows = keep[:, None, :, None]
    difference = torch.where(rows, actual.double() - truth, 0.0)
    expected = torch.where(rows, truth, 0.0)
    return float(difference.norm() / expected.norm()), float(difference.abs().max())


def check(prepared: Prepared, inputs: Inputs, truth: Truth, training: bool) -> Verdict:
    """Run the peer once and compare; an answer of another shape is wrong too."""
    keep, limit = inputs.keep, LIMITS[inputs.case.dtype]
    result = prepared.forward()
    out = prepared.output(result.detach())
    if out.shape != truth.out.shape:
        return Verdict(float("nan"), {f"shape {tuple(out.shape)}": float("nan")}, limit)
    error, worst = relative_error(out, truth.out, keep)
    relative = {"out": error}
    if training:
        grads = prepared.grads(torch.autograd.grad(result, prepared.leaves, prepared.d_out))
        for name, grad, expected in zip(
            ("d_query", "d_key", "d_value"), grads, (truth.d_query, truth.d_key, truth.d_value), strict=True
        ):
            relative[name] = relative_error(grad, expected, keep)[0]
    return Verdict(worst, relative, limit)
