"""xformers' memory_efficient_attention with a block-diagonal mask on packed input."""

from torch import Tensor

from padfree_bench.measuring.inputs import Inputs
from padfree_bench.peers.base import Peer, Prepared, needs, needs_cuda, packed


def prepare(inputs: Inputs, training: bool) -> Prepared:
    needs_cuda(inputs, "xformers")
    needs("xformers.ops")
    from xformers import ops

    bias = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(inputs.case.sequence_lengths().tolist())

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ops.memory_efficient_attention(query[None], key[None], value[None], attn_bias=bias)[0]

    return packed(inputs, training, run, "memory_efficient_attention, BlockDiagonalMask")


PEERS = [Peer("xformers", prepare, "ready-packed input and output")]
