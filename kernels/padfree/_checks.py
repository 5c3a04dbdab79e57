"""Everything a caller can get wrong: it is refused before any launch with the argument's name, the rule and what came."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from padfree._arguments import Options, Packing

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOAT_DTYPES = (*KERNEL_DTYPES, torch.float64)
MAX_HEAD_DIM = 256
MAX_LENGTH = 2**30  # keeps positions plus a tile in 32 bits
SMALLEST_SCALE = 1e-30  # keeps scale and its reciprocal normal numbers of fp32
MAX_DROPOUT = 1 - 2**-20  # 1 - p must not round to 0 in fp32


def check_attention(
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    attn_mask: Any,
    options: Options,
    key_lengths: Any = None,
    key_spans: Any = None,
) -> None:
    """Raise TypeError or ValueError unless these arguments describe one padded call; `mask` is the padding mask."""
    _check_qkv(query, key, value, dims=4, layout="[B, H, S, D]")
    batch, heads, rows, _ = query.shape
    kv_batch, kv_heads, keys, _ = key.shape
    if kv_batch != batch:
        raise ValueError(f"key must have query's batch size {batch}, got {kv_batch}")
    _check_heads(heads, kv_heads)
    _check_positions("query", rows)
    _check_positions("key", keys)
    if mask is not None:
        _check_padding_mask(mask, batch, keys, query.device)
    if key_lengths is not None:
        _check_key_lengths(key_lengths, mask, batch, query.device)
    if key_spans is not None:
        if mask is None:
            raise ValueError("key_spans goes with the key_padding_mask it was made of, got none")
        _check_int32("key_spans", key_spans, [batch, 3], "[B, 3]", query.device)
    if attn_mask is not None:
        _check_attn_mask(attn_mask, (batch, heads, rows, keys), query)
    _check_flag("skip_padded_queries", options.skip_padded_queries)
    has_padding = mask is not None or key_lengths is not None
    if options.skip_padded_queries and rows != keys and has_padding:
        raise ValueError(
            f"skip_padded_queries needs self-attention: as many queries as keys, got {rows} queries and {keys} keys"
        )
    _check_options(options)


def check_varlen(query: Any, key: Any, value: Any, packing: Packing, options: Options) -> None:
    """Raise TypeError or ValueError unless these arguments describe one packed call.

    The values inside `cu_seqlens` are not read: that would make the host wait for the device.
    """
    _check_qkv(query, key, value, dims=3, layout="[T, H, D]")
    _check_heads(query.shape[1], key.shape[1])
    _check_cu_seqlens("cu_seqlens_q", packing.cu_seqlens_q, query.device)
    _check_cu_seqlens("cu_seqlens_k", packing.cu_seqlens_k, query.device)
    if packing.cu_seqlens_q.shape != packing.cu_seqlens_k.shape:
        wanted, got = packing.cu_seqlens_q.numel() - 1, packing.cu_seqlens_k.numel() - 1
        raise ValueError(f"cu_seqlens_k must name as many sequences as cu_seqlens_q, {wanted}, got {got}")
    _check_max_seqlen("max_seqlen_q", packing.max_seqlen_q)
    _check_max_seqlen("max_seqlen_k", packing.max_seqlen_k)
    _check_options(options)


def check_qkvpacked(
    qkv: Any, mask: Any, key_lengths: Any, cu_seqlens: Any, max_seqlen: Any, options: Options
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
        _check_cu_seqlens("cu_seqlens", cu_seqlens, qkv.device)
        if max_seqlen is None:
            raise ValueError("max_seqlen must be given with cu_seqlens, got None")
        _check_max_seqlen("max_seqlen", max_seqlen)
        for name, padding in (("key_padding_mask", mask), ("key_lengths", key_lengths)):
            if padding is not None:
                raise ValueError(f"{name} must be None with cu_seqlens: packed sequences hold no padding")
    elif max_seqlen is not None:
        raise ValueError(f"max_seqlen goes with cu_seqlens, got max_seqlen {max_seqlen!r} and no cu_seqlens")
    else:
        _check_positions("qkv", qkv.shape[1])
    if mask is not None:
        _check_padding_mask(mask, qkv.shape[0], qkv.shape[1], qkv.device)
    if key_lengths is not None:
        _check_key_lengths(key_lengths, mask, qkv.shape[0], qkv.device)
    _check_flag("skip_padded_queries", options.skip_padded_queries)
    _check_options(options)


def check_padding_mask(mask: Any) -> None:
    """Raise unless this is a key_padding_mask of some batch."""
    _check_tensor("key_padding_mask", mask, "a bool tensor")
    if mask.ndim < 2:
        raise ValueError(f"key_padding_mask must have shape [B, N], got {list(mask.shape)}")
    _check_padding_mask(mask, mask.shape[0], mask.shape[-1], mask.device)


def check_lse(lse: Any, query: Tensor) -> None:
    """Raise unless lse is the float [B, H, M] that belongs to query."""
    _check_tensor("lse", lse)
    if lse.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"lse must be fp32 (fp64 from the reference), got {lse.dtype}")
    if lse.shape != query.shape[:3]:
        raise ValueError(f"lse must have shape [B, H, M] = {list(query.shape[:3])}, got {list(lse.shape)}")
    _check_device("lse", lse, query.device)


def check_rows(rows: Any, query: Tensor) -> Tensor:
    """`rows` as an int64 tensor on query's device. The values of a tensor are not read, those of a sequence are."""
    if isinstance(rows, Tensor):
        _check_tensor("rows", rows)
        if rows.dtype != torch.int64 or rows.ndim != 1:
            raise TypeError(f"rows must be 1-D int64, got {rows.dtype} of shape {list(rows.shape)}")
        return rows.to(query.device)
    if not isinstance(rows, Sequence) or not all(_is_number(row, int) for row in rows):
        raise TypeError(f"rows must be an int64 tensor or a sequence of ints, got {rows!r}")
    outside = [row for row in rows if not 0 <= row < query.shape[2]]
    if outside:
        raise ValueError(f"rows must lie in 0..{query.shape[2] - 1}, got {outside[0]}")
    return torch.tensor(rows, dtype=torch.int64, device=query.device)


def _check_qkv(query: Any, key: Any, value: Any, *, dims: int, layout: str) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_tensor(name, tensor)
        if tensor.ndim != dims:
            raise ValueError(f"{name} must have shape {layout}, got {list(tensor.shape)}")
    _check_dtype_and_head_dim("query", query)
    dtype, device = query.dtype, query.device
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must have query's dtype {dtype}, got {tensor.dtype}")
        _check_device(name, tensor, device)
    if value.shape != key.shape:
        raise ValueError(f"value must have key's shape {list(key.shape)}, got {list(value.shape)}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have query's head_dim {query.shape[-1]}, got {key.shape[-1]}")


def _check_tensor(name: str, tensor: Any, wanted: str = "a tensor") -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be {wanted}, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested one; packed sequences go to attention_varlen"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on query's device {device}, got {tensor.device}")


def _check_dtype_and_head_dim(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be fp32, fp16 or bf16 (fp64 for the reference), got {tensor.dtype}")
    if not 1 <= tensor.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"{name}'s head_dim must lie in 1..{MAX_HEAD_DIM}, got {tensor.shape[-1]}")


def _check_heads(heads: int, kv_heads: int) -> None:
    if (kv_heads == 0) != (heads == 0) or (kv_heads and heads % kv_heads):
        raise ValueError(f"key's heads must divide query's {heads} heads, got {kv_heads}")


def _check_positions(name: str, length: int) -> None:
    if length > MAX_LENGTH:
        raise ValueError(f"{name} must have at most 2**30 positions, got {length}")


def _check_padding_mask(mask: Any, batch: int, keys: int, device: torch.device) -> None:
    _check_tensor("key_padding_mask", mask, "a bool tensor or None")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"key_padding_mask must be bool with True = padding, got {mask.dtype}; "
            "for a 0/1 mask whose 1 means keep, pass `mask == 0`"
        )
    shapes = [(batch, keys), (batch, 1, keys), (batch, 1, 1, keys)]
    if tuple(mask.shape) not in shapes:
        wanted = " or ".join(str(list(s)) for s in shapes)
        raise ValueError(f"key_padding_mask must have shape {wanted}, got {list(mask.shape)}")
    _check_device("key_padding_mask", mask, device)


def _check_key_lengths(key_lengths: Any, mask: Any, batch: int, device: torch.device) -> None:
    _check_int32("key_lengths", key_lengths, [batch], "[B]", device)
    if mask is not None:
        raise ValueError("key_lengths must be None with key_padding_mask, which says the same")


def _check_int32(name: str, tensor: Any, shape: list[int], letters: str, device: torch.device) -> None:
    _check_tensor(name, tensor, "an int32 tensor or None")
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {tensor.dtype}")
    if list(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {letters} = {shape}, got {list(tensor.shape)}")
    _check_device(name, tensor, device)


def _check_attn_mask(attn_mask: Any, full: tuple[int, int, int, int], query: Tensor) -> None:
    _check_tensor("attn_mask", attn_mask, "a tensor or None")
    dtype = attn_mask.dtype
    if dtype != torch.bool and dtype not in FLOAT_DTYPES:
        raise TypeError(f"attn_mask must be bool (True = not allowed) or a float bias, got {dtype}")
    if dtype == torch.float64 and query.dtype != torch.float64:
        raise TypeError(f"attn_mask must be fp32, fp16 or bf16 where query is {query.dtype}, got {dtype}")
    sizes = tuple(attn_mask.shape)
    if len(sizes) > 4 or any(s not in (1, f) for s, f in zip(sizes[::-1], full[::-1], strict=False)):
        raise ValueError(f"attn_mask must broadcast to [B, H, M, N] = {list(full)}, got {list(sizes)}")
    _check_device("attn_mask", attn_mask, query.device)


def _check_cu_seqlens(name: str, cu_seqlens: Any, device: torch.device) -> None:
    _check_tensor(name, cu_seqlens, "an int32 tensor")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"{name} must have shape [B + 1], got {list(cu_seqlens.shape)}")
    _check_device(name, cu_seqlens, device)
    if cu_seqlens.numel() > 1 and cu_seqlens.stride(0) != 1:
        raise ValueError(f"{name} must be contiguous, got stride {cu_seqlens.stride(0)}")


def _check_max_seqlen(name: str, length: Any) -> None:
    if not _is_number(length, int, torch.SymInt):
        raise TypeError(f"{name} must be an int, got {type(length).__name__}")
    if not 0 <= length <= MAX_LENGTH:
        raise ValueError(f"{name} must lie in 0..2**30, got {length}")


def _check_flag(name: str, flag: Any) -> None:
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")


def _check_options(options: Options) -> None:
    """The options that every entry point shares; only some of them take `skip_padded_queries`."""
    dropout_p, scale, window, _, return_lse = options
    if not _is_number(dropout_p, int, float):
        raise TypeError(f"dropout_p must be a float, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p <= MAX_DROPOUT:
        raise ValueError(f"dropout_p must lie in 0..{MAX_DROPOUT:.6f}, got {dropout_p}")
    if scale is not None:
        if not _is_number(scale, int, float):
            raise TypeError(f"scale must be a float or None, got {type(scale).__name__}")
        # Comparisons only, which torch.compile can trace for a scale that varies.
        if not (scale == 0 or SMALLEST_SCALE <= abs(scale) <= 1 / SMALLEST_SCALE):
            sizes = f"{SMALLEST_SCALE} to {1 / SMALLEST_SCALE}"
            raise ValueError(f"scale must be finite: 0 or {sizes} in size, got {scale}")
    if window is not None:
        if not isinstance(window, tuple) or len(window) != 2:
            raise TypeError(f"window must be None or a pair (left, right), got {window!r}")
        for side in window:
            if side is not None and not _is_number(side, int):
                raise TypeError(f"window's sides must be int or None, got {window!r}")
            if side is not None and side < 0:
                raise ValueError(f"window's sides must be None or at least 0, got {window!r}")
    _check_flag("return_lse", return_lse)


def _is_number(value: Any, *types: type) -> bool:
    """Whether value is of one of these types; a bool, which Python counts among the ints, is not."""
    return isinstance(value, types) and not isinstance(value, bool)
