"""What a layer sees, as sdpa and eager read it, and the window that a layer is left to mask by itself."""

from typing import Any

import torch
from torch import Tensor, nn

from padfree.integrations._models import WINDOWED_MODEL_TYPES
from padfree.integrations._packed import Packing, same_sequence
from padfree.reference import in_window


def window_of(
    module: nn.Module, attention_mask: Tensor | None, sliding_window: int | None
) -> tuple[int, int] | None:
    """The window that `attention_mask_for` left to this layer; None where the mask already holds it."""
    if sliding_window is None or (attention_mask is not None and attention_mask.ndim != 2):
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


def sdpa_mask_of(
    attention_mask: Tensor | None,
    window: tuple[int, int] | None,
    packing: Packing | None,
    causal: bool,
    query: Tensor,
    key: Tensor,
) -> Tensor | None:
    """The same visibility as SDPA reads it: bool [B,1,1,N] or [B,1,M,N], True = attend; others as they came."""
    if attention_mask is not None and attention_mask.ndim == 2:
        attention_mask = attention_mask.bool()[:, None, None, :]
    visible = []
    if window is not None:
        visible.append(in_window(query.shape[2], key.shape[2], window, query.device))
    if packing is not None:
        visible.append(same_sequence(packing, query, key))
        if causal and attention_mask is None:
            visible.append(visible[-1].tril())
    for seen in visible:
        if attention_mask is None:
            attention_mask = seen[None, None]
        elif attention_mask.dtype == torch.bool:
            attention_mask = attention_mask & seen
        else:
            attention_mask = attention_mask.masked_fill(~seen, torch.finfo(attention_mask.dtype).min)
    return attention_mask


def additive(kwargs: dict[str, Any], query: Tensor) -> dict[str, Any]:
    """The same arguments with a bool mask as eager reads it: 0 to attend, the lowest number to hide."""
    mask = kwargs["attention_mask"]
    if mask is None or mask.dtype != torch.bool:
        return kwargs
    lowest = torch.full((), torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device)
    return kwargs | {"attention_mask": torch.where(mask, torch.zeros_like(lowest), lowest)}
