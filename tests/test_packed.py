"""Packed sequences and fused QKV buffers: exact, equal to the padded form bit for bit, one gradient buffer."""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch

import padfree
from padfree.testing import Inputs, assert_within_reference_error, eager_attention, make_inputs, run

kernel = partial(padfree.attention, impl="triton")
varlen_kernel = partial(padfree.attention_varlen, impl="triton")
qkvpacked_kernel = partial(padfree.attention_qkvpacked, impl="triton")

# query and key lengths: an empty sequence, one without keys, one without queries, one token, a tile's edge
LENGTHS = (
    ((5, 33, 0, 17), (5, 33, 0, 17)),
    ((1, 34, 6), (40, 1, 0)),
    ((0, 0, 7), (4, 0, 6)),
    ((1, 1, 1), (31, 2, 40)),
)


def offsets(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)


def packed_attention(lengths: tuple[tuple[int, ...], tuple[int, ...]], device: torch.device):
    """attention_varlen behind the entry points of the padded form with B = 1, so that `run` can differentiate it."""
    query_lengths, key_lengths = lengths

    def attend(query, key, value, key_padding_mask=None, *, attn_mask=None, **options: Any):
        out, lse = varlen_kernel(
            *(x[0].transpose(0, 1) for x in (query, key, value)),
            offsets(query_lengths, device),
            offsets(key_lengths, device),
            max(query_lengths),
            max(key_lengths),
            **options,
        )
        return out.transpose(0, 1)[None], lse[None]

    return attend


def sequence_by_sequence(attention, inputs: Inputs, lengths, **options: Any):
    """Results of `attention` on each sequence alone, put together again."""
    (query_lengths, key_lengths), parts = lengths, []
    bounds = zip(
        pairwise(accumulate(query_lengths, initial=0)),
        pairwise(accumulate(key_lengths, initial=0)),
        strict=True,
    )
    for (q0, q1), (k0, k1) in bounds:
        one = Inputs(
            inputs.query[:, :, q0:q1],
            inputs.key[:, :, k0:k1],
            inputs.value[:, :, k0:k1],
            inputs.d_out[:, :, q0:q1],
            d_lse=inputs.d_lse[:, :, q0:q1],
        )
        if q1 > q0 and k1 > k0:
            parts.append(run(attention, one, **options)[:5])
        else:
            lse = one.d_lse.to(torch.promote_types(inputs.query.dtype, torch.float32)) * 0
            parts.append((one.query * 0, lse, one.query * 0, one.key * 0, one.value * 0))
    return [torch.cat(column, 2) for column in zip(*parts, strict=True)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("window", (None, (7, 3)), ids=str)
def test_packed_sequences_are_exact(dtype, device, judge, lengths, window):
    total_q, total_k = map(sum, lengths)

    def assert_exact(seeds: Sequence[int]) -> None:
        columns: list[list[list[torch.Tensor]]] = [[], [], []]
        for seed in seeds:
            inputs = make_inputs(
                1,
                2,
                total_q,
                total_k,
                8,
                kv_heads=1,
                dtype=dtype,
                device=device,
                lse_gradient=True,
                seed=seed,
            )
            got = list(run(packed_attention(lengths, device), inputs, window=window)[:5])
            low = sequence_by_sequence(eager_attention, inputs, lengths, window=window)
            true = sequence_by_sequence(padfree.reference, inputs.to(torch.float64), lengths, window=window)
            for column, results in zip(columns, (got, low, true), strict=True):
                results[1] = results[1].masked_fill(results[1] == -torch.inf, 0)
                column.append(results)
        for index, name in enumerate(("out", "lse", "dq", "dk", "dv")):
            tensors = ([results[index] for results in column] for column in columns)
            assert_within_reference_error(
                *tensors, factor=1.5 if index < 2 else 2.0, name=f"{lengths} {name}"
            )

    judge(assert_exact)


@pytest.mark.parametrize("window", (None, (None, 0), (4, 9)), ids=str)
def test_packed_and_padded_sequences_agree_bit_for_bit(dtype, device, window):
    lengths = (5, 33, 1, 17)
    padded = make_inputs(4, 2, 33, 33, 16, dtype=dtype, device=device, lse_gradient=True)
    padding = torch.arange(33, device=device) >= torch.tensor(lengths, device=device)[:, None]
    shown = ~padding

    def pack(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)[shown].transpose(0, 1)[None]

    packed = Inputs(
        *(pack(x) for x in (padded.query, padded.key, padded.value, padded.d_out)), d_lse=pack(padded.d_lse)
    )
    padded = Inputs(**vars(padded) | {"key_padding_mask": padding})
    wanted = run(kernel, padded, window=window, skip_padded_queries=True)
    got = run(packed_attention((lengths, lengths), device), packed, window=window)
    for name, one, other in zip(wanted._fields, got, wanted, strict=True):
        if one is not None:
            assert torch.equal(one, pack(other)), name


@pytest.mark.parametrize("scale", (None, -0.5))
@pytest.mark.parametrize("padding", ("none", "right", "left", "holes", "zero_keys"))
def test_a_fused_buffer_equals_three_tensors_bit_for_bit(dtype, device, padding, scale):
    inputs = make_inputs(2, 2, 35, 35, 8, dtype=dtype, device=device, padding=padding)
    wanted = run(kernel, inputs, scale=scale, skip_padded_queries=True)
    qkv = (
        torch.stack([inputs.query, inputs.key, inputs.value], 2)
        .permute(0, 3, 2, 1, 4)
        .contiguous()
        .requires_grad_()
    )
    out, lse = qkvpacked_kernel(
        qkv, inputs.key_padding_mask, scale=scale, skip_padded_queries=True, return_lse=True
    )
    (grad,) = torch.autograd.grad(out, qkv, inputs.d_out.transpose(1, 2))
    assert torch.equal(out, wanted.out.transpose(1, 2)) and torch.equal(lse, wanted.lse)
    for index, gradient in enumerate((wanted.dq, wanted.dk, wanted.dv)):
        assert torch.equal(grad[:, :, index], gradient.transpose(1, 2))


def test_a_packed_fused_buffer_equals_three_packed_tensors_bit_for_bit(dtype, device):
    lengths = (5, 0, 33, 17)
    inputs = make_inputs(1, 2, 55, 55, 8, dtype=dtype, device=device)
    wanted = run(packed_attention((lengths, lengths), device), inputs)
    qkv = (
        torch.stack([inputs.query[0], inputs.key[0], inputs.value[0]])
        .permute(2, 0, 1, 3)
        .contiguous()
        .requires_grad_()
    )
    out, lse = qkvpacked_kernel(qkv, cu_seqlens=offsets(lengths, device), max_seqlen=33, return_lse=True)
    (grad,) = torch.autograd.grad(out, qkv, inputs.d_out[0].transpose(0, 1))
    assert torch.equal(out, wanted.out[0].transpose(0, 1)) and torch.equal(lse, wanted.lse[0])
    for index, gradient in enumerate((wanted.dq, wanted.dk, wanted.dv)):
        assert torch.equal(grad[:, index], gradient[0].transpose(0, 1))


def test_the_gradient_of_a_fused_buffer_is_its_only_allocation(device):
    """No cat and no copies: the op's result has the buffer's shape and shares no storage with a larger one."""
    qkv = torch.randn(2, 7, 3, 2, 8, device=device, requires_grad=True)
    out = qkvpacked_kernel(qkv)
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    assert grad.shape == qkv.shape and grad.is_contiguous()
    assert grad.untyped_storage().nbytes() == qkv.numel() * qkv.element_size()


@pytest.mark.parametrize("view", ("heads first", "every second column", "offset"))
def test_packed_tensors_of_any_strides_give_the_same_bits(device, view):
    inputs = make_inputs(1, 2, 38, 38, 8, device=device)
    lengths = (5, 33)
    wanted = run(packed_attention((lengths, lengths), device), inputs)

    def lay(x: torch.Tensor) -> torch.Tensor:
        if view == "heads first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if view == "every second column":
            return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]
        return torch.cat([torch.full_like(x[:, :, :3], torch.nan), x], 2)[:, :, 3:]

    strided = Inputs(*(lay(x) for x in (inputs.query, inputs.key, inputs.value, inputs.d_out)))
    for got, expected in zip(
        run(packed_attention((lengths, lengths), device), strided)[:5], wanted[:5], strict=True
    ):
        assert torch.equal(got, expected)


def test_a_larger_max_seqlen_than_needed_changes_no_bit(device):
    inputs = make_inputs(1, 2, 38, 38, 8, device=device)
    tensors = [x[0].transpose(0, 1) for x in (inputs.query, inputs.key, inputs.value)]
    cu = offsets((5, 33), device)
    assert torch.equal(varlen_kernel(*tensors, cu, cu, 33, 33), varlen_kernel(*tensors, cu, cu, 100, 130))


def test_dropout_on_packed_sequences_is_that_of_the_padded_ones(device):
    lengths = (5, 33)
    padded = make_inputs(2, 2, 33, 33, 16, device=device)
    padding = torch.arange(33, device=device) >= torch.tensor(lengths, device=device)[:, None]
    torch.manual_seed(3)
    wanted = kernel(padded.query, padded.key, padded.value, padding, dropout_p=0.4)
    cu = offsets(lengths, device)
    torch.manual_seed(3)
    packed = (x.transpose(1, 2)[~padding] for x in (padded.query, padded.key, padded.value))
    assert torch.equal(
        varlen_kernel(*packed, cu, cu, 33, 33, dropout_p=0.4), wanted.transpose(1, 2)[~padding]
    )
