"""The readable oracle: masked attention in plain torch operations, on any device and in any dtype.

It says what the kernel must compute, and is tested on its own. fp16 and bf16 inputs are computed in fp32 and rounded
once at the end; fp32 and fp64 are computed as they come.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from padfree._arguments import Arguments, Options, Packing, Window, padding_rows, under_autocast
from padfree._checks import check_attention, check_varlen


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    key_lengths: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    window: Window = None,
    skip_padded_queries: bool = False,
    return_lse: bool = False,
    dropout_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query @ keyᵀ + attn_mask) @ value over the visible keys; see `padfree.attention`.

    `dropout_mask` (bool, broadcastable to [B, H, M, N], True = dropped) replaces the random draw, so that a known mask
    can be replayed. Unlike the kernel this keeps the [B, H, M, N] scores in memory, and it can be differentiated twice.
    """
    query, key, value, attn_mask = under_autocast(query, key, value, attn_mask)
    options = Options(dropout_p, scale, window, skip_padded_queries, bool(return_lse))
    check_attention(query, key, value, key_padding_mask, attn_mask, options, key_lengths)
    padding = padding_rows(key_padding_mask)
    call = Arguments(query, key, value, padding, attn_mask, options, key_lengths=key_lengths)
    out, lse = attend(call.with_padding(), dropout_mask)
    return out if lse is None else (out, lse)


def reference_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    window: Window = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`reference` on each sequence of a packed batch in turn; see `padfree.attention_varlen`."""
    query, key, value = under_autocast(query, key, value)
    options = Options(dropout_p, scale, window, return_lse=bool(return_lse))
    packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    check_varlen(query, key, value, packing, options)
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    out, lse = attend_sequences(attend, Arguments(query, key, value, None, None, options), packing)
    out = out[0].transpose(0, 1)
    return out if lse is None else (out, lse[0])


def attend(call: Arguments, dropout_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """out [B, H, M, D] of one padded call, and the LSE [B, H, M] where its options ask for it."""
    query, attn_mask, dropout_p = call.query, call.attn_mask, call.options.dropout_p
    dtype, work = query.dtype, torch.promote_types(query.dtype, torch.float32)
    visible = visible_keys(call)
    live = visible.any(dim=-1, keepdim=True)
    query = query.masked_fill(~live, 0)
    key, value = (without_padding(x, call.padding) for x in (call.key, call.value))
    key, value = (x.to(work) for x in heads_of_queries(query, key, value))

    with full_precision(query):
        scores = scale_of(query, call.options.scale) * (query.to(work) @ key.transpose(-2, -1))
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask.to(work)
    scores = scores.masked_fill(~visible, -math.inf)

    row_max = (
        scores.detach().amax(dim=-1, keepdim=True) if key.shape[2] else scores.new_zeros(*scores.shape[:3], 1)
    )
    exps = torch.exp(scores - row_max.masked_fill(~live, 0))
    row_sum = exps.sum(dim=-1, keepdim=True).masked_fill(~live, 1)
    probs = exps / row_sum
    if dropout_mask is None and dropout_p > 0:
        dropout_mask = torch.rand(probs.shape, device=probs.device) < dropout_p
    if dropout_mask is not None:
        probs = probs.masked_fill(dropout_mask, 0) / (1 - dropout_p)
    with full_precision(query):
        out = (probs @ value).masked_fill(~live, 0).to(dtype)
    if not call.options.return_lse:
        return out, None
    lse = (row_max + torch.log(row_sum)).masked_fill(~live, -math.inf).squeeze(-1)
    return out, lse.to(torch.promote_types(torch.float32, work))


def attend_sequences(
    attend: Callable[[Arguments], tuple[Tensor, Tensor | None]], call: Arguments, packing: Packing
) -> tuple[Tensor, Tensor | None]:
    """`attend` on each sequence of a packed call in turn, the results put together end to end."""
    # [T, H, D], as the caller has them: gradients come out in the layout in which the sequences are cut.
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in call[:3])
    rows, heads, head_dim = query.shape
    outs, lses = [], []
    # An empty sequence first, so that gradients reach the inputs where there is no other.
    q_ends, k_ends = ([0, *ends.tolist()] for ends in (packing.cu_seqlens_q, packing.cu_seqlens_k))
    for (q0, q1), (k0, k1) in zip(pairwise(q_ends), pairwise(k_ends), strict=True):
        q_stop, k_stop = min(q1, q0 + packing.max_seqlen_q), min(k1, k0 + packing.max_seqlen_k)
        one = query[q0:q_stop], key[k0:k_stop], value[k0:k_stop]
        q, k, v = (x.transpose(0, 1)[None] for x in one)
        out, lse = attend(Arguments(q, k, v, None, None, call.options))
        outs += [out.transpose(1, 2), query.new_zeros(1, q1 - q_stop, heads, head_dim)]
        if lse is not None:
            lses += [lse, lse.new_full((1, heads, q1 - q_stop), -math.inf)]
    tail = rows - int(packing.cu_seqlens_q[-1])
    out = torch.cat([*outs, query.new_zeros(1, tail, heads, head_dim)], dim=1).transpose(1, 2)
    if not lses:
        return out, None
    return out, torch.cat([*lses, lses[0].new_full((1, heads, tail), -math.inf)], dim=2)


def visible_keys(call: Arguments) -> Tensor:
    """bool, broadcastable to [B, H, M, N] with all N keys, True where a query sees a key."""
    query, key, _, padding, attn_mask, options, *_ = call
    rows, keys = query.shape[2], key.shape[2]
    visible = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=query.device)
    if options.window is not None:
        visible = visible & in_window(rows, keys, options.window, query.device)
    if attn_mask is not None:
        visible = visible & (~attn_mask if attn_mask.dtype == torch.bool else attn_mask != -math.inf)
    if padding is not None:
        visible = visible & ~padding[:, None, None, :]
        if options.skip_padded_queries:
            visible = visible & ~padding[:, None, :, None]
    return visible


def in_window(rows: int, keys: int, window: tuple[int | None, int | None], device: torch.device) -> Tensor:
    """[rows, keys] bool, True where row - left <= key <= row + right; None leaves a side open."""
    # No side reaches beyond the longer one; larger numbers would leave 64 bits.
    left, right = (math.inf if side is None else min(side, max(rows, keys)) for side in window)
    distance = torch.arange(keys, device=device)[None, :] - torch.arange(rows, device=device)[:, None]
    return (distance >= -left) & (distance <= right)


def without_padding(x: Tensor, padding: Tensor | None) -> Tensor:
    """Keys or values with 0 for padding: it may hold NaN, and a weight of 0 times NaN is NaN."""
    return x if padding is None else torch.where(padding[:, None, :, None], 0, x)


def heads_of_queries(query: Tensor, *kv: Tensor) -> tuple[Tensor, ...]:
    """Keys and values [B, H_kv, N, D] with each head repeated for the queries of its group: [B, H, N, D]."""
    group = query.shape[1] // max(kv[0].shape[1], 1)
    # Repeated once too: it makes them contiguous, and the last bits of a product depend on the strides.
    return tuple(x.repeat_interleave(group, dim=1) for x in kv)


def scale_of(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def full_precision(query: Tensor) -> AbstractContextManager[Any]:
    """Keep a surrounding autocast away from products whose dtype is part of the contract."""
    # A meta tensor knows no autocast; torch 2.11's compiler cannot ask `is_autocast_available`.
    return nullcontext() if query.is_meta else torch.autocast(query.device.type, enabled=False)
