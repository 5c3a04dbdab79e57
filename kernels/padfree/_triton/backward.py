"""The backward: dq, then dk and dv, then attn_mask's gradient where asked for; no atomics. DESIGN.md, "Backward"."""

from typing import Any

import torch
from torch import Tensor

from padfree._triton.attn_mask_gradient import launch_attn_mask_gradient
from padfree._triton.call import Call, on_device
from padfree._triton.key_gradient import launch_key_gradient
from padfree._triton.query_gradient import launch_query_gradient
from padfree._triton.single_query import launch_single_query_backward


def launch_backward(
    call: Call,
    out: Tensor,
    lse2: Tensor,
    d_out: Tensor,
    d_lse2: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    d_attn_mask: Tensor | None = None,
) -> None:
    """Write dq, dk, dv and attn_mask's gradient into the tensors given, of any strides.

    A launch for each pass; dq, dk and dv of a single query are one pass.
    """
    dq, dk, dv = grads
    if call.is_empty:
        for grad in (dk, dv) if d_attn_mask is None else (dk, dv, d_attn_mask):
            grad.zero_()
        return
    # A saved-tensor hook may hand it back in another layout, which the passes would take for its own.
    lse2 = lse2.contiguous()
    # A single query's kernel owns dk and dv only where heads are not grouped.
    single = call.max_q == 1 and call.heads == call.kv_heads
    # In half precision the LSE's rounding is nothing beside that of the weights, but sums over a whole row show it.
    is_fp32, wants_mask = call.query.dtype == torch.float32, d_attn_mask is not None
    delta = _row_sums(lse2, wants_mask or not single)
    inverse = _row_sums(lse2, wants_mask or (is_fp32 and not single))
    corrected = _row_sums(lse2, wants_mask and not is_fp32 and not single)
    with on_device(call.query):
        if single:
            launch_single_query_backward(call, out, lse2, d_out, d_lse2, delta, inverse, grads)
        else:
            launch_query_gradient(call, out, lse2, d_out, d_lse2, delta, inverse, corrected, dq)
            if call.max_k and call.key.shape[2]:
                launch_key_gradient(call, lse2, d_out, delta, inverse if is_fp32 else None, dk, dv)
        if d_attn_mask is not None:
            fitting = delta if corrected is None else corrected
            launch_attn_mask_gradient(call, lse2, d_out, fitting, inverse, d_attn_mask)


def _row_sums(lse2: Tensor, wanted: bool) -> Any:
    """[B,H,M] fp32 with lse2's strides, or None."""
    return torch.empty_like(lse2) if wanted else None
