"""Other libraries' attention: FlashAttention-4 and -2, xformers, and Liger's softmax."""

import math
from typing import cast

import torch
from torch import Tensor

from padfree_bench.measuring.inputs import Inputs
from padfree_bench.peers.base import Peer, Prepared, needs_cuda, packed, padded, swap


def flash_attn_4(inputs: Inputs, training: bool) -> Prepared:
    """Padded tensors with seqused, the same contract as padfree's."""
    attend = needs_cuda(inputs, "FlashAttention-4", "flash_attn.cute").flash_attn_varlen_func
    used = inputs.lengths.int()

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = attend(query, key, value, seqused_q=used, seqused_k=used)
        return out[0] if isinstance(out, tuple) else out

    # [B, S, H, D], its own layout, is the memory that the inputs already have.
    ran = "flash_attn.cute.flash_attn_varlen_func, seqused"
    return padded(inputs, training, run, ran, there=swap, back=swap)


def flash_attn_2(inputs: Inputs, training: bool) -> Prepared:
    """Packed before the clock starts."""
    attend = needs_cuda(inputs, "flash-attn", "flash_attn.flash_attn_interface").flash_attn_varlen_func

    def run(query: Tensor, key: Tensor, value: Tensor, cu: Tensor, longest: int) -> Tensor:
        return cast(Tensor, attend(query, key, value, cu, cu, longest, longest))

    return packed(inputs, training, run, "flash_attn_varlen_func")


def xformers(inputs: Inputs, training: bool) -> Prepared:
    """memory_efficient_attention with a block-diagonal mask on packed input."""
    ops = needs_cuda(inputs, "xformers", "xformers.ops", half_only=False)
    lengths = inputs.case.sequence_lengths().tolist()
    bias = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths)

    def run(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
        return ops.memory_efficient_attention(query[None], key[None], value[None], attn_bias=bias)[0]

    return packed(inputs, training, run, "memory_efficient_attention, BlockDiagonalMask")


def liger(inputs: Inputs, training: bool) -> Prepared:
    """Liger has no attention of its own: the eager formula around its fused softmax."""
    library = needs_cuda(inputs, "liger-kernel", "liger_kernel.transformers.functional", half_only=False)
    softmax, mask = library.liger_softmax, inputs.padding[:, None, None, :]

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
        return torch.matmul(softmax(scores.masked_fill(mask, -1e4)), value)

    return padded(inputs, training, run, "two matmuls around liger_softmax")


PEERS = [
    Peer("flash-attn-4", flash_attn_4, "padded input, lengths on the device"),
    Peer("flash-attn", flash_attn_2, "ready-packed input and output"),
    Peer("xformers", xformers, "ready-packed input and output"),
    Peer("liger-softmax", liger, "eager attention with Liger's softmax"),
]
