"""padfree itself: the padded entry point, with padded rows left out, packed, and on one QKV buffer."""

from functools import partial
from typing import cast

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


def prepare(inputs: Inputs, training: bool, skip: bool = False, with_mask: bool = True) -> Prepared:
    check_kernel(inputs.query)
    mask = inputs.padding if with_mask else None
    attend = partial(padfree.attention, skip_padded_queries=skip, impl="triton")
    return padded(inputs, training, lambda q, k, v: cast(Tensor, attend(q, k, v, mask)), RAN)


def varlen(inputs: Inputs, training: bool, pack: bool = False) -> Prepared:
    check_kernel(inputs.query)

    def run(query: Tensor, key: Tensor, value: Tensor, cu: Tensor, longest: int) -> Tensor:
        out = padfree.attention_varlen(query, key, value, cu, cu, longest, longest, impl="triton")
        return cast(Tensor, out)

    if pack:
        return packing(inputs, training, run, f"nonzero, gather, {RAN}, scatter")
    return packed(inputs, training, run, RAN)


def qkvpacked(inputs: Inputs, training: bool) -> Prepared:
    check_kernel(inputs.query)
    buffer = torch.stack([swap(x) for x in (inputs.query, inputs.key, inputs.value)], dim=2)
    leaves = leaves_of(buffer, training=training)
    attend = partial(padfree.attention_qkvpacked, skip_padded_queries=True, impl="triton")

    def grads(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return parts[0].permute(2, 0, 3, 1, 4).unbind(0)

    def forward() -> Tensor:
        return cast(Tensor, attend(leaves[0], inputs.padding))

    return Prepared(forward, leaves, swap(inputs.d_out), RAN, swap, grads)


SKIP = "skip_padded_queries=True"
UPPER = "no mask: wrong answer where there is padding, shows what the mask costs"
PEERS = [
    Peer("padfree", prepare, "padded in and out, every row"),
    Peer("padfree-skip", partial(prepare, skip=True), f"padded in and out, {SKIP}"),
    Peer("padfree-varlen", varlen, "ready-packed input and output"),
    Peer("padfree-varlen+pack", partial(varlen, pack=True), "offsets, packing and unpacking inside the time"),
    Peer("padfree-qkv", qkvpacked, f"one [B,S,3,H,D] buffer, {SKIP}"),
    Peer("padfree-nomask", partial(prepare, with_mask=False), UPPER, upper_bound=True),
]
