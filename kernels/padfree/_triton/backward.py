"""The backward: dq, then dk and dv, then attn_mask's gradient where asked for; no atomics. DESIGN.md, "Backward"."""

import torch
from torch import Tensor

from padfree._triton.attn_mask_gradient import launch_attn_mask_gradient
from padfree._triton.call import Call, on_device
from padfree._triton.key_gradient import launch_key_gradient
from padfree._triton.query_gradient import launch_query_gradient


def launch_backward(
    call: Call,
    out: Tensor,
    lse2: Tensor,
    d_out: Tensor,
    d_lse2: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    d_attn_mask: Tensor | None = None,
) -> None:
    """Write dq, dk, dv and attn_mask's gradient into the tensors given, of any strides, in a launch for each pass."""
    dq, dk, dv = grads
    query, no_keys = call.query, call.max_k == 0 or call.key.shape[2] == 0
    if call.is_empty:
        for grad in (dk, dv) if d_attn_mask is None else (dk, dv, d_attn_mask):
            grad.zero_()
        return
    # In half precision the LSE's rounding is nothing beside that of the weights, but sums over a whole row show it.
    is_fp32, wants_mask = query.dtype == torch.float32, d_attn_mask is not None
    delta = torch.empty_like(lse2)
    inverse = torch.empty_like(lse2) if is_fp32 or wants_mask else None
    corrected = torch.empty_like(lse2) if wants_mask and not is_fp32 else None
    with on_device(query):
        launch_query_gradient(call, out, lse2, d_out, d_lse2, delta, inverse, corrected, dq)
        if not no_keys:
            launch_key_gradient(call, lse2, d_out, delta, inverse if is_fp32 else None, dk, dv)
        if d_attn_mask is not None and inverse is not None:
            fitting = delta if corrected is None else corrected
            launch_attn_mask_gradient(call, lse2, d_out, fitting, inverse, d_attn_mask)
