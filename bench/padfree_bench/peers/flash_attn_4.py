"""FlashAttention-4 (flash_attn.cute): padded tensors with seqused, the same contract as padfree's."""

from torch import Tensor

from padfree_bench.measuring.inputs import Inputs
from padfree_bench.peers.base import Peer, Prepared, leaves_of, needs, needs_16_bit, needs_cuda


def prepare(inputs: Inputs, training: bool) -> Prepared:
    needs_cuda(inputs, "FlashAttention-4")
    needs_16_bit(inputs, "FlashAttention-4")
    needs("flash_attn.cute")
    from flash_attn.cute import flash_attn_varlen_func

    used = inputs.lengths.int()
    # [B, S, H, D], its own layout, is the memory that the inputs already have.
    leaves = leaves_of(
        *(x.transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value)), training=training
    )

    def forward() -> Tensor:
        out = flash_attn_varlen_func(*leaves, seqused_q=used, seqused_k=used)
        return out[0] if isinstance(out, tuple) else out

    return Prepared(
        forward,
        leaves,
        inputs.d_out.transpose(1, 2),
        "flash_attn.cute.flash_attn_varlen_func, seqused",
        output=lambda out: out.transpose(1, 2),
        grads=lambda grads: (grads[0].transpose(1, 2), grads[1].transpose(1, 2), grads[2].transpose(1, 2)),
    )


PEERS = [Peer("flash-attn-4", prepare, "padded input, lengths on the device")]
