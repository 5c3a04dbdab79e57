"""Everything a caller can get wrong, refused before any launch with the argument's name, the rule and what came."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Window = tuple[int | None, int | None] | None

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOAT_DTYPES = (*KERNEL_DTYPES, torch.float64)
MAX_HEAD_DIM = 256
MAX_LENGTH = 2**30  # keeps positions plus a tile in 32 bits
SMALLEST_SCALE = 1e-30  # keeps scale and its reciprocal normal numbers of fp32
MAX_DROPOUT = 1 - 2**-20  # 1 - p must not round to 0 in fp32


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
    window: Window,
    skip_padded_queries: bool,
) -> None:
    """Raise TypeError or ValueError unless these arguments describe one padded attention call."""
    _check_qkv(query, key, value, dims=4, layout="[B, H, S, D]")
    batch, heads, rows, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    if key.shape[0] != batch:
        raise ValueError(f"key must have query's batch size {batch}, got {key.shape[0]}")
    _check_heads(heads, kv_heads)
    for name, length in (("query", rows), ("key", keys)):
        if length > MAX_LENGTH:
            raise ValueError(f"{name} must have at most 2**30 positions, got {length}")
    if key_padding_mask is not None:
        check_padding_mask(key_padding_mask, batch, keys, query.device)
    if attn_mask is not None:
        _check_attn_mask(attn_mask, (batch, heads, rows, keys), query)
    check_flag("skip_padded_queries", skip_padded_queries)
    if skip_padded_queries and rows != keys and key_padding_mask is not None:
        raise ValueError(
            f"skip_padded_queries needs self-attention: as many queries as keys, got {rows} queries and {keys} keys"
        )
    check_options(dropout_p, scale, window)


def check_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    scale: float | None,
    window: Window,
) -> None:
    """Raise TypeError or ValueError unless these arguments describe one packed attention call.

    The values inside `cu_seqlens` are not read: that would make the host wait for the device.
    """
    _check_qkv(query, key, value, dims=3, layout="[T, H, D]")
    _check_heads(query.shape[1], key.shape[1])
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query.device)
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, query.device)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k must name as many sequences as cu_seqlens_q, {cu_seqlens_q.numel() - 1}, "
            f"got {cu_seqlens_k.numel() - 1}"
        )
    check_length("max_seqlen_q", max_seqlen_q)
    check_length("max_seqlen_k", max_seqlen_k)
    check_options(dropout_p, scale, window)


def check_qkvpacked(
    qkv: Any,
    key_padding_mask: Any,
    cu_seqlens: Any,
    max_seqlen: Any,
    dropout_p: float,
    scale: float | None,
    window: Window,
    skip_padded_queries: bool,
) -> None:
    """Raise TypeError or ValueError unless these arguments describe one call on a fused buffer."""
    _check_tensor("qkv", qkv)
    if qkv.ndim not in (4, 5) or qkv.shape[-3] != 3:
        raise ValueError(f"qkv must have shape [B, S, 3, H, D] or [T, 3, H, D], got {list(qkv.shape)}")
    _check_dtype_and_head_dim("qkv", qkv)
    packed = cu_seqlens is not None
    if qkv.ndim == 4 and not packed:
        raise ValueError(f"qkv [T, 3, H, D] needs cu_seqlens, got qkv {list(qkv.shape)} and cu_seqlens None")
    if qkv.ndim == 5 and packed:
        raise ValueError(f"cu_seqlens goes with qkv [T, 3, H, D], got qkv {list(qkv.shape)}")
    if packed:
        check_cu_seqlens("cu_seqlens", cu_seqlens, qkv.device)
        if max_seqlen is None:
            raise ValueError("max_seqlen must be given with cu_seqlens, got None")
        check_length("max_seqlen", max_seqlen)
        if key_padding_mask is not None:
            raise ValueError(
                "key_padding_mask must be None with cu_seqlens: packed sequences hold no padding"
            )
    elif max_seqlen is not None:
        raise ValueError(f"max_seqlen goes with cu_seqlens, got max_seqlen {max_seqlen!r} and no cu_seqlens")
    if key_padding_mask is not None:
        check_padding_mask(key_padding_mask, qkv.shape[0], qkv.shape[1], qkv.device)
    check_flag("skip_padded_queries", skip_padded_queries)
    check_options(dropout_p, scale, window)


def check_options(dropout_p: Any, scale: Any, window: Any) -> None:
    """The options that every entry shares."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, int | float):
        raise TypeError(f"dropout_p must be a float, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p <= MAX_DROPOUT:
        raise ValueError(f"dropout_p must lie in 0..{MAX_DROPOUT:.6f}, got {dropout_p}")
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise TypeError(f"scale must be a float or None, got {type(scale).__name__}")
        # Comparisons only, which torch.compile can trace for a scale that varies.
        if not (scale == 0 or SMALLEST_SCALE <= abs(scale) <= 1 / SMALLEST_SCALE):
            raise ValueError(
                f"scale must be finite: 0 or {SMALLEST_SCALE} to {1 / SMALLEST_SCALE} in size, got {scale}"
            )
    if window is not None:
        if not isinstance(window, tuple) or len(window) != 2:
            raise TypeError(f"window must be None or a pair (left, right), got {window!r}")
        for side in window:
            if side is not None and (isinstance(side, bool) or not isinstance(side, int)):
                raise TypeError(f"window's sides must be int or None, got {window!r}")
            if side is not None and side < 0:
                raise ValueError(f"window's sides must be None or at least 0, got {window!r}")


def check_padding_mask(mask: Any, batch: int, keys: int, device: torch.device) -> None:
    """bool [B, N], [B, 1, N] or [B, 1, 1, N]; True = padding."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"key_padding_mask must be a bool tensor or None, got {type(mask).__name__}")
    _check_tensor("key_padding_mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(
            f"key_padding_mask must be bool with True = padding, got {mask.dtype}; "
            "for a 0/1 mask whose 1 means keep, pass `mask == 0`"
        )
    shapes = [(batch, keys), (batch, 1, keys), (batch, 1, 1, keys)]
    if tuple(mask.shape) not in shapes:
        wanted = " or ".join(str(list(s)) for s in shapes)
        raise ValueError(f"key_padding_mask must have shape {wanted}, got {list(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"key_padding_mask must be on query's device {device}, got {mask.device}")


def check_cu_seqlens(name: str, cu_seqlens: Any, device: torch.device) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name} must be an int32 tensor, got {type(cu_seqlens).__name__}")
    _check_tensor(name, cu_seqlens)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"{name} must have shape [B + 1], got {list(cu_seqlens.shape)}")
    if cu_seqlens.device != device:
        raise ValueError(f"{name} must be on query's device {device}, got {cu_seqlens.device}")
    if cu_seqlens.numel() > 1 and cu_seqlens.stride(0) != 1:
        raise ValueError(f"{name} must be contiguous, got stride {cu_seqlens.stride(0)}")


def check_length(name: str, length: Any) -> None:
    if isinstance(length, bool) or not isinstance(length, int | torch.SymInt):
        raise TypeError(f"{name} must be an int, got {type(length).__name__}")
    if not 0 <= length <= MAX_LENGTH:
        raise ValueError(f"{name} must lie in 0..2**30, got {length}")


def check_lse(lse: Any, query: Tensor) -> None:
    """float [B, H, M] beside query."""
    _check_tensor("lse", lse)
    if lse.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"lse must be fp32 (fp64 from the reference), got {lse.dtype}")
    if lse.shape != query.shape[:3]:
        raise ValueError(f"lse must have shape [B, H, M] = {list(query.shape[:3])}, got {list(lse.shape)}")
    if lse.device != query.device:
        raise ValueError(f"lse must be on query's device {query.device}, got {lse.device}")


def check_rows(rows: Any, query: Tensor) -> Tensor:
    """`rows` as an int64 tensor beside query. A tensor's values are not read, a sequence's are."""
    if isinstance(rows, Tensor):
        _check_tensor("rows", rows)
        if rows.dtype != torch.int64 or rows.ndim != 1:
            raise TypeError(f"rows must be 1-D int64, got {rows.dtype} of shape {list(rows.shape)}")
        return rows.to(query.device)
    if not isinstance(rows, Sequence) or any(
        isinstance(row, bool) or not isinstance(row, int) for row in rows
    ):
        raise TypeError(f"rows must be an int64 tensor or a sequence of ints, got {rows!r}")
    outside = [row for row in rows if not 0 <= row < query.shape[2]]
    if outside:
        raise ValueError(f"rows must lie in 0..{query.shape[2] - 1}, got {outside[0]}")
    return torch.tensor(rows, dtype=torch.int64, device=query.device)


def check_flag(name: str, flag: Any) -> None:
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")


def padding_rows(key_padding_mask: Tensor | None) -> Tensor | None:
    """The [B, N] view of a checked mask: the one owner of the three accepted shapes."""
    if key_padding_mask is None or key_padding_mask.ndim == 2:
        return key_padding_mask
    return key_padding_mask.flatten(1) if key_padding_mask.ndim == 3 else key_padding_mask[:, 0, 0]


def split_qkv(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, S, 3, H, D] or [T, 3, H, D] as three views in the padded form [B or 1, H, S or T, D]."""
    padded = qkv if qkv.ndim == 5 else qkv[None]
    query, key, value = padded.permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def _check_qkv(query: Any, key: Any, value: Any, *, dims: int, layout: str) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_tensor(name, tensor)
        if tensor.ndim != dims:
            raise ValueError(f"{name} must have shape {layout}, got {list(tensor.shape)}")
    _check_dtype_and_head_dim("query", query)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have query's dtype {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")
    if value.shape != key.shape:
        raise ValueError(f"value must have key's shape {list(key.shape)}, got {list(value.shape)}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have query's head_dim {query.shape[-1]}, got {key.shape[-1]}")


def _check_tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested one; packed sequences go to attention_varlen"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")


def _check_dtype_and_head_dim(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be fp32, fp16 or bf16 (fp64 for the reference), got {tensor.dtype}")
    if not 1 <= tensor.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"{name}'s head_dim must lie in 1..{MAX_HEAD_DIM}, got {tensor.shape[-1]}")


def _check_heads(heads: int, kv_heads: int) -> None:
    if (kv_heads == 0) != (heads == 0) or (kv_heads and heads % kv_heads):
        raise ValueError(f"key's heads must divide query's {heads} heads, got {kv_heads}")


def _check_attn_mask(attn_mask: Any, full: tuple[int, int, int, int], query: Tensor) -> None:
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor or None, got {type(attn_mask).__name__}")
    _check_tensor("attn_mask", attn_mask)
    if attn_mask.dtype != torch.bool and attn_mask.dtype not in FLOAT_DTYPES:
        raise TypeError(f"attn_mask must be bool (True = not allowed) or a float bias, got {attn_mask.dtype}")
    if attn_mask.dtype == torch.float64 and query.dtype != torch.float64:
        raise TypeError(
            f"attn_mask must be fp32, fp16 or bf16 where query is {query.dtype}, got {attn_mask.dtype}"
        )
    sizes = tuple(attn_mask.shape)
    if len(sizes) > 4 or any(s not in (1, f) for s, f in zip(sizes[::-1], full[::-1], strict=False)):
        raise ValueError(f"attn_mask must broadcast to [B, H, M, N] = {list(full)}, got {list(sizes)}")
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask must be on query's device {query.device}, got {attn_mask.device}")
