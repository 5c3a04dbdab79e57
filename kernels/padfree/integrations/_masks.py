"""What a layer sees: the masks that sdpa and eager read, sliding windows, and sequences packed end to end in one row."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import padfree
from padfree._arguments import Packing
from padfree.integrations._models import WINDOWED_MODEL_TYPES
from padfree.reference import in_window

# As `DataCollatorWithFlattening(return_flash_attn_kwargs=True)` makes them.
PACKED_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

# Where a mask that `for_one_forward` made carries what is known of it, a Known.
FOUND = "padfree_padding"


class Padding(NamedTuple):
    """What `padfree.attention` wants to know of a mask: its key_padding_mask and key_spans."""

    mask: Tensor
    spans: Tensor | None


class Known(NamedTuple):
    """The padding of a mask, if found, at which version of its numbers, and whether a CUDA graph was being captured."""

    capturing: bool
    version: int = -1
    padding: Padding | None = None


def for_one_forward(attention_mask: Tensor | None) -> Tensor | None:
    """The same mask as a tensor of its own, on which the layers of this forward leave what the first has found out.

    Of its own, because a caller may write other numbers into the same tensor for the next forward, or replay a graph of the
    whole model. Who keeps the mask for several forwards may write into it too: its version tells. A graph of layers alone
    may not use what was found outside of it.
    """
    if attention_mask is None or attention_mask.ndim != 2 or torch.compiler.is_compiling():
        return attention_mask
    mask = attention_mask.view_as(attention_mask)
    setattr(mask, FOUND, Known(_is_capturing(mask)))
    return mask


def known_padding(mask: Tensor, to_key_padding_mask: Callable[[Tensor], Tensor]) -> Padding:
    """The padding in a [B, N] mask: worked out once where `for_one_forward` made it, else in every layer anew."""
    known: Known | None = getattr(mask, FOUND, None)
    # A tensor of inference mode has no version.
    if known is None or mask.is_inference() or known.capturing != _is_capturing(mask):
        return Padding(to_key_padding_mask(mask), None)
    if known.padding is not None and known.version == mask._version:
        return known.padding
    padding = to_key_padding_mask(mask)
    found = Padding(padding, padfree.key_spans(padding))
    setattr(mask, FOUND, known._replace(version=mask._version, padding=found))
    return found


def _is_capturing(mask: Tensor) -> bool:
    return mask.is_cuda and torch.cuda.is_current_stream_capturing()


def window_of(module: nn.Module, mask: Tensor | None, sliding_window: int | None) -> tuple[int, int] | None:
    """The window that `attention_mask_for` left to this layer; None where the mask already holds it."""
    if sliding_window is None or (mask is not None and mask.ndim != 2):
        return None
    if getattr(getattr(module, "config", None), "model_type", None) not in WINDOWED_MODEL_TYPES:
        return None
    return sliding_window - 1, sliding_window - 1


def is_window_of_layer(config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this mask is the bidirectional sliding window that the layer itself will tell us about."""
    if config is None or config.model_type not in WINDOWED_MODEL_TYPES or kwargs.get("local_size") is None:
        return False
    # A caller's own and/or mask function makes transformers turn to vmap.
    return not kwargs.get("use_vmap", False) and not kwargs.get("allow_is_causal_skip", True)


def packing_of(query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> Packing | None:
    """What transformers' arguments say about packed sequences; None where they say nothing.

    Raises:
        ValueError: they are not those of one row, or lack the boundaries.
    """
    # A paged cache brings boundaries of its own, and the mask that goes with them.
    if kwargs.get("cache") is not None:
        return None
    cu_q, cu_k, longest_q, longest_k = (kwargs.get(name) for name in PACKED_ARGUMENTS)
    if cu_q is None and cu_k is None:
        if kwargs.get("seq_idx") is not None:
            raise ValueError(
                "seq_idx came without cu_seq_lens_q and cu_seq_lens_k: the sequences would see each other; "
                "DataCollatorWithFlattening(return_flash_attn_kwargs=True) makes them"
            )
        return None
    if cu_q is None or cu_k is None:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k must come together")
    if query.shape[0] != 1:
        raise ValueError(
            f"cu_seq_lens_q describes one row of packed sequences, got a batch of {query.shape[0]}"
        )
    # Without a number the row is the bound: a tensor would have to be waited for.
    longest_q = longest_q if isinstance(longest_q, int) else query.shape[2]
    longest_k = longest_k if isinstance(longest_k, int) else key.shape[2]
    return Packing(
        cu_q.to(query.device, torch.int32), cu_k.to(query.device, torch.int32), longest_q, longest_k
    )


def sdpa_mask_of(
    mask: Tensor | None,
    window: tuple[int, int] | None,
    packing: Packing | None,
    causal: bool,
    query: Tensor,
    key: Tensor,
) -> Tensor | None:
    """The same visibility as SDPA reads it: bool [B,1,1,N] or [B,1,M,N], True = attend; others as they came."""
    if mask is not None and mask.ndim == 2:
        mask = mask.bool()[:, None, None, :]
    visible = []
    if window is not None:
        visible.append(in_window(query.shape[2], key.shape[2], window, query.device))
    if packing is not None:
        same = _same_sequence(packing, query, key)
        visible += [same, same.tril()] if causal and mask is None else [same]
    for seen in visible:
        if mask is None:
            mask = seen[None, None]
        elif mask.dtype == torch.bool:
            mask = mask & seen
        else:
            mask = mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
    return mask


def _same_sequence(packing: Packing, query: Tensor, key: Tensor) -> Tensor:
    """bool [M, N]: whether query and key belong to one sequence."""

    def sequence_of_each(ends: Tensor, rows: Tensor) -> Tensor:
        position = torch.arange(rows.shape[2], device=rows.device, dtype=ends.dtype)
        return torch.searchsorted(ends, position, right=True)

    of_query = sequence_of_each(packing.cu_seqlens_q[1:], query)
    return of_query[:, None] == sequence_of_each(packing.cu_seqlens_k[1:], key)


def additive(kwargs: dict[str, Any], query: Tensor) -> dict[str, Any]:
    """The same arguments with a bool mask as eager reads it: 0 to attend, the lowest number to hide."""
    mask = kwargs["attention_mask"]
    if mask is None or mask.dtype != torch.bool:
        return kwargs
    lowest = torch.full((), torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device)
    return kwargs | {"attention_mask": torch.where(mask, torch.zeros_like(lowest), lowest)}
