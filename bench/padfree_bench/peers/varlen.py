"""torch.nn.attention.varlen.varlen_attn (FlashAttention-2), packed before the clock starts or inside it."""

from torch import Tensor

from padfree_bench.measuring.inputs import Inputs
from padfree_bench.peers.base import Peer, Prepared, needs, needs_16_bit, needs_cuda, packed, packing


def _check(inputs: Inputs) -> None:
    needs("torch.nn.attention.varlen")
    needs_cuda(inputs, "varlen_attn")
    needs_16_bit(inputs, "varlen_attn")


def _run(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest)
    assert isinstance(out, Tensor)
    return out


def prepare_packed(inputs: Inputs, training: bool) -> Prepared:
    _check(inputs)
    cu_seqlens = inputs.cu_seqlens()
    return packed(inputs, training, lambda q, k, v: _run(q, k, v, cu_seqlens, inputs.case.seq), "varlen_attn")


def prepare_packing(inputs: Inputs, training: bool) -> Prepared:
    _check(inputs)
    return packing(inputs, training, _run, "nonzero, gather, varlen_attn, scatter")


PEERS = [
    Peer("varlen_attn", prepare_packed, "ready-packed input and output"),
    Peer("varlen_attn+pack", prepare_packing, "offsets, packing and unpacking inside the time"),
]
