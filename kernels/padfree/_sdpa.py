"""PyTorch's scaled_dot_product_attention under padfree's contract: what `auto` runs on a CPU wherever it can.

Padding may hold NaN, a row with no visible key is 0 with zero gradient: what SDPA leaves open is settled before and
after it, so that it still takes its fused kernel.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from padfree._checks import Window
from padfree.reference import LOWEST, visible_keys, without_padding


def sdpa_serves(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
    return_lse: bool,
) -> bool:
    """Whether SDPA's fused CPU kernel can compute this checked call; the LSE, for one, it keeps to itself."""
    if query.device.type != "cpu" or return_lse or dropout_p > 0 or (scale is not None and scale <= 0):
        return False
    if attn_mask is not None and attn_mask.is_floating_point() and not _takes_bias(attn_mask, query.dtype):
        return False
    return query.numel() > 0 and key.numel() > 0


def _takes_bias(bias: Tensor, dtype: torch.dtype) -> bool:
    """It must fit query's dtype exactly, in which SDPA adds it, and want no gradient, which vmap hides from us."""
    exact = torch.promote_types(bias.dtype, dtype) == dtype
    return exact and not bias.requires_grad and not torch._C._are_functorch_transforms_active()


def sdpa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    attn_mask: Tensor | None,
    scale: float | None,
    window: Window,
    skip_padded_queries: bool,
) -> Tensor:
    """softmax(scale * query @ keyᵀ + attn_mask) @ value as `padfree.attention` defines it; `padding` is [B, N]."""
    group = query.shape[1] // key.shape[1]
    key, value = (without_padding(x, padding) for x in (key, value))
    if group > 1:
        key, value = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (key, value))
    if padding is None and attn_mask is None and window is None:
        return scaled_dot_product_attention(query, key, value, scale=scale)
    visible = visible_keys(query, key, padding, attn_mask, window, skip_padded_queries)
    live = visible.any(dim=-1, keepdim=True)
    # A row that sees nothing looks at everything: its softmax stays finite, and what comes of it is left out.
    mask = _sdpa_mask(attn_mask, visible | ~live, query)
    query = torch.where(live, query, 0)
    return torch.where(live, scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale), 0)


def _sdpa_mask(attn_mask: Tensor | None, visible: Tensor, query: Tensor) -> Tensor:
    """What SDPA is told: bool, True = attend, or with a bias the bias and -inf."""
    if attn_mask is None or attn_mask.dtype == torch.bool:
        return visible
    bias = torch.where(attn_mask == LOWEST, 0, attn_mask.to(query.dtype))
    return torch.where(visible, bias, LOWEST)
