"""The operators joined by autograd; `run` and `run_qkvpacked` are what the entry points call."""

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from padfree._arguments import Arguments, Options, Packing, Window, split_qkv
from padfree._triton.call import OPEN
from padfree._triton.operators import TENSORS, ops

# A window side beyond any sequence.
FAR = 2**31 - 1


class KernelOptions(NamedTuple):
    """The options as the operators take them: a scale, and OPEN for a side that the window leaves open."""

    scale: float
    dropout_p: float
    left: int
    right: int
    skip_padded_queries: bool

    @classmethod
    def of(
        cls, query: Tensor, scale: float | None, dropout_p: float, window: Window, skip: bool
    ) -> "KernelOptions":
        left, right = (OPEN if side is None else min(side, FAR) for side in window or (None, None))
        return cls(
            float(query.shape[-1] ** -0.5 if scale is None else scale), float(dropout_p), left, right, skip
        )


def _forward_and_save(
    ctx: Any, inputs: tuple[Tensor | None, ...], tensors: tuple[Tensor | None, ...], scalars: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """Run the forward on `tensors` and keep `inputs`, which are what gradients are owed to; both end with the spans."""
    out, lse2, found = ops.forward(*tensors, *scalars)
    *inputs_but_spans, spans = inputs
    ctx.save_for_backward(*inputs_but_spans, found if found.shape[0] else spans, out, lse2)
    ctx.scalars = scalars
    ctx.set_materialize_grads(False)
    return out, lse2


def refuse_double_backward() -> None:
    """Raise under create_graph=True, the only case in which grad mode is on inside a backward."""
    if torch.is_grad_enabled():
        refuse_second_derivative()


def refuse_second_derivative() -> NoReturn:
    raise RuntimeError(
        "padfree's kernel is differentiable once; for create_graph=True (double backward) use impl='reference'"
    )


class Attention(torch.autograd.Function):
    """(query, key, value, then the arguments of SHARED_SCHEMA) -> (out, lse2).

    Arguments are spelled out for torch.compile, which reads the signature; a setup_context of its own would cost each
    call an `inspect.signature`, half of the forward's host time: FunctionalAttention has one. Dynamo traces no Function with a
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
        key_lengths: Tensor | None,
        spans: Tensor | None,
        max_q: int,
        max_k: int,
        scale: float,
        dropout_p: float,
        left: int,
        right: int,
        skip_padded_queries: bool,
    ) -> tuple[Tensor, Tensor]:
        tensors = (
            query, key, value, padding, attn_mask, seed, cu_seqlens_q, cu_seqlens_k, key_lengths, spans,
        )  # fmt: skip
        scalars = max_q, max_k, scale, dropout_p, left, right, skip_padded_queries
        return _forward_and_save(ctx, tensors, tensors, scalars)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse2: Tensor | None) -> tuple[Any, ...]:
        refuse_double_backward()
        *tensors, out, lse2 = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out
        mask_needs = ctx.needs_input_grad[4]
        dq, dk, dv, d_attn_mask = ops.backward(out, lse2, d_out, d_lse2, *tensors, *ctx.scalars, mask_needs)
        # No gradient for the padding, nor for what stands behind attn_mask.
        return dq, dk, dv, None, d_attn_mask if mask_needs else None, *[None] * (5 + len(ctx.scalars))


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
        key_lengths: Tensor | None,
        spans: Tensor | None,
        max_q: int,
        max_k: int,
        scale: float,
        dropout_p: float,
        left: int,
        right: int,
        skip_padded_queries: bool,
    ) -> tuple[Tensor, Tensor]:
        shared = padding, attn_mask, seed, cu_seqlens_q, cu_seqlens_k, key_lengths, spans
        scalars = max_q, max_k, scale, dropout_p, left, right, skip_padded_queries
        return _forward_and_save(ctx, (qkv, *shared), (*split_qkv(qkv), *shared), scalars)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse2: Tensor | None) -> tuple[Any, ...]:
        refuse_double_backward()
        *tensors, out, lse2 = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out
        d_qkv = ops.backward_qkvpacked(out, lse2, d_out, d_lse2, *tensors, *ctx.scalars)
        return d_qkv, *[None] * (7 + len(ctx.scalars))


def refuse_forward_mode(ctx: Any, *tangents: Any) -> NoReturn:
    raise RuntimeError(
        "padfree's kernel has no forward-mode derivative (jvp, jacfwd, hessian); use impl='reference'"
    )


class FunctionalAttention(torch.autograd.Function):
    """`Attention` under torch.func's transforms, which demand a setup_context. vmap, and with it jacrev, runs it once a sample."""

    generate_vmap_rule = True
    jvp = staticmethod(refuse_forward_mode)

    @staticmethod
    def forward(*call: Any) -> tuple[Tensor, Tensor]:
        # What was found in the mask is not kept: it would be one more output for vmap, and the backward finds it too.
        out, lse2, _ = ops.forward(*call)
        return out, lse2

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
        # No gradient for the padding, nor for what stands behind attn_mask.
        return dq, dk, dv, None, d_attn_mask if mask_needs else None, *[None] * (5 + len(ctx.scalars))


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


def run(call: Arguments, options: KernelOptions) -> tuple[Tensor, Tensor]:
    """Compute a checked call: (out, lse2). The kernels want a positive scale."""
    query, key, value, padding, attn_mask, _, packing, key_lengths, spans = call
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
    numbers = seed, cu_q, cu_k, key_lengths, spans, max_q, max_k, *options
    if torch._C._are_functorch_transforms_active():
        return FunctionalAttention.apply(query, key, value, padding, attn_mask, *numbers)
    if wants_gradient(query, key, value, attn_mask):
        return Attention.apply(query, key, value, padding, attn_mask, *numbers)
    return ops.forward(query, key, value, padding, attn_mask, *numbers)[:2]


def run_qkvpacked(
    qkv: Tensor,
    padding: Tensor | None,
    key_lengths: Tensor | None,
    options: KernelOptions,
    packing: Packing | None,
) -> tuple[Tensor, Tensor]:
    """Compute one checked qkv buffer: (out in the padded form, lse2)."""
    if options.scale <= 0 or torch._C._are_functorch_transforms_active():
        call = Arguments(*split_qkv(qkv), padding, None, Options(), packing, key_lengths)
        return run(call, options)
    cu_q, cu_k, max_q, max_k = packing or (None, None, qkv.shape[1], qkv.shape[1])
    cu_q, cu_k = distinct(cu_q, cu_k)
    seed = dropout_seed(qkv, options)
    shared = padding, None, seed, cu_q, cu_k, key_lengths, None, max_q, max_k, *options
    if wants_gradient(qkv):
        return AttentionQKVPacked.apply(qkv, *shared)
    return ops.forward(*split_qkv(qkv), *shared)[:2]


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd must know of the call; a Function that nobody asks for a gradient costs a third of its time.

    Forward mode counts, since only the Function refuses it, and so does a trace, which may be run with other tensors.
    """
    if forward_ad._current_level >= 0 or torch.jit.is_tracing():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def distinct(*tensors: Tensor | None) -> list[Any]:
    """The tensors, a repeated one as a view of itself: torch.compile refuses a Function's argument given twice."""
    kept: list[Tensor | None] = []
    for tensor in tensors:
        repeated = tensor is not None and any(tensor is other for other in kept)
        kept.append(tensor.view_as(tensor) if repeated and tensor is not None else tensor)
    return kept


def dropout_seed(like: Tensor, options: KernelOptions) -> Tensor | None:
    """[1] int64 drawn on the device by torch's generator: follows manual_seed, checkpointing and graph replay."""
    if options.dropout_p == 0:
        return None
    return torch.randint(2**62, (1,), device=like.device)
