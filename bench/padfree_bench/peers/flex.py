"""FlexAttention with a block mask of the padding, built before the clock starts or inside it."""

import functools

from torch import Tensor

from padfree_bench.measuring.inputs import Inputs
from padfree_bench.peers.base import Peer, Prepared, Refused, compiled, padded


@functools.cache
def _compiled():  # type: ignore[no-untyped-def]
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return compiled(flex_attention), compiled(create_block_mask)


def prepare(inputs: Inputs, training: bool, count_mask: bool) -> Prepared:
    case = inputs.case
    if inputs.device.type != "cuda" and training:
        raise Refused("FlexAttention has no backward on a CPU")
    if inputs.device.type == "cuda" and case.head_dim < 16:
        raise Refused("FlexAttention does not implement head_dim below 16")
    attend, create = _compiled()
    lengths = inputs.lengths

    def real(batch: Tensor, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
        return (col < lengths[batch]) & (row < lengths[batch])

    def block_mask():  # type: ignore[no-untyped-def]
        return create(real, case.batch, None, case.seq, case.seq, device=inputs.device)

    ready = None if count_mask else block_mask()
    return padded(
        inputs,
        training,
        lambda q, k, v: attend(q, k, v, block_mask=block_mask() if ready is None else ready),
        "flex_attention under torch.compile, padded rows masked too",
    )


PEERS = [
    Peer("flex", functools.partial(prepare, count_mask=False), "block mask ready", slow_to_compile=True),
    Peer(
        "flex+mask",
        functools.partial(prepare, count_mask=True),
        "block mask built in the call",
        slow_to_compile=True,
    ),
]
