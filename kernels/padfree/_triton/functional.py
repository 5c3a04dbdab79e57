"""Attention under torch.func's transforms, which ask a Function for a setup_context.

It has one here and not in `operators`, where it would cost every ordinary call half of its host time. vmap, and with it
jacrev, runs the operators once a sample.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from padfree._triton.operators import TENSORS, ops, refuse_second_derivative


def refuse_forward_mode(ctx: Any, *tangents: Any) -> NoReturn:
    raise RuntimeError(
        "padfree's kernel has no forward-mode derivative (jvp, jacfwd, hessian); use impl='reference'"
    )


class FunctionalAttention(torch.autograd.Function):
    """The arguments and results of `operators.Attention`."""

    generate_vmap_rule = True
    jvp = staticmethod(refuse_forward_mode)

    @staticmethod
    def forward(*call: Any) -> tuple[Tensor, Tensor]:
        return ops.forward(*call)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:TENSORS], *output)
        ctx.scalars = inputs[TENSORS:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse2: Tensor | None) -> tuple[Any, ...]:
        *tensors, out, lse2 = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out
        mask_needs = ctx.needs_input_grad[4]
        dq, dk, dv, d_attn_mask = FunctionalBackward.apply(
            out, lse2, d_out, d_lse2, *tensors, *ctx.scalars, mask_needs
        )
        return dq, dk, dv, None, d_attn_mask if mask_needs else None, *[None] * (len(ctx.scalars) + 3)


class FunctionalBackward(torch.autograd.Function):
    """`padfree::backward` as a Function, so that a second derivative is refused and not 0."""

    generate_vmap_rule = True
    jvp = staticmethod(refuse_forward_mode)

    @staticmethod
    def forward(*call: Any) -> tuple[Tensor, ...]:
        return ops.backward(*call)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        refuse_second_derivative()
