"""A call in any of its forms, packed, fused or with another mask, gives the same bits through the kernels."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import padfree
from drawn import normal
from known_bugs import assert_same_bits, kernel_results
from padfree.testing import Inputs, Results, make_inputs

HALF = torch.float16


def packed(inputs: Inputs, lengths: list[int]) -> Iterator[Tensor]:
    """query, key, value and d_out as [T, H, D]: the first lengths[b] rows of each sequence."""
    for tensor in (inputs.query, inputs.key, inputs.value, inputs.d_out):
        yield torch.cat([tensor[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths)]).requires_grad_()


@pytest.mark.parametrize("window", [None, (3, 2)])
def test_packed_sequences_equal_padded_ones_bit_for_bit(window: Any) -> None:
    lengths = [5, 70, 0, 33]
    inputs = make_inputs(4, 4, 70, 70, 16, kv_heads=2, dtype=HALF)
    padding = torch.arange(70)[None] >= torch.tensor(lengths)[:, None]
    wanted = kernel_results(
        replace(inputs, key_padding_mask=padding), window=window, skip_padded_queries=True
    )
    query, key, value, d_out = packed(inputs, lengths)
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    call = (query, key, value, ends, ends, 70, 70)
    out, lse = padfree.attention_varlen(*call, window=window, return_lse=True, impl="triton")
    gradients = torch.autograd.grad(out, (query, key, value), d_out.detach())
    for name, got in zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True):
        padded = getattr(wanted, name)
        assert torch.equal(
            got, torch.cat([padded[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths)])
        ), name
    assert torch.equal(lse, torch.cat([wanted.lse[b, :, :n] for b, n in enumerate(lengths)], dim=1))


def test_packed_queries_and_keys_of_unequal_lengths_match_the_reference() -> None:
    queries, keys = torch.tensor([0, 3, 20]).int(), torch.tensor([0, 30, 37]).int()
    call = torch.randn(20, 2, 16), torch.randn(37, 2, 16), torch.randn(37, 2, 16), queries, keys, 17, 30
    torch.testing.assert_close(
        padfree.attention_varlen(*call, impl="triton"), padfree.reference_varlen(*call), rtol=1e-5, atol=1e-6
    )


def test_a_mask_for_each_sequence_is_the_same_in_every_form() -> None:
    inputs = make_inputs(3, 2, 9, 40, 16, padding="right")
    mask = inputs.key_padding_mask
    assert mask is not None and not torch.equal(mask[0], mask[1])
    wanted = kernel_results(inputs)
    for form in (mask[:, None], mask[:, None, None]):
        assert_same_bits(kernel_results(replace(inputs, key_padding_mask=form)), wanted)


@pytest.mark.parametrize("scale", [None, -0.5])
def test_a_fused_buffer_equals_three_tensors_bit_for_bit(scale: float | None) -> None:
    inputs = make_inputs(2, 2, 37, 37, 16, padding="both_sides", lse_gradient=True)
    wanted = kernel_results(inputs, scale=scale, skip_padded_queries=True)
    qkv = (
        torch.stack([inputs.query, inputs.key, inputs.value], 2)
        .permute(0, 3, 2, 1, 4)
        .contiguous()
        .requires_grad_()
    )
    out, lse = padfree.attention_qkvpacked(
        qkv, inputs.key_padding_mask, scale=scale, skip_padded_queries=True, return_lse=True, impl="triton"
    )
    assert inputs.d_lse is not None
    live = lse != -float("inf")
    gradient = torch.autograd.grad(
        [out, lse.masked_fill(~live, 0)],
        qkv,
        [inputs.d_out.transpose(1, 2), inputs.d_lse.masked_fill(~live, 0)],
    )[0]
    dq, dk, dv = gradient.permute(2, 0, 3, 1, 4)
    assert_same_bits(Results(out.transpose(1, 2).detach(), lse.detach(), dq, dk, dv), wanted)


def test_what_lies_beyond_the_longest_length_given_takes_no_part() -> None:
    """A wrong max_seqlen cannot be reported, but its rows are 0 and the other gradients those of the shorter sequence."""
    lengths, most = torch.tensor([70, 20]), 40
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    kept = torch.cat([torch.arange(40), torch.arange(70, 90)])
    cut = torch.tensor([0, 40, 60], dtype=torch.int32)
    query, key, value, d_out = (normal(90, 2, 16, seed=s).half() for s in range(4))

    def results(rows: Tensor, offsets: Tensor) -> list[Tensor]:
        leaves = [x[rows].requires_grad_() for x in (query, key, value)]
        out = padfree.attention_varlen(*leaves, offsets, offsets, most, most, impl="triton")
        return [out, *torch.autograd.grad(out, leaves, d_out[rows])]

    for got, wanted in zip(results(torch.arange(90), cu), results(kept, cut), strict=True):
        assert torch.equal(got[kept], wanted)
        assert not got[40:70].any()
