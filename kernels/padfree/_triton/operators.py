"""Operators and autograd: the only file that knows torch.library.

`padfree::forward` and `padfree::backward` are opaque to torch.compile and export; an `autograd.Function` joins
them. All tensors are in the padded form of `call.Call`; `run` and `run_qkvpacked` are what the entry points call.
"""

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from padfree._arguments import Packing, Window, split_qkv
from padfree._triton.backward import launch_backward
from padfree._triton.call import OPEN, Call, heads_last
from padfree._triton.forward import launch_forward
from padfree._triton.single_query import launch_single_query_backward, launch_single_query_forward

# A window side beyond any sequence.
FAR = 2**31 - 1


class Options(NamedTuple):
    scale: float
    dropout_p: float
    left: int
    right: int
    skip_padded_queries: bool

    @classmethod
    def of(
        cls, query: Tensor, scale: float | None, dropout_p: float, window: Window, skip: bool
    ) -> "Options":
        left, right = (OPEN if side is None else min(side, FAR) for side in window or (None, None))
        return cls(
            float(query.shape[-1] ** -0.5 if scale is None else scale), float(dropout_p), left, right, skip
        )


SHARED_SCHEMA = (
    "Tensor? padding, Tensor? attn_mask, Tensor? seed, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt max_q, SymInt max_k, float scale, float dropout_p, int left, int right, bool skip_padded_queries"
)
# How many of the operator's arguments are tensors, which come first: query to cu_seqlens_k.
TENSORS = 8
SAVED_SCHEMA = "Tensor out, Tensor lse2, Tensor d_out, Tensor? d_lse2"

library = torch.library.Library("padfree", "DEF")
library.define(f"forward(Tensor query, Tensor key, Tensor value, {SHARED_SCHEMA}) -> (Tensor, Tensor)")
library.define(
    f"backward({SAVED_SCHEMA}, Tensor query, Tensor key, Tensor value, {SHARED_SCHEMA}, bool attn_mask_gradient)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
library.define(f"backward_qkvpacked({SAVED_SCHEMA}, Tensor qkv, {SHARED_SCHEMA}) -> Tensor")


def _forward(*call: Any) -> tuple[Tensor, Tensor]:
    described = Call(*call)
    launch = launch_single_query_forward if described.max_q == 1 else launch_forward
    return launch(described)


def _launch_backward(
    call: Call,
    out: Tensor,
    lse2: Tensor,
    d_out: Tensor,
    d_lse2: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    d_attn_mask: Tensor | None = None,
) -> None:
    """The launcher that fits: a single query's kernel owns dk and dv only where heads are not grouped.

    A saved-tensor hook may hand back the same numbers in another layout, of which the passes take lse2's for granted.
    """
    lse2 = lse2.contiguous()
    single = call.max_q == 1 and call.heads == call.kv_heads and not call.is_empty
    launch = launch_single_query_backward if single else launch_backward
    launch(call, out, lse2, d_out, d_lse2, grads, d_attn_mask)


def _backward(
    out: Tensor, lse2: Tensor, d_out: Tensor, d_lse2: Tensor | None, *call: Any
) -> tuple[Tensor, ...]:
    *arguments, attn_mask_gradient = call
    described = Call(*arguments)
    query, key, value, _padding, attn_mask = arguments[:5]
    grads = described.empty_like(query), described.empty_like(key), described.empty_like(value)
    d_attn_mask = attn_mask.new_empty(attn_mask.shape) if attn_mask_gradient else None
    _launch_backward(described, out, lse2, d_out, d_lse2, grads, d_attn_mask)
    return *grads, lse2.new_empty(0) if d_attn_mask is None else d_attn_mask


def _backward_qkvpacked(
    out: Tensor, lse2: Tensor, d_out: Tensor, d_lse2: Tensor | None, qkv: Tensor, *options: Any
) -> Tensor:
    d_qkv = qkv.new_zeros(qkv.shape) if qkv.ndim == 4 else qkv.new_empty(qkv.shape)
    _launch_backward(Call(*split_qkv(qkv), *options), out, lse2, d_out, d_lse2, split_qkv(d_qkv))
    return d_qkv


def _forward_fake(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return heads_last(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _backward_fake(
    out: Tensor,
    lse2: Tensor,
    d_out: Tensor,
    d_lse2: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    attn_mask: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    attn_mask_gradient = rest[-1]
    d_attn_mask = lse2.new_empty(0)
    if attn_mask is not None and attn_mask_gradient:
        d_attn_mask = attn_mask.new_empty(attn_mask.shape)
    return heads_last(query), heads_last(key), heads_last(value), d_attn_mask


def _backward_qkvpacked_fake(
    out: Tensor, lse2: Tensor, d_out: Tensor, d_lse2: Tensor | None, qkv: Tensor, *rest: Any
) -> Tensor:
    return qkv.new_empty(qkv.shape)


for name, launch, fake in (
    ("forward", _forward, _forward_fake),
    ("backward", _backward, _backward_fake),
    ("backward_qkvpacked", _backward_qkvpacked, _backward_qkvpacked_fake),
):
    library.impl(name, launch, "CUDA")
    library.impl(name, launch, "CPU")
    torch.library.register_fake(f"padfree::{name}", fake, lib=library)

ops = torch.ops.padfree


def _forward_and_save(
    ctx: Any, inputs: tuple[Tensor | None, ...], tensors: tuple[Tensor | None, ...], scalars: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """Run the forward on `tensors` and keep `inputs`, which are what gradients are owed to."""
    out, lse2 = ops.forward(*tensors, *scalars)
    ctx.save_for_backward(*inputs, out, lse2)
    ctx.scalars = scalars
    ctx.set_materialize_grads(False)
    return out, lse2


def refuse_double_backward() -> None:
    """Grad mode is on inside a backward only under create_graph=True."""
    if torch.is_grad_enabled():
        refuse_second_derivative()


def refuse_second_derivative() -> NoReturn:
    raise RuntimeError(
        "padfree's kernel is differentiable once; for create_graph=True (double backward) use impl='reference'"
    )


class Attention(torch.autograd.Function):
    """(query, key, value, then the arguments of SHARED_SCHEMA) -> (out, lse2).

    Arguments are spelled out for torch.compile, which reads the signature; a setup_context of its own would cost each
    call an `inspect.signature`, half of the forward's host time: `_functional` has one. Dynamo traces no Function with a
    jvp of its own, so forward mode is refused in PyTorch's words.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        attn_mask: Tensor | None,
        seed: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        max_q: int,
        max_k: int,
        scale: float,
        dropout_p: float,
        left: int,
        right: int,
        skip_padded_queries: bool,
    ) -> tuple[Tensor, Tensor]:
        tensors = query, key, value, padding, attn_mask, seed, cu_seqlens_q, cu_seqlens_k
        scalars = max_q, max_k, scale, dropout_p, left, right, skip_padded_queries
        return _forward_and_save(ctx, tensors, tensors, scalars)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse2: Tensor | None) -> tuple[Any, ...]:
        refuse_double_backward()
        *tensors, out, lse2 = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out
        mask_needs = ctx.needs_input_grad[4]
        dq, dk, dv, d_attn_mask = ops.backward(out, lse2, d_out, d_lse2, *tensors, *ctx.scalars, mask_needs)
        return dq, dk, dv, None, d_attn_mask if mask_needs else None, *[None] * (len(ctx.scalars) + 3)


class AttentionQKVPacked(torch.autograd.Function):
    """(qkv, then the arguments of SHARED_SCHEMA) -> (out, lse2), with one gradient buffer."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        padding: Tensor | None,
        attn_mask: Tensor | None,
        seed: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        max_q: int,
        max_k: int,
        scale: float,
        dropout_p: float,
        left: int,
        right: int,
        skip_padded_queries: bool,
    ) -> tuple[Tensor, Tensor]:
        shared = padding, attn_mask, seed, cu_seqlens_q, cu_seqlens_k
        scalars = max_q, max_k, scale, dropout_p, left, right, skip_padded_queries
        return _forward_and_save(ctx, (qkv, *shared), (*split_qkv(qkv), *shared), scalars)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse2: Tensor | None) -> tuple[Any, ...]:
        refuse_double_backward()
        *tensors, out, lse2 = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out
        d_qkv = ops.backward_qkvpacked(out, lse2, d_out, d_lse2, *tensors, *ctx.scalars)
        return d_qkv, *[None] * (len(ctx.scalars) + 5)


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    attn_mask: Tensor | None,
    options: Options,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute checked arguments in the padded form: (out, lse2). The kernels want a positive scale."""
    if options.scale <= 0:
        query, options = (
            query * (-1.0 if options.scale else 0.0),
            options._replace(scale=abs(options.scale) or 1.0),
        )
    if attn_mask is not None:
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.ndim) + attn_mask.shape)
    cu_q, cu_k, max_q, max_k = packing or (None, None, query.shape[2], key.shape[2])
    query, key, value, cu_q, cu_k = distinct(query, key, value, cu_q, cu_k)
    seed = dropout_seed(query, options)
    function: type[torch.autograd.Function] = Attention
    if torch._C._are_functorch_transforms_active():
        from padfree._triton.functional import FunctionalAttention as function
    return function.apply(query, key, value, padding, attn_mask, seed, cu_q, cu_k, max_q, max_k, *options)


def run_qkvpacked(
    qkv: Tensor, padding: Tensor | None, options: Options, packing: Packing | None
) -> tuple[Tensor, Tensor]:
    """Compute one checked qkv buffer: (out in the padded form, lse2)."""
    if options.scale <= 0 or torch._C._are_functorch_transforms_active():
        return run(*split_qkv(qkv), padding, None, options, packing)
    cu_q, cu_k, max_q, max_k = packing or (None, None, qkv.shape[1], qkv.shape[1])
    cu_q, cu_k = distinct(cu_q, cu_k)
    seed = dropout_seed(qkv, options)
    return AttentionQKVPacked.apply(qkv, padding, None, seed, cu_q, cu_k, max_q, max_k, *options)


def distinct(*tensors: Tensor | None) -> list[Any]:
    """The tensors, a repeated one as a view of itself: torch.compile refuses a Function's argument given twice."""
    kept: list[Tensor | None] = []
    for tensor in tensors:
        repeated = tensor is not None and any(tensor is other for other in kept)
        kept.append(tensor.view_as(tensor) if repeated and tensor is not None else tensor)
    return kept


def dropout_seed(like: Tensor, options: Options) -> Tensor | None:
    """[1] int64 drawn on the device by torch's generator: follows manual_seed, checkpointing and graph replay."""
    if options.dropout_p == 0:
        return None
    return torch.randint(2**62, (1,), device=like.device)
