"""Every attention a user could pick instead of padfree; `PEERS` holds them in the order of the tables.

Tuning, suites and gpu_round may import it; it imports padfree, measuring and the libraries that it adapts.
"""

from padfree_bench.measuring.cases import pick
from padfree_bench.peers import cudnn_frontend, libraries, padfree_peers, pytorch
from padfree_bench.peers.base import Peer, Prepared, Refused

__all__ = ["PEERS", "Peer", "Prepared", "Refused", "choose_peers"]

_ALL = [*padfree_peers.PEERS, *pytorch.PEERS, *cudnn_frontend.PEERS, *libraries.PEERS, pytorch.COMPILED]
PEERS: dict[str, Peer] = {peer.name: peer for peer in _ALL}


def choose_peers(names: str | None) -> list[Peer]:
    """The peers a command line asks for, by comma-separated names; all of them when None.

    Raises:
        ValueError: an unknown name; the message lists them.
    """
    return [PEERS[name] for name in pick("peer", names, PEERS)] if names else list(PEERS.values())
