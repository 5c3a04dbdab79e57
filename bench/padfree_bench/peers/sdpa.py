"""F.scaled_dot_product_attention: every backend with the padding mask, and the fast ones without it."""

import functools

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from padfree_bench.measuring.inputs import Inputs
from padfree_bench.peers.base import Peer, Prepared, Refused, padded

BACKENDS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
}


def chosen_backend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str:
    """The name of the backend that torch's dispatcher picks for this call."""
    choice = torch._fused_sdp_choice(query, key, value, mask)
    return f"SDPBackend.{SDPBackend(choice).name}"


def prepare(inputs: Inputs, training: bool, backend: str | None, with_mask: bool) -> Prepared:
    mask = inputs.keep[:, None, None, :] if with_mask else None
    prepared = padded(
        inputs, training, lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask), ""
    )
    if backend is None:
        # The leaves and not the inputs: the choice depends on whether a gradient is wanted.
        query, key, value = prepared.leaves
        prepared.ran = chosen_backend(query, key, value, mask)
        return prepared
    plain = prepared.forward
    if inputs.device.type == "cpu" and backend in ("efficient", "cudnn"):
        raise Refused(f"torch has no {backend} backend on a CPU")

    def restricted() -> Tensor:
        with sdpa_kernel(BACKENDS[backend]):
            return plain()

    prepared.forward = restricted
    prepared.ran = f"SDPBackend.{BACKENDS[backend].name}"
    return prepared


def _peer(name: str, backend: str | None, with_mask: bool, note: str) -> Peer:
    prepared = functools.partial(prepare, backend=backend, with_mask=with_mask)
    return Peer(name, prepared, note, upper_bound=not with_mask)


UPPER = "no mask: wrong answer where there is padding, an upper bound"
PEERS = [
    _peer("sdpa", None, True, "boolean mask [B,1,1,S], torch's own choice of backend"),
    _peer("sdpa-math", "math", True, "boolean mask [B,1,1,S]"),
    _peer("sdpa-efficient", "efficient", True, "boolean mask [B,1,1,S]"),
    _peer("sdpa-cudnn", "cudnn", True, "boolean mask [B,1,1,S]"),
    _peer("sdpa-flash-nomask", "flash", False, UPPER),
    _peer("sdpa-cudnn-nomask", "cudnn", False, UPPER),
]
