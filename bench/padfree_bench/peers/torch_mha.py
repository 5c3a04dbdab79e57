"""nn.MultiheadAttention with identity projections, so that it computes the same function."""

import torch
from torch import Tensor, nn

from padfree_bench.measuring.inputs import Inputs
from padfree_bench.peers.base import Peer, Prepared, padded


def prepare(inputs: Inputs, training: bool) -> Prepared:
    case = inputs.case
    width = case.heads * case.head_dim
    identity = torch.eye(width)
    module = nn.MultiheadAttention(width, case.heads, bias=False, batch_first=True)
    with torch.no_grad():
        module.in_proj_weight.copy_(identity.repeat(3, 1))
        module.out_proj.weight.copy_(identity)
    module.requires_grad_(training)
    module.to(inputs.device, inputs.query.dtype).train(training)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = (tensor.transpose(1, 2).flatten(2) for tensor in (query, key, value))
        out, _ = module(*rows, key_padding_mask=inputs.padding, need_weights=False)
        return out.unflatten(2, (case.heads, case.head_dim)).transpose(1, 2)

    return padded(inputs, training, run, "nn.MultiheadAttention, need_weights=False")


PEERS = [Peer("nn.MultiheadAttention", prepare, "its four projections are inside the time")]
