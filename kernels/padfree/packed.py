"""The entry points for packed sequences and for one fused QKV buffer."""

from torch import Tensor

from padfree import _checks
from padfree._arguments import Arguments, Options, Packing, Window, padding_rows, split_qkv, under_autocast
from padfree._dispatch import LN2, Impl, choose_impl, compute
from padfree._sdpa import attend_without_kernel


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
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32, non-decreasing, from 0. Their values are not read on the host, so a
            wrong value cannot be reported.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths; what lies beyond them in a sequence takes no part, and
            the kernel leaves its rows 0, with zero gradient.
        dropout_p, scale, window, return_lse, impl: as in `attention`.

    Returns:
        out [T_q, H, D]; with `return_lse` also lse [H, T_q] fp32.

    Raises:
        TypeError, ValueError, RuntimeError: as `attention`.
    """
    query, key, value = under_autocast(query, key, value)
    options = Options(dropout_p, scale, window, return_lse=return_lse)
    packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    _checks.check_varlen(query, key, value, packing, options)
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    out, lse = compute(Arguments(query, key, value, None, None, options, packing), impl)
    out = out[0].transpose(0, 1)
    return out if lse is None else (out, lse[0])


def attention_qkvpacked(
    qkv: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    key_lengths: Tensor | None = None,
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
        qkv: [B, S, 3, H, D] with an optional `key_padding_mask` or `key_lengths`, or packed [T, 3, H, D] with `cu_seqlens`
            [B + 1] int32 and `max_seqlen`. Any strides.
        key_padding_mask, key_lengths, dropout_p, scale, window, skip_padded_queries, return_lse, impl: as in `attention`.

    Returns:
        out [B, S, H, D] or [T, H, D]; with `return_lse` also lse [B, H, S] or [H, T] fp32.

    Raises:
        TypeError, ValueError, RuntimeError: as `attention`.
    """
    (qkv,) = under_autocast(qkv)
    options = Options(dropout_p, scale, window, skip_padded_queries, return_lse)
    _checks.check_qkvpacked(qkv, key_padding_mask, key_lengths, cu_seqlens, max_seqlen, options)
    padding, packing = padding_rows(key_padding_mask), None
    if cu_seqlens is not None and max_seqlen is not None:
        packing = Packing(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    lse: Tensor | None
    if choose_impl(impl, qkv) == "reference":
        cut = split_qkv(qkv) if packing is None else (x.transpose(0, 1)[None] for x in qkv.unbind(1))
        query, key, value = cut
        call = Arguments(query, key, value, padding, None, options, packing, key_lengths)
        out, lse = attend_without_kernel(call, impl)
    else:
        from padfree._triton.autograd import KernelOptions, run_qkvpacked

        kernel_options = KernelOptions.of(qkv, scale, dropout_p, window, skip_padded_queries)
        out, lse2 = run_qkvpacked(qkv, padding, key_lengths, kernel_options, packing)
        lse = lse2 * LN2 if return_lse else None
    out = out.transpose(1, 2)
    if packing is not None:
        out, lse = out[0], None if lse is None else lse[0]
    return out if lse is None else (out, lse)
