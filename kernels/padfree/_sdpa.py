"""Plain PyTorch under padfree's contract: what computes a call where the kernel does not.

On a CPU `auto` runs scaled_dot_product_attention wherever that can. Padding may hold NaN, and a row with no visible key
is 0 with zero gradient: what SDPA leaves open is settled before and after it, so that it still takes its fused kernel.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from padfree._arguments import Arguments
from padfree.reference import attend, attend_sequences, visible_keys, without_padding


def attend_without_kernel(call: Arguments, impl: str) -> tuple[Tensor, Tensor | None]:
    """out [B, H, M, D], and the LSE [B, H, M] where the options ask for it, by SDPA if `impl` is "auto"."""
    call = call.with_padding()
    attend_one = _attend_by_sdpa if impl == "auto" else attend
    return attend_one(call) if call.packing is None else attend_sequences(attend_one, call, call.packing)


def _sdpa_serves(call: Arguments) -> bool:
    """Whether SDPA's fused CPU kernel can compute this call; it keeps the LSE to itself, for one."""
    query, bias, options = call.query, call.attn_mask, call.options
    if query.device.type != "cpu" or options.return_lse or options.dropout_p > 0:
        return False
    if options.scale is not None and options.scale <= 0:
        return False
    if bias is not None and bias.is_floating_point() and not _takes_bias(bias, query.dtype):
        return False
    return query.numel() > 0 and call.key.numel() > 0


def _takes_bias(bias: Tensor, dtype: torch.dtype) -> bool:
    """A bias must fit query's dtype exactly, in which SDPA adds it, and want no gradient, which vmap hides from us."""
    exact = torch.promote_types(bias.dtype, dtype) == dtype
    return exact and not bias.requires_grad and not torch._C._are_functorch_transforms_active()


def _attend_by_sdpa(call: Arguments) -> tuple[Tensor, Tensor | None]:
    """What `reference.attend` computes, by SDPA where its fused CPU kernel can."""
    if not _sdpa_serves(call):
        return attend(call)
    query, attn_mask, scale = call.query, call.attn_mask, call.options.scale
    key, value = (without_padding(x, call.padding) for x in (call.key, call.value))
    if (group := query.shape[1] // key.shape[1]) > 1:
        # A view where there is one key head, which `repeat_interleave` would copy once for every query head.
        key, value = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (key, value))
    if call.padding is None and attn_mask is None and call.options.window is None:
        return scaled_dot_product_attention(query, key, value, scale=scale), None
    visible = visible_keys(call)
    live = visible.any(dim=-1, keepdim=True)
    # A row that sees nothing looks at everything: its softmax stays finite, and what comes of it is left out.
    mask = _sdpa_mask(attn_mask, visible | ~live, query)
    query = torch.where(live, query, 0)
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return torch.where(live, out, 0), None


def _sdpa_mask(attn_mask: Tensor | None, visible: Tensor, query: Tensor) -> Tensor:
    """What SDPA is told: a bool mask with True = attend, or the bias with -inf where a key is hidden."""
    if attn_mask is None or attn_mask.dtype == torch.bool:
        return visible
    bias = torch.where(attn_mask == -math.inf, 0, attn_mask.to(query.dtype))
    return torch.where(visible, bias, -math.inf)
