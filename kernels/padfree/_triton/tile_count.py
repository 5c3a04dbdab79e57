"""How many tiles a batch needs: a model of the schedule on the host, which the tests hold the kernels to."""

import math
from typing import NamedTuple

from torch import Tensor

from padfree._arguments import Window


class TileCount(NamedTuple):
    """[BLOCK_M, BLOCK_N] tiles of one head, over all sequences.

    `queries`: visited for each tile of queries, in the forward and for dq; `keys`: for each tile of keys, for dk
    and dv; `dense`: in the whole padded score matrices.
    """

    queries: int
    keys: int
    dense: int


def visited_tiles(
    key_padding_mask: Tensor,
    queries: int,
    block_m: int,
    block_n: int,
    *,
    window: Window = None,
    skip_padded_queries: bool = False,
) -> TileCount:
    """The tiles that the visible keys of a bool [B, N] mask need; DESIGN.md, "Schedule".

    Tiles of a walk start at the first visible key (or query row, where padded queries are skipped), end with the last,
    and are needed where the window reaches into them.
    """
    left, right = (None, None) if window is None else window
    reach_back = math.inf if left is None else left
    reach_ahead = math.inf if right is None else right
    by_queries = by_keys = 0
    batch, keys = key_padding_mask.shape
    for padding in key_padding_mask.cpu():
        shown = (~padding).nonzero().flatten().tolist()
        if not shown:
            continue
        first, stop = shown[0], shown[-1] + 1
        row_first, row_stop = (first, stop) if skip_padded_queries else (0, queries)
        needed = range(first, stop, block_n)
        for m in range(0, queries, block_m):
            m_last = min(m + block_m, queries) - 1
            if m < row_stop and m_last >= row_first:
                by_queries += sum(n + block_n > m - reach_back and n <= m_last + reach_ahead for n in needed)
        for n in range(0, keys, block_n):
            n_last = min(n + block_n, keys) - 1
            if n < stop and n_last >= first:
                rows = range(row_first, row_stop, block_m)
                by_keys += sum(m + block_m > n - reach_ahead and m <= n_last + reach_back for m in rows)
    dense = batch * math.ceil(queries / block_m) * math.ceil(keys / block_n)
    return TileCount(by_queries, by_keys, dense)
