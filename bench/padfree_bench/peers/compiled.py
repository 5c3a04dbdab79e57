"""torch.compile of the notebook's attention: what the compiler makes of the plain formula."""

import functools

from padfree_bench.measuring.inputs import Inputs
from padfree_bench.peers.base import Peer, Prepared, compiled, padded
from padfree_bench.peers.eager import notebook_attention


@functools.cache
def _compiled():  # type: ignore[no-untyped-def]
    return compiled(notebook_attention)


def prepare(inputs: Inputs, training: bool) -> Prepared:
    mask = inputs.padding[:, None, None, :]
    run = _compiled()
    return padded(inputs, training, lambda q, k, v: run(q, k, v, mask), "inductor, default mode")


PEERS = [Peer("compile-eager", prepare, "torch.compile of eager", slow_to_compile=True)]
