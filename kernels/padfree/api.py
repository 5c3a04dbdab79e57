"""The entry point for padded batches: check the call, choose who computes it, hand it on."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from padfree import _checks
from padfree._arguments import Arguments, Options, Window, padding_of, padding_rows, under_autocast
from padfree._dispatch import Impl, compute
from padfree.reference import full_precision, heads_of_queries, scale_of, without_padding


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    key_lengths: Tensor | None = None,
    key_spans: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    window: Window = None,
    skip_padded_queries: bool = False,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query @ keyᵀ + attn_mask) @ value over the keys that are not padding.

    Args:
        query: [B, H, M, D], fp32, fp16 or bf16 (on a CPU also fp64), any strides; D from 1 to 256. `torch.autocast`
            casts it, key, value and attn_mask to its dtype, as it does for SDPA.
        key, value: [B, H_kv, N, D] with query's dtype; H_kv divides H (grouped key/value heads).
        key_padding_mask: bool [B, N], [B, 1, N] or [B, 1, 1, N], **True = padding** as in `nn.MultiheadAttention`; any
            pattern. What stands in padded keys and values, NaN included, changes no bit of any result.
        key_lengths: int32 [B] on query's device, in place of a mask for padding on the right: keys at key_lengths[b] or
            beyond are padding. The kernel then reads no mask. As in FlashAttention's `seqused_k` the values are not read on
            the host, so a wrong one cannot be reported: below 0 it counts as 0, beyond N as N.
        key_spans: int32 [B, 3], what `padfree.key_spans` makes of key_padding_mask, which no program then searches for
            its ends. Values that do not belong to the mask give wrong results, but read nothing that is not there.
        attn_mask: broadcastable to [B, H, M, N]. bool: **True = not allowed**, also as in `nn.MultiheadAttention`.
            Float: added to the scores, and differentiable. Unlike padding, a key hidden this way must hold finite
            numbers.
        dropout_p: probability of dropping a weight, in [0, 1); drawn from torch's generator.
        scale: factor on the scores; D**-0.5 when None.
        window: (left, right): query i sees keys i - left .. i + right, and None leaves a side open, so `(None, 0)` is
            causal, aligned at the top left as SDPA's `is_causal`.
        skip_padded_queries: for self-attention only: rows at padded positions are not computed; they come out 0 with
            LSE -inf and zero gradient.
        return_lse: also return the log of the softmax denominator, differentiable.
        impl: "triton" runs the kernel or raises; "reference" runs plain torch; "auto" runs the kernel on a GPU, and on
            a CPU, also under TRITON_INTERPRET=1, PyTorch's SDPA with the same contract where that can compute the call
            and the reference where not. An explicit choice never falls back.

    Returns:
        out [B, H, M, D] in query's dtype, which the kernel holds in memory as [B, M, H, D]; with `return_lse` also
        lse [B, H, M], fp32, natural log. A row with no visible key is exactly 0, with LSE -inf and zero gradients.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: impl="triton" cannot run here; the message says why (see `why_not`).

    Example:
        >>> hidden = padfree.attention(q, k, v, tokens == pad_id)   # q, k, v: [B, H, S, D]
    """
    query, key, value, attn_mask = under_autocast(query, key, value, attn_mask)
    options = Options(dropout_p, scale, window, skip_padded_queries, return_lse)
    _checks.check_attention(query, key, value, key_padding_mask, attn_mask, options, key_lengths, key_spans)
    padding = padding_rows(key_padding_mask)
    call = Arguments(query, key, value, padding, attn_mask, options, None, key_lengths, key_spans)
    out, lse = compute(call, impl)
    return out if lse is None else (out, lse)


def attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    key_lengths: Tensor | None = None,
    rows: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """exp(scale * query[rows] @ keyᵀ - lse[rows]): the weights of chosen rows, recomputed from the LSE.

    Args:
        query, key: as given to `attention`, [B, H, M, D] and [B, H_kv, N, D].
        lse: [B, H, M] as returned by `attention(..., return_lse=True)`.
        key_padding_mask, key_lengths: as given to `attention`.
        rows: query positions (int64 tensor or list); all of them when None. `[0]` is the CLS row, which explains a
            prediction.
        scale: as given to `attention`.

    Returns:
        [B, H, len(rows), N] fp32, the weights before dropout, without `attn_mask` or `window`. Padded keys are exactly
        0, and so are rows with no visible key.

    Raises:
        TypeError, ValueError: as `attention`.
    """
    query, key = under_autocast(query, key)
    _checks.check_attention(query, key, key, key_padding_mask, None, Options(scale=scale), key_lengths)
    _checks.check_lse(lse, query)
    picked = _checks.check_rows(range(query.shape[2]) if rows is None else rows, query)
    padding = padding_rows(key_padding_mask)
    if key_lengths is not None:
        padding = padding_of(key_lengths, key.shape[2])

    lse = lse[:, :, picked, None]
    live = lse != -math.inf
    query = query[:, :, picked].masked_fill(~live, 0).to(lse.dtype)
    (key,) = heads_of_queries(query, without_padding(key, padding))
    with full_precision(query):
        scores = scale_of(query, scale) * (query @ key.to(lse.dtype).transpose(-2, -1))
    weights = torch.exp(scores - lse.masked_fill(~live, 0)).masked_fill(~live, 0)
    return weights if padding is None else weights.masked_fill(padding[:, None, None, :], 0)


def key_spans(key_padding_mask: Tensor) -> Tensor:
    """Where the visible keys of each sequence lie, found once for a mask that many calls of `attention` share.

    Args:
        key_padding_mask: bool [B, N], [B, 1, N] or [B, 1, 1, N], True = padding.

    Raises:
        TypeError, ValueError: it is no such mask.

    Returns:
        [B, 3] int32: the first visible key, the end of the visible keys, and whether padding lies between (1 or 0). A
        sequence without a visible key has (0, 0, 0).
    """
    _checks.check_padding_mask(key_padding_mask)
    padding = padding_rows(key_padding_mask)
    assert padding is not None
    if padding.shape[1] == 0:
        return padding.new_zeros((padding.shape[0], 3), dtype=torch.int32)
    position = torch.arange(1, padding.shape[1] + 1, dtype=torch.int32, device=padding.device)
    visible = torch.where(padding, 0, position)
    stop = visible.amax(1)
    first = torch.where(padding, stop[:, None], position - 1).amin(1)
    holes = (visible != 0).sum(1, dtype=torch.int32) < stop - first
    return torch.stack((first, stop, holes.to(torch.int32)), 1)
