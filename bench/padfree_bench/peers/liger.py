"""Liger has no attention of its own: the eager formula around its fused softmax."""

import math

import torch
from torch import Tensor

from padfree_bench.measuring.inputs import Inputs
from padfree_bench.peers.base import Peer, Prepared, needs, needs_cuda, padded


def prepare(inputs: Inputs, training: bool) -> Prepared:
    needs_cuda(inputs, "liger-kernel")
    needs("liger_kernel.transformers.functional")
    from liger_kernel.transformers.functional import liger_softmax

    mask = inputs.padding[:, None, None, :]

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
        return torch.matmul(liger_softmax(scores.masked_fill(mask, -1e4)), value)

    return padded(inputs, training, run, "two matmuls around liger_softmax")


PEERS = [Peer("liger-softmax", prepare, "eager attention with Liger's softmax")]
