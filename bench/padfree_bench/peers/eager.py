"""The course notebook's attention, as it is written there: scores, mask * -1e9, softmax, product."""

import math

import torch
from torch import Tensor

from padfree_bench.measuring.inputs import Inputs
from padfree_bench.peers.base import Peer, Prepared, padded


def notebook_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """softmax(query @ keyᵀ / sqrt(D) + mask * -1e9) @ value with mask [B, 1, 1, S], True = padding."""
    scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
    scores = scores + (mask * -1e9).to(scores.dtype)
    return torch.matmul(torch.softmax(scores, dim=-1), value)


def prepare(inputs: Inputs, training: bool) -> Prepared:
    mask = inputs.padding[:, None, None, :]
    return padded(
        inputs, training, lambda q, k, v: notebook_attention(q, k, v, mask), "two matmuls and a softmax"
    )


PEERS = [Peer("eager", prepare, "the notebook's attention")]
