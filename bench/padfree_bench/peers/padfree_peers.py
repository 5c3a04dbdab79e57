"""padfree itself: the padded entry point, with padded rows left out, packed, and on one QKV buffer."""

import functools

import torch
from torch import Tensor

import padfree
from padfree_bench.measuring.inputs import Inputs
from padfree_bench.peers.base import Peer, Prepared, Refused, leaves_of, packed, packing, padded, swap

RAN = "padfree's Triton kernel"


def check_kernel(query: Tensor) -> None:
    """The kernel itself or a row that says why not: never the reference, never the interpreter's time."""
    if query.device.type == "cpu":
        raise Refused("no GPU: padfree's kernel did not run (Triton's interpreter is not timed)")
    if (reason := padfree.why_not(query)) is not None:
        raise Refused(reason)


def prepare(inputs: Inputs, training: bool, skip: bool, with_mask: bool = True) -> Prepared:
    check_kernel(inputs.query)
    mask = inputs.padding if with_mask else None

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = padfree.attention(query, key, value, mask, skip_padded_queries=skip, impl="triton")
        assert isinstance(out, Tensor)
        return out

    return padded(inputs, training, run, RAN)


def _varlen(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    out = padfree.attention_varlen(query, key, value, cu_seqlens, cu_seqlens, longest, longest, impl="triton")
    assert isinstance(out, Tensor)
    return out


def prepare_varlen(inputs: Inputs, training: bool) -> Prepared:
    check_kernel(inputs.query)
    cu_seqlens = inputs.cu_seqlens()
    return packed(inputs, training, lambda q, k, v: _varlen(q, k, v, cu_seqlens, inputs.case.seq), RAN)


def prepare_packing(inputs: Inputs, training: bool) -> Prepared:
    check_kernel(inputs.query)
    return packing(inputs, training, _varlen, f"nonzero, gather, {RAN}, scatter")


def prepare_qkvpacked(inputs: Inputs, training: bool) -> Prepared:
    check_kernel(inputs.query)
    buffer = torch.stack([swap(x) for x in (inputs.query, inputs.key, inputs.value)], dim=2)
    leaves = leaves_of(buffer, training=training)

    def forward() -> Tensor:
        out = padfree.attention_qkvpacked(leaves[0], inputs.padding, skip_padded_queries=True, impl="triton")
        assert isinstance(out, Tensor)
        return out

    def grads(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return parts[0].permute(2, 0, 3, 1, 4).unbind(0)

    return Prepared(forward, leaves, swap(inputs.d_out), RAN, swap, grads)


SKIP = "skip_padded_queries=True"
UPPER = "no mask: wrong answer where there is padding, shows what the mask costs"
PEERS = [
    Peer("padfree", functools.partial(prepare, skip=False), "padded in and out, every row"),
    Peer("padfree-skip", functools.partial(prepare, skip=True), f"padded in and out, {SKIP}"),
    Peer("padfree-varlen", prepare_varlen, "ready-packed input and output"),
    Peer("padfree-varlen+pack", prepare_packing, "offsets, packing and unpacking inside the time"),
    Peer("padfree-qkv", prepare_qkvpacked, f"one [B,S,3,H,D] buffer, {SKIP}"),
    Peer("padfree-nomask", functools.partial(prepare, skip=False, with_mask=False), UPPER, upper_bound=True),
]
