"""The operators padfree::forward and padfree::backward, opaque to torch.compile and export.

All tensors are in the padded form of `call.Call`. This is the only file that knows torch.library; `autograd` joins the
operators.
"""

from typing import Any

import torch
from torch import Tensor

from padfree._arguments import split_qkv
from padfree._triton.backward import launch_backward
from padfree._triton.call import Call, heads_last
from padfree._triton.forward import launch_forward
from padfree._triton.single_query import launch_single_query_forward

SHARED_SCHEMA = (
    "Tensor? padding, Tensor? attn_mask, Tensor? seed, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? key_lengths, Tensor? spans, "
    "SymInt max_q, SymInt max_k, float scale, float dropout_p, int left, int right, bool skip_padded_queries"
)
# How many of the operator's arguments are tensors, which come first: query to spans.
TENSORS = 10
BACKWARD_SCHEMA = "Tensor out, Tensor lse2, Tensor d_out, Tensor? d_lse2"

library = torch.library.Library("padfree", "DEF")
library.define(
    f"forward(Tensor query, Tensor key, Tensor value, {SHARED_SCHEMA}) -> (Tensor, Tensor, Tensor)"
)
library.define(
    f"backward({BACKWARD_SCHEMA}, Tensor query, Tensor key, Tensor value, {SHARED_SCHEMA}, bool attn_mask_gradient)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
library.define(f"backward_qkvpacked({BACKWARD_SCHEMA}, Tensor qkv, {SHARED_SCHEMA}) -> Tensor")


def _forward(*call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse2, and what was found in the padding mask ([B,3] int32, or empty), to be given as `spans` to the backward."""
    described = Call(*call)
    launch = launch_single_query_forward if described.max_q == 1 else launch_forward
    out, lse2, found = launch(described)
    return out, lse2, _no_spans(out) if found is None else found


def _no_spans(like: Tensor) -> Tensor:
    return like.new_empty((0, 3), dtype=torch.int32)


def _backward(
    out: Tensor, lse2: Tensor, d_out: Tensor, d_lse2: Tensor | None, *call: Any
) -> tuple[Tensor, ...]:
    *arguments, attn_mask_gradient = call
    described = Call(*arguments)
    query, key, value, _padding, attn_mask = arguments[:5]
    grads = described.empty_like(query), described.empty_like(key), described.empty_like(value)
    d_attn_mask = attn_mask.new_empty(attn_mask.shape) if attn_mask_gradient else None
    launch_backward(described, out, lse2, d_out, d_lse2, grads, d_attn_mask)
    return *grads, lse2.new_empty(0) if d_attn_mask is None else d_attn_mask


def _backward_qkvpacked(
    out: Tensor, lse2: Tensor, d_out: Tensor, d_lse2: Tensor | None, qkv: Tensor, *options: Any
) -> Tensor:
    d_qkv = qkv.new_zeros(qkv.shape) if qkv.ndim == 4 else qkv.new_empty(qkv.shape)
    launch_backward(Call(*split_qkv(qkv), *options), out, lse2, d_out, d_lse2, split_qkv(d_qkv))
    return d_qkv


def _forward_fake(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    padding, spans = rest[2], rest[TENSORS - 2]
    found = _no_spans(query)
    if padding is not None and spans is None:
        found = found.new_empty((query.shape[0], 3))
    return heads_last(query), query.new_empty(query.shape[:3], dtype=torch.float32), found


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
