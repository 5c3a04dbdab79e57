"""Every attention a user could pick instead, one small file each; `PEERS` holds them in the order of the tables."""

from padfree_bench.peers import (
    compiled,
    cudnn_frontend,
    eager,
    flash_attn_2,
    flash_attn_4,
    flex,
    liger,
    nested,
    padfree_peers,
    sdpa,
    torch_mha,
    varlen,
    xformers_ops,
)
from padfree_bench.peers.base import Peer, Prepared, Refused

_MODULES = (
    padfree_peers,
    eager,
    torch_mha,
    sdpa,
    varlen,
    nested,
    flex,
    cudnn_frontend,
    flash_attn_4,
    flash_attn_2,
    xformers_ops,
    liger,
    compiled,
)
PEERS: dict[str, Peer] = {peer.name: peer for module in _MODULES for peer in module.PEERS}

__all__ = ["PEERS", "Peer", "Prepared", "Refused", "choose_peers"]


def choose_peers(names: str | None) -> list[Peer]:
    """The peers a command line asks for, by comma-separated names; all of them when None.

    Raises:
        ValueError: an unknown name; the message lists them.
    """
    for name in names.split(",") if names else ():
        if name not in PEERS:
            raise ValueError(f"peer must be one of {', '.join(PEERS)}, got {name!r}")
    return [PEERS[name] for name in names.split(",")] if names else list(PEERS.values())
