"""SDPA on a jagged NestedTensor, nested before the clock starts."""

import logging
import warnings

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from padfree_bench.measuring.inputs import Inputs
from padfree_bench.peers.base import Grads, Peer, Prepared

# torch remarks on its own prototype and its own deprecated call, which the reader of a benchmark cannot mend.
warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors", category=UserWarning)
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


def prepare(inputs: Inputs, training: bool) -> Prepared:
    offsets = inputs.cu_seqlens().to(torch.int64)
    lengths = inputs.case.sequence_lengths()
    shortest, longest = int(lengths.min()), int(lengths.max())

    def nest(tensor: Tensor) -> Tensor:
        values = inputs.pack(tensor)
        jagged = torch.nested.nested_tensor_from_jagged(
            values, offsets, min_seqlen=shortest, max_seqlen=longest
        )
        return jagged.detach()

    leaves = tuple(
        nest(tensor).requires_grad_(training) for tensor in (inputs.query, inputs.key, inputs.value)
    )

    def forward() -> Tensor:
        query, key, value = (leaf.transpose(1, 2) for leaf in leaves)
        return scaled_dot_product_attention(query, key, value).transpose(1, 2)

    def grads(parts: tuple[Tensor, ...]) -> Grads:
        d_query, d_key, d_value = (inputs.unpack(part.values()) for part in parts)
        return d_query, d_key, d_value

    # The output's jagged dimension must be the leaves' own, or autograd refuses the gradient.
    d_out = torch.nested.nested_tensor_from_jagged(
        inputs.pack(inputs.d_out),
        leaves[0].offsets(),  # type: ignore[attr-defined] # jagged tensors only
        min_seqlen=shortest,
        max_seqlen=longest,
    )
    return Prepared(
        forward,
        leaves,
        d_out,
        "SDPA on torch.jagged",
        output=lambda out: inputs.unpack(out.values()),
        grads=grads,
    )


PEERS = [Peer("nested", prepare, "jagged NestedTensor ready, lengths known to the host")]
