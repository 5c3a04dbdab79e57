"""The readable oracle: masked attention in plain torch operations, on any device and in any dtype.

It says what the kernel must compute, and is tested on its own. fp16 and bf16 inputs
are computed in fp32 and rounded once at the end; fp32 and fp64 are computed as they come.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from padfree._checks import Window, check_attention, check_varlen, padding_rows

LOWEST = float("-inf")


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    window: Window = None,
    skip_padded_queries: bool = False,
    return_lse: bool = False,
    dropout_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query @ keyᵀ + attn_mask) @ value over the visible keys; see `padfree.attention`.

    `dropout_mask` (bool, broadcastable to [B,H,M,N], True = dropped) replaces the random draw, so that a
    known mask can be replayed. Unlike the kernel this keeps the [B,H,M,N] scores in memory, and it can be
    differentiated twice.
    """
    query, key, value, attn_mask = under_autocast(query, key, value, attn_mask)
    check_attention(
        query, key, value, key_padding_mask, attn_mask, dropout_p, scale, window, skip_padded_queries
    )
    batch, heads, rows, head_dim = query.shape
    keys = key.shape[2]
    dtype = query.dtype
    work = torch.promote_types(dtype, torch.float32)
    padding = padding_rows(key_padding_mask)

    visible = visible_keys(query, key, padding, attn_mask, window, skip_padded_queries)
    live = visible.any(dim=-1, keepdim=True)
    query = query.masked_fill(~live, 0)
    key, value = (without_padding(x, padding) for x in (key, value))

    group = heads // max(key.shape[1], 1)
    key = key.repeat_interleave(group, dim=1).to(work)
    value = value.repeat_interleave(group, dim=1).to(work)
    scale = head_dim**-0.5 if scale is None else scale
    with full_precision(query):
        scores = scale * (query.to(work) @ key.transpose(-2, -1))
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask.to(work)
    scores = scores.masked_fill(~visible, LOWEST)

    row_max = scores.detach().amax(dim=-1, keepdim=True) if keys else scores.new_zeros(batch, heads, rows, 1)
    exps = torch.exp(scores - row_max.masked_fill(~live, 0))
    row_sum = exps.sum(dim=-1, keepdim=True).masked_fill(~live, 1)
    probs = exps / row_sum
    if dropout_mask is None and dropout_p > 0:
        dropout_mask = torch.rand(probs.shape, device=probs.device) < dropout_p
    if dropout_mask is not None:
        probs = probs.masked_fill(dropout_mask, 0) / (1 - dropout_p) if dropout_p < 1 else probs * 0
    with full_precision(query):
        out = (probs @ value).masked_fill(~live, 0).to(dtype)
    if not return_lse:
        return out
    lse = (row_max + torch.log(row_sum)).masked_fill(~live, LOWEST).squeeze(-1)
    return out, lse.to(torch.promote_types(torch.float32, work))


def visible_keys(
    query: Tensor,
    key: Tensor,
    padding: Tensor | None,
    attn_mask: Tensor | None,
    window: Window,
    skip_padded_queries: bool,
) -> Tensor:
    """bool, broadcastable to [B, H, M, N] with all N keys, True where a query sees a key."""
    rows, keys = query.shape[2], key.shape[2]
    visible = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=query.device)
    if window is not None:
        visible = visible & in_window(rows, keys, window, query.device)
    if attn_mask is not None:
        visible = visible & (~attn_mask if attn_mask.dtype == torch.bool else attn_mask != LOWEST)
    if padding is not None:
        visible = visible & ~padding[:, None, None, :]
        if skip_padded_queries:
            visible = visible & ~padding[:, None, :, None]
    return visible


def without_padding(x: Tensor, padding: Tensor | None) -> Tensor:
    """Keys or values with 0 for padding: it may hold NaN, and a weight of 0 times NaN is NaN."""
    return x if padding is None else torch.where(padding[:, None, :, None], 0, x)


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
    check_varlen(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, scale, window
    )
    attend = partial(reference, dropout_p=dropout_p, scale=scale, window=window, return_lse=return_lse)
    return sequence_by_sequence(
        attend, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    )


def sequence_by_sequence(
    attend: Callable[..., Tensor | tuple[Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> Tensor | tuple[Tensor, Tensor]:
    """A checked packed batch by `attend` on [1, H, length, D]: its out or (out, lse), put together end to end."""
    outs, lses = [], []
    # An empty sequence first, so that gradients reach the inputs where there is no other.
    for q0, q1, k0, k1 in _sequences([0, *cu_seqlens_q.tolist()], [0, *cu_seqlens_k.tolist()]):
        q_stop, k_stop = min(q1, q0 + max_seqlen_q), min(k1, k0 + max_seqlen_k)
        one = (query[q0:q_stop], key[k0:k_stop], value[k0:k_stop])
        result = attend(*(x.transpose(0, 1)[None] for x in one))
        out, lse = result if isinstance(result, tuple) else (result, None)
        outs += [out[0].transpose(0, 1), query.new_zeros(q1 - q_stop, *query.shape[1:])]
        if lse is not None:
            lses += [lse[0], lse.new_full((query.shape[1], q1 - q_stop), LOWEST)]
    tail = query.shape[0] - int(cu_seqlens_q[-1])
    out = torch.cat([*outs, query.new_zeros(tail, *query.shape[1:])])
    if not lses:
        return out
    return out, torch.cat([*lses, lses[0].new_full((query.shape[1], tail), LOWEST)], dim=1)


def _sequences(q_ends: list[int], k_ends: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """(first and stop row of the queries, of the keys) of each sequence."""
    for (q0, q1), (k0, k1) in zip(pairwise(q_ends), pairwise(k_ends), strict=True):
        yield q0, q1, k0, k1


def attention_weights_reference(
    query: Tensor, key: Tensor, lse: Tensor, padding: Tensor | None, rows: Tensor, scale: float | None
) -> Tensor:
    """exp(scale * query[rows] @ keyᵀ - lse[rows]) with padded keys at exactly 0: [B, H, len(rows), N]."""
    group = query.shape[1] // max(key.shape[1], 1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    picked = lse[:, :, rows, None]
    live = picked != LOWEST
    chosen = query[:, :, rows].masked_fill(~live, 0).to(lse.dtype)
    if padding is not None:
        key = key.masked_fill(padding[:, None, :, None], 0)
    with full_precision(query):
        scores = scale * (chosen @ key.repeat_interleave(group, dim=1).to(lse.dtype).transpose(-2, -1))
    weights = torch.exp(scores - picked.masked_fill(~live, 0)).masked_fill(~live, 0)
    return weights if padding is None else weights.masked_fill(padding[:, None, None, :], 0)


def computed_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that a call computes this tensor in: that of a surrounding autocast, but for fp64, as SDPA does."""
    # A meta tensor knows no autocast.
    if tensor.dtype == torch.float64 or not tensor.is_floating_point() or tensor.is_meta:
        return tensor.dtype
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def under_autocast(*tensors: Any) -> tuple[Any, ...]:
    """The arguments of a call, tensors in the dtype that it computes them in."""
    return tuple(x.to(computed_dtype(x)) if isinstance(x, Tensor) else x for x in tensors)


def full_precision(query: Tensor) -> AbstractContextManager[Any]:
    """Keep a surrounding autocast away from products whose dtype is part of the contract."""
    # A meta tensor knows no autocast; torch 2.11's compiler cannot ask `is_autocast_available`.
    return nullcontext() if query.is_meta else torch.autocast(query.device.type, enabled=False)


def in_window(rows: int, keys: int, window: tuple[int | None, int | None], device: torch.device) -> Tensor:
    """[rows, keys] bool, True where row - left <= key <= row + right; None leaves a side open."""
    # No side reaches beyond the longer one; larger numbers would leave 64 bits.
    left, right = (None if side is None else min(side, max(rows, keys)) for side in window)
    distance = torch.arange(keys, device=device)[None, :] - torch.arange(rows, device=device)[:, None]
    return (distance >= (-math.inf if left is None else -left)) & (
        distance <= (math.inf if right is None else right)
    )
