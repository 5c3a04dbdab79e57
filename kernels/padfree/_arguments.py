"""What a call is made of, and how the forms that callers may choose become the one in which it is computed."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

Window = tuple[int | None, int | None] | None


class Options(NamedTuple):
    """The options that the entry points share, as `padfree.attention` describes them."""

    dropout_p: float = 0.0
    scale: float | None = None
    window: Window = None
    skip_padded_queries: bool = False
    return_lse: bool = False


class Packing(NamedTuple):
    """Where the sequences of a packed batch lie, as `padfree.attention_varlen` describes it."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


class Arguments(NamedTuple):
    """The checked arguments of a call in the form in which it is computed.

    query is [B, H, M, D], key and value are [B, H_kv, N, D], the padding is bool [B, N], or key_lengths is int32 [B]. The
    sequences of a packed batch lie end to end in one row, B = 1. `spans` [B, 3] is what `key_spans` makes of the padding.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    padding: Tensor | None
    attn_mask: Tensor | None
    options: Options
    packing: Packing | None = None
    key_lengths: Tensor | None = None
    spans: Tensor | None = None

    def with_padding(self) -> "Arguments":
        """The same call with its lengths written out as padding, for those who read no lengths."""
        if self.key_lengths is None:
            return self
        padding = padding_of(self.key_lengths, self.key.shape[2])
        return self._replace(padding=padding, key_lengths=None)


def padding_of(key_lengths: Tensor, keys: int) -> Tensor:
    """bool [B, N], True where a key lies at its sequence's length or beyond."""
    return torch.arange(keys, device=key_lengths.device) >= key_lengths[:, None]


def padding_rows(key_padding_mask: Tensor | None) -> Tensor | None:
    """The [B, N] view of a checked mask of shape [B, N], [B, 1, N] or [B, 1, 1, N]."""
    if key_padding_mask is None or key_padding_mask.ndim == 2:
        return key_padding_mask
    return key_padding_mask.flatten(1) if key_padding_mask.ndim == 3 else key_padding_mask[:, 0, 0]


def split_qkv(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, S, 3, H, D] or [T, 3, H, D] as three views of shape [B or 1, H, S or T, D]."""
    padded = qkv if qkv.ndim == 5 else qkv[None]
    query, key, value = padded.permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def computed_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a call computes this tensor: autocast's where one is active, except for fp64, as in SDPA."""
    # A meta tensor knows no autocast.
    if tensor.dtype == torch.float64 or not tensor.is_floating_point() or tensor.is_meta:
        return tensor.dtype
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def under_autocast(*tensors: Any) -> tuple[Any, ...]:
    """The arguments of a call, each tensor in the dtype in which it is computed."""
    # Asked once for all, since they lie on one device or are refused.
    device = next((x.device.type for x in tensors if isinstance(x, Tensor)), "meta")
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    return tuple(_cast(x) if isinstance(x, Tensor) else x for x in tensors)


def _cast(tensor: Tensor) -> Tensor:
    dtype = computed_dtype(tensor)
    # Asking `to` for the dtype that is there already would cost every call some host time.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
