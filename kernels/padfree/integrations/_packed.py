"""Sequences packed end to end in one row, as `DataCollatorWithFlattening(return_flash_attn_kwargs=True)` makes them."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import padfree

PACKED_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class Packing(NamedTuple):
    """Where the sequences lie: the arguments of `padfree.attention_varlen`."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def packing_of(query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> Packing | None:
    """What transformers' arguments say about packed sequences; None where they say nothing.

    Raises:
        ValueError: they are not those of one row, or lack the boundaries.
    """
    # A paged cache brings boundaries of its own, and the mask that goes with them.
    if kwargs.get("cache") is not None:
        return None
    cu_q, cu_k, longest_q, longest_k = (kwargs.get(name) for name in PACKED_ARGUMENTS)
    if cu_q is None and cu_k is None:
        if kwargs.get("seq_idx") is not None:
            raise ValueError(
                "seq_idx came without cu_seq_lens_q and cu_seq_lens_k: the sequences would see each other; "
                "DataCollatorWithFlattening(return_flash_attn_kwargs=True) makes them"
            )
        return None
    if cu_q is None or cu_k is None:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k must come together")
    if query.shape[0] != 1:
        raise ValueError(
            f"cu_seq_lens_q describes one row of packed sequences, got a batch of {query.shape[0]}"
        )
    # Without a number the row is the bound: a tensor would have to be waited for.
    return Packing(
        cu_q.to(query.device, torch.int32),
        cu_k.to(query.device, torch.int32),
        longest_q if isinstance(longest_q, int) else query.shape[2],
        longest_k if isinstance(longest_k, int) else key.shape[2],
    )


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    dropout: float,
    scaling: float | None,
    window: tuple[int, int] | None,
    impl: Literal["triton", "reference"],
) -> Tensor:
    """query [1,H,M,D], key and value [1,Hkv,N,D] -> out [1,M,H,D]: each sequence attends to itself."""
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    out: Any = padfree.attention_varlen(
        query,
        key,
        value,
        packing.cu_seqlens_q,
        packing.cu_seqlens_k,
        packing.max_seqlen_q,
        packing.max_seqlen_k,
        dropout_p=dropout,
        scale=scaling,
        window=window,
        impl=impl,
    )
    return out[None]


def same_sequence(packing: Packing, query: Tensor, key: Tensor) -> Tensor:
    """bool [M,N]: whether query and key stand in one sequence."""

    def sequence_of_each(ends: Tensor, rows: Tensor) -> Tensor:
        position = torch.arange(rows.shape[2], device=rows.device, dtype=ends.dtype)
        return torch.searchsorted(ends, position, right=True)

    of_query = sequence_of_each(packing.cu_seqlens_q[1:], query)
    of_key = sequence_of_each(packing.cu_seqlens_k[1:], key)
    return of_query.unsqueeze(1) == of_key
