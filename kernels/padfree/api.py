"""The entry point for padded batches: check the call, choose who computes it, hand it on."""

import math
from collections.abc import Sequence

from torch import Tensor

from padfree import _checks
from padfree._checks import Window
from padfree._dispatch import Impl, choose_impl
from padfree._sdpa import sdpa_attention, sdpa_serves
from padfree.reference import attention_weights_reference, reference, under_autocast

LN2 = math.log(2)


def attention(
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
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query @ keyᵀ + attn_mask) @ value over the keys that are not padding.

    Args:
        query: [B, H, M, D], fp32, fp16 or bf16 (on a CPU also fp64), any strides; D from 1 to 256.
            `torch.autocast` casts it, key, value and attn_mask to its dtype, as it does for SDPA.
        key, value: [B, H_kv, N, D] with query's dtype; H_kv divides H (grouped key/value heads).
        key_padding_mask: bool [B, N], [B, 1, N] or [B, 1, 1, N], **True = padding** as in
            `nn.MultiheadAttention`; any pattern. What stands in padded keys and values, NaN included,
            changes no bit of any result.
        attn_mask: broadcastable to [B, H, M, N]. bool: **True = not allowed**, also as in
            `nn.MultiheadAttention`. Float: added to the scores, and differentiable. Unlike padding, a key
            hidden this way must hold finite numbers.
        dropout_p: probability of dropping a weight, in [0, 1); drawn from torch's generator.
        scale: factor on the scores; D**-0.5 when None.
        window: (left, right): query i sees keys i - left .. i + right, None leaves a side open, so
            `(None, 0)` is causal, aligned at the top left as SDPA's `is_causal`.
        skip_padded_queries: self-attention only: rows at padded positions are not computed; they come out
            0 with LSE -inf and zero gradient.
        return_lse: also return the log of the softmax denominator, differentiable.
        impl: "triton" runs the kernel or raises; "reference" runs plain torch; "auto" runs the kernel on a GPU,
            and on a CPU, also under TRITON_INTERPRET=1, PyTorch's SDPA with the same contract where that can
            compute the call and the reference where not. An explicit choice never falls back.

    Returns:
        out [B, H, M, D] in query's dtype, which the kernel holds in memory as [B, M, H, D]; with `return_lse` also
        lse [B, H, M], fp32, natural log. A row with no visible key is exactly 0, with LSE -inf and zero
        gradients.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: impl="triton" cannot run here; the message says why (see `why_not`).

    Example:
        >>> hidden = padfree.attention(q, k, v, tokens == pad_id)   # q, k, v: [B, H, S, D]
    """
    query, key, value, attn_mask = under_autocast(query, key, value, attn_mask)
    _checks.check_attention(
        query, key, value, key_padding_mask, attn_mask, dropout_p, scale, window, skip_padded_queries
    )
    _checks.check_flag("return_lse", return_lse)
    padding = _checks.padding_rows(key_padding_mask)
    chosen = choose_impl(impl, query)
    if (
        impl == "auto"
        and chosen == "reference"
        and sdpa_serves(query, key, attn_mask, dropout_p, scale, return_lse)
    ):
        return sdpa_attention(query, key, value, padding, attn_mask, scale, window, skip_padded_queries)
    if chosen == "reference":
        return reference(
            query,
            key,
            value,
            key_padding_mask,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            scale=scale,
            window=window,
            skip_padded_queries=skip_padded_queries,
            return_lse=return_lse,
        )
    from padfree._triton.operators import Options, run

    options = Options.of(query, scale, dropout_p, window, skip_padded_queries)
    out, lse2 = run(query, key, value, padding, attn_mask, options)
    return (out, lse2 * LN2) if return_lse else out


def attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    rows: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """exp(scale * query[rows] @ keyᵀ - lse[rows]): the weights of chosen rows, recomputed from the LSE.

    Args:
        query, key: as given to `attention`, [B, H, M, D] and [B, H_kv, N, D].
        lse: [B, H, M] as returned by `attention(..., return_lse=True)`.
        key_padding_mask: as given to `attention`, True = padding.
        rows: query positions (int64 tensor or list); all of them when None. `[0]` is the CLS row,
            which explains a prediction.
        scale: as given to `attention`.

    Returns:
        [B, H, len(rows), N] fp32; padded keys are exactly 0, and so are rows with no visible key. Weights
        before dropout; without `attn_mask` or `window`.

    Raises:
        TypeError, ValueError: as `attention`.
    """
    query, key = under_autocast(query, key)
    _checks.check_attention(query, key, key, key_padding_mask, None, 0.0, scale, None, False)
    _checks.check_lse(lse, query)
    picked = _checks.check_rows(range(query.shape[2]) if rows is None else rows, query)
    padding = _checks.padding_rows(key_padding_mask)
    return attention_weights_reference(query, key, lse, padding, picked, scale)
