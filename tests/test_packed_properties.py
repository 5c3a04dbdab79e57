"""Packed sequences over generated lengths, most of all where buffers, offsets and maxima do not fit each other."""

from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

import padfree
from drawn import normal
from padfree.testing import eager_attention

pytest.importorskip("hypothesis")
from hypothesis import example, given
from hypothesis import strategies as st

KERNEL = partial(padfree.attention_varlen, impl="triton")
REFERENCE = partial(padfree.attention_varlen, impl="reference")
# fp32 with scores of size 1: rounding leaves 1e-6, a row or key too many or too few 1e-1.
assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=2e-5)


@dataclass(frozen=True)
class Packed:
    """Sequences end to end: their lengths, rows that belong to none behind them, and the maxima that a caller names."""

    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    q_slack: int
    k_slack: int
    max_q: int
    max_k: int
    window: tuple[int | None, int | None] | None = None

    def bounds(self) -> list[tuple[int, int, int, int]]:
        ends = (pairwise(accumulate(lengths, initial=0)) for lengths in (self.q_lengths, self.k_lengths))
        return [(*q, *k) for q, k in zip(*ends, strict=True)]


LENGTHS = st.integers(0, 9)


@st.composite
def packed_calls(draw: st.DrawFn, self_attention: bool = False) -> Packed:
    """0 to 4 sequences; maxima below, at and beyond the lengths."""
    sequences = draw(st.integers(0, 4))
    q_lengths = tuple(draw(LENGTHS) for _ in range(sequences))
    k_lengths = q_lengths if self_attention else tuple(draw(LENGTHS) for _ in range(sequences))
    side = st.none() | st.integers(0, 4)
    window = draw(st.none() | st.tuples(side, side))
    q_slack, max_q = draw(st.integers(0, 3)), draw(st.integers(0, 12))
    k_slack, max_k = (
        (q_slack, max_q) if self_attention else (draw(st.integers(0, 3)), draw(st.integers(0, 12)))
    )
    return Packed(q_lengths, k_lengths, q_slack, k_slack, max_q, max_k, window)


def offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)


def tensors(call: Packed) -> list[Tensor]:
    """query, key, value and d_out; what no sequence may read is NaN."""
    rows, keys = sum(call.q_lengths) + call.q_slack, sum(call.k_lengths) + call.k_slack
    query, key, value, d_out = (normal(n, 2, 4, seed=seed) for seed, n in enumerate((rows, keys, keys, rows)))
    query[rows - call.q_slack :] = key[keys - call.k_slack :] = value[keys - call.k_slack :] = torch.nan
    for q0, q1, k0, k1 in call.bounds():
        query[q0 + call.max_q : q1] = torch.nan
        key[k0 + call.max_k : k1] = value[k0 + call.max_k : k1] = torch.nan
    return [query, key, value, d_out]


def truth(call: Packed, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Each sequence alone, its rows and keys beyond the maxima cut off, put into zeros and -inf."""
    out, lse = torch.zeros_like(query), query.new_full((query.shape[1], query.shape[0]), -torch.inf)
    for q0, q1, k0, k1 in call.bounds():
        q, k = slice(q0, min(q1, q0 + call.max_q)), slice(k0, min(k1, k0 + call.max_k))
        if q.stop > q.start and k.stop > k.start:
            one = (x.transpose(0, 1)[None] for x in (query[q], key[k], value[k]))
            one_out, one_lse = eager_attention(*one, window=call.window, return_lse=True)
            out[q], lse[:, q] = one_out[0].transpose(0, 1), one_lse[0]
    return out, lse


def with_gradients(out: Tensor, lse: Tensor, leaves: list[Tensor], d_out: Tensor) -> list[Tensor]:
    outputs = [out, lse.masked_fill(lse == -torch.inf, 0)]
    grads = torch.autograd.grad(outputs, leaves, [d_out, torch.ones_like(lse)])
    return [out, lse, *grads]


# lengths beyond the maxima; nothing at all; maxima of 0; rows of no sequence
@given(packed_calls())
@example(Packed((8, 4), (8, 4), 0, 0, 4, 4))
@example(Packed((), (), 3, 2, 5, 5))
@example(Packed((3, 2), (3, 2), 1, 1, 0, 0))
@example(Packed((3, 0, 5), (0, 4, 9), 2, 3, 1, 4))
def test_kernel_and_reference_agree_with_each_sequence_alone(call: Packed) -> None:
    *inputs, d_out = tensors(call)
    arguments = (offsets(call.q_lengths), offsets(call.k_lengths), call.max_q, call.max_k)
    wanted_leaves = [x.nan_to_num().double().requires_grad_() for x in inputs]
    wanted_out, wanted_lse = truth(call, *wanted_leaves)
    # rows of no sequence are in no graph
    linked = sum(x.sum() * 0 for x in wanted_leaves)
    wanted = with_gradients(wanted_out + linked, wanted_lse + linked, wanted_leaves, d_out.double())
    for attend in (KERNEL, REFERENCE):
        leaves = [x.clone().requires_grad_() for x in inputs]
        got = with_gradients(*attend(*leaves, *arguments, window=call.window, return_lse=True), leaves, d_out)
        for name, one, other in zip(("out", "lse", "dq", "dk", "dv"), got, wanted, strict=True):
            assert_close(one, other.float(), msg=partial("{} {}: {}".format, attend.keywords, name))


@given(packed_calls(self_attention=True))
@example(Packed((8, 4), (8, 4), 0, 0, 4, 4))
@example(Packed((), (), 3, 3, 5, 5))
def test_a_fused_buffer_agrees_with_its_reference(call: Packed) -> None:
    *inputs, d_out = tensors(call)
    results = []
    for impl in ("triton", "reference"):
        qkv = torch.stack(inputs, 1).requires_grad_()
        out, lse = padfree.attention_qkvpacked(
            qkv,
            cu_seqlens=offsets(call.q_lengths),
            max_seqlen=call.max_q,
            window=call.window,
            return_lse=True,
            impl=impl,
        )
        results.append(with_gradients(out, lse, [qkv], d_out))
    for one, other in zip(*results, strict=True):
        assert_close(one, other)
