"""The flash-attn package (FlashAttention-2), packed before the clock starts."""

from padfree_bench.measuring.inputs import Inputs
from padfree_bench.peers.base import Peer, Prepared, needs, needs_16_bit, needs_cuda, packed


def prepare(inputs: Inputs, training: bool) -> Prepared:
    needs_cuda(inputs, "flash-attn")
    needs_16_bit(inputs, "flash-attn")
    needs("flash_attn.flash_attn_interface")
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    cu, longest = inputs.cu_seqlens(), inputs.case.seq
    return packed(
        inputs,
        training,
        lambda q, k, v: flash_attn_varlen_func(q, k, v, cu, cu, longest, longest),
        "flash_attn_varlen_func",
    )


PEERS = [Peer("flash-attn", prepare, "ready-packed input and output")]
