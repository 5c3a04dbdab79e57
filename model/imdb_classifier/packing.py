"""Reviews packed end to end in one row, so that no layer computes padding.

B reviews with T tokens together are one row [1, T, E]. Their boundaries go under transformers' names, `cu_seq_lens_q` and
so on, which is also how `DataCollatorWithFlattening` hands them out and how the attention "padfree" takes them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def serves_packed(attention: str | None) -> bool:
    """Whether an attention keeps packed reviews apart; sdpa and eager would let them see each other."""
    return (attention or "").startswith("padfree")


@dataclass(frozen=True)
class Packed:
    """Where the reviews lie in a packed row.

    Args:
        cu_seq_lens: int32 [B + 1] on the device: review b is rows cu_seq_lens[b] to cu_seq_lens[b + 1], its class token
            first. Rows behind the last review are filler: nobody sees them, and they are computed for a fixed shape's sake.
        max_length: of a review, an upper bound.
        key_rows: int64 [T_k], where some review's first row is hidden: the rows that are keys. `cu_seq_lens_k` are
            their boundaries. None where every row of a review is a key.
    """

    cu_seq_lens: Tensor
    max_length: int
    key_rows: Tensor | None = None
    cu_seq_lens_k: Tensor | None = None

    def first_rows(self, x: Tensor) -> Tensor:
        """[1, T, E] -> [1, B, E], the class token of each review."""
        return x.index_select(1, self.cu_seq_lens[:-1])

    def keys(self, x: Tensor) -> Tensor:
        """[1, T, E] -> [1, T_k, E], the rows that may be attended to."""
        return x if self.key_rows is None else x.index_select(1, self.key_rows)

    def arguments(self, first_row_only: bool) -> dict[str, Any]:
        """What the attention is told; with `first_row_only` each review asks with one row."""
        cu_q, longest = self.cu_seq_lens, self.max_length
        cu_k = cu_q if self.cu_seq_lens_k is None else self.cu_seq_lens_k
        if first_row_only:
            cu_q = torch.arange(len(cu_q), dtype=torch.int32, device=cu_q.device)
        return {
            "cu_seq_lens_q": cu_q,
            "cu_seq_lens_k": cu_k,
            "max_length_q": 1 if first_row_only else longest,
            "max_length_k": longest,
        }


def pack(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor, Packed]:
    """A padded batch [B, S] as (input_ids [1, T], position_ids [1, T], Packed), whatever the pattern of its mask.

    Kept are the visible tokens and the first one of each review, which the head reads even where it is hidden. The
    host waits once for a GPU, for T; a collator that packs spares that.

    Raises:
        ValueError: the mask is not [B, S]: what differs by row or head cannot be packed.
    """
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"a packed batch needs an attention_mask {list(input_ids.shape)}, got {list(attention_mask.shape)}"
        )
    visible = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    kept = visible.clone()
    kept[:, 0] = True
    rows = kept.flatten().nonzero().flatten()
    position_ids = (rows % input_ids.shape[1])[None]
    packed = Packed(_boundaries(kept), input_ids.shape[1])
    if not visible[:, 0].all():
        key_rows = visible.flatten()[rows].nonzero().flatten()
        packed = Packed(packed.cu_seq_lens, packed.max_length, key_rows, _boundaries(visible))
    return input_ids.flatten()[rows][None], position_ids, packed


def _boundaries(kept: Tensor) -> Tensor:
    """int32 [B + 1], from 0."""
    return torch.nn.functional.pad(kept.sum(1).cumsum(0, dtype=torch.int32), (1, 0))
