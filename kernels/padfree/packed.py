"""The entry point for packed sequences and for one fused QKV buffer."""

from functools import partial
from typing import Any

from torch import Tensor

from padfree import _checks
from padfree._checks import Window
from padfree._dispatch import Impl, choose_impl
from padfree.api import LN2, attention
from padfree.reference import sequence_by_sequence, under_autocast


def attention_varlen(
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
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q_b @ k_bᵀ) @ v_b for every sequence b of a batch packed end to end.

    Args:
        query: [T_q, H, D]; sequence b is rows cu_seqlens_q[b] to cu_seqlens_q[b + 1]. Any strides.
        key, value: [T_k, H_kv, D], likewise by cu_seqlens_k.
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32, non-decreasing, from 0. Their values are not read on the
            host, so a wrong value cannot be reported.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths; what lies beyond them in a sequence takes no part, and
            the kernel leaves its rows 0, with zero gradient.
        dropout_p, scale, window, return_lse, impl: as in `attention`.

    Returns:
        out [T_q, H, D]; with `return_lse` also lse [H, T_q] fp32.

    Raises:
        TypeError, ValueError, RuntimeError: as `attention`.
    """
    query, key, value = under_autocast(query, key, value)
    _checks.check_varlen(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, scale, window
    )
    _checks.check_flag("return_lse", return_lse)
    if choose_impl(impl, query) == "reference":
        attend = partial(
            attention, dropout_p=dropout_p, scale=scale, window=window, return_lse=return_lse, impl=impl
        )
        return sequence_by_sequence(
            attend, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        )
    from padfree._triton.operators import Options, Packing, run

    options = Options.of(query, scale, dropout_p, window, False)
    packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    out, lse2 = run(query, key, value, None, None, options, packing)
    out = out[0].transpose(0, 1)
    return (out, lse2[0] * LN2) if return_lse else out


def attention_qkvpacked(
    qkv: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    window: Window = None,
    skip_padded_queries: bool = False,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Self-attention on one buffer that holds query, key and value; its gradient is one buffer alike.

    Args:
        qkv: [B, S, 3, H, D] with an optional `key_padding_mask`, or packed [T, 3, H, D] with `cu_seqlens`
            [B + 1] int32 and `max_seqlen`. Any strides.
        key_padding_mask, dropout_p, scale, window, skip_padded_queries, return_lse, impl: as in `attention`.

    Returns:
        out [B, S, H, D] or [T, H, D]; with `return_lse` also lse [B, H, S] or [H, T] fp32.

    Raises:
        TypeError, ValueError, RuntimeError: as `attention`.
    """
    (qkv,) = under_autocast(qkv)
    _checks.check_qkvpacked(
        qkv, key_padding_mask, cu_seqlens, max_seqlen, dropout_p, scale, window, skip_padded_queries
    )
    _checks.check_flag("return_lse", return_lse)
    if choose_impl(impl, qkv) == "reference":
        shared: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale, "window": window, "impl": impl}
        if cu_seqlens is not None and max_seqlen is not None:
            q, k, v = qkv.unbind(1)
            return attention_varlen(
                q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, return_lse=return_lse, **shared
            )
        shared["skip_padded_queries"] = skip_padded_queries
        result = attention(*_checks.split_qkv(qkv), key_padding_mask, return_lse=return_lse, **shared)
        if isinstance(result, tuple):
            return result[0].transpose(1, 2), result[1]
        return result.transpose(1, 2)
    from padfree._triton.operators import Options, Packing, run_qkvpacked

    options = Options.of(qkv, scale, dropout_p, window, skip_padded_queries)
    packing = None
    if cu_seqlens is not None and max_seqlen is not None:
        packing = Packing(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    out, lse2 = run_qkvpacked(qkv, _checks.padding_rows(key_padding_mask), options, packing)
    out = out.transpose(1, 2)
    if packing is not None:
        out, lse2 = out[0], lse2[0]
    return (out, lse2 * LN2) if return_lse else out
