"""What the forward promises beyond the numeric sweep of test_backward.py: exact values, extremes, layout, weights."""

import math
from functools import partial

import pytest
import torch

import padfree
from padfree.testing import (
    PADDING_PATTERNS,
    assert_within_reference_error,
    eager_attention,
    make_inputs,
    unit_in_last_place,
)
from padfree_bench.measuring.precision import multiplying_by

kernel = partial(padfree.attention, impl="triton")


def arguments(inputs):
    return inputs.query, inputs.key, inputs.value, inputs.key_padding_mask


@pytest.mark.parametrize("padding", PADDING_PATTERNS)
def test_several_tiles_of_queries_and_keys_are_exact(dtype, device, padding):
    inputs = make_inputs(2, 1, 131, 197, 16, dtype=dtype, device=device, padding=padding)
    got = kernel(*arguments(inputs))
    truth = padfree.reference(*arguments(inputs.to(torch.float64)))
    assert_within_reference_error(got, eager_attention(*arguments(inputs)), truth, name=padding)


@pytest.mark.parametrize("queries", (1, 5, 33))
def test_one_visible_key_returns_its_value_bit_for_bit(dtype, device, queries):
    inputs = make_inputs(3, 2, queries, 70, 24, dtype=dtype, device=device, padding="all")
    shown = (0, 37, 69)
    for b, n in enumerate(shown):
        inputs.key_padding_mask[b, n] = False
    with multiplying_by("ieee"):  # three TF32 products lose a last bit
        out = kernel(*arguments(inputs))
    wanted = torch.stack([inputs.value[b, :, n] for b, n in enumerate(shown)])
    assert torch.equal(out, wanted[:, :, None].expand_as(out))


@pytest.mark.parametrize("queries", (1, 20))
@pytest.mark.parametrize("padding", ("none", "right", "left", "holes"))
def test_equal_logits_average_the_visible_values(dtype, device, padding, queries):
    inputs = make_inputs(3, 2, queries, 70, 16, dtype=dtype, device=device, padding=padding)
    inputs.query.zero_()
    out, lse = kernel(*arguments(inputs), return_lse=True)
    keep = torch.ones(3, 70) if inputs.key_padding_mask is None else (~inputs.key_padding_mask).cpu().double()
    keep = keep.double().to(device)
    mean = torch.einsum("bn,bhnd->bhd", keep, inputs.value.double()) / keep.sum(1)[:, None, None]
    ulp = unit_in_last_place(inputs.value.abs().max().item(), dtype)
    assert (out.double() - mean[:, :, None]).abs().max() <= ulp
    torch.testing.assert_close(
        lse.double(), keep.sum(1).log()[:, None, None].expand_as(lse), rtol=2e-7, atol=2e-7
    )


@pytest.mark.parametrize("logit", (-1e30, -1e5, -6e4, 6e4, 1e8))
def test_any_common_logit_averages_the_values_too(device, logit):
    """A finite sentinel for "masked" would swallow very negative rows, and exp would overflow on the others."""
    inputs = make_inputs(2, 1, 20, 40, 16, device=device, padding="right")
    inputs.query.zero_()
    inputs.key.zero_()
    inputs.query[..., 0] = math.copysign(math.sqrt(abs(logit)), logit)
    inputs.key[..., 0] = math.sqrt(abs(logit))
    out, lse = kernel(*arguments(inputs), scale=1.0, return_lse=True)
    keep = (~inputs.key_padding_mask).double()
    mean = torch.einsum("bn,bhnd->bhd", keep, inputs.value.double()) / keep.sum(1)[:, None, None]
    torch.testing.assert_close(out.double(), mean[:, :, None].expand_as(out), rtol=0, atol=1e-6)
    torch.testing.assert_close(lse, torch.full_like(lse, logit), rtol=1e-4, atol=5.0)


def test_a_power_of_two_passes_through_the_weights_bit_for_bit(dtype, device):
    inputs = make_inputs(2, 2, 20, 40, 16, dtype=dtype, device=device, padding="holes")
    out = kernel(*arguments(inputs))
    scaled = kernel(inputs.query, inputs.key, inputs.value * 4, inputs.key_padding_mask)
    assert torch.equal(scaled, out * 4)


def test_output_stays_inside_the_hull_of_the_visible_values(dtype, device):
    inputs = make_inputs(3, 2, 20, 40, 16, dtype=dtype, device=device, padding="right", magnitude=8.0)
    out = kernel(*arguments(inputs))
    hidden = inputs.key_padding_mask[:, None, :, None]
    low = inputs.value.masked_fill(hidden, math.inf).amin(2, keepdim=True)
    high = inputs.value.masked_fill(hidden, -math.inf).amax(2, keepdim=True)
    ulp = unit_in_last_place(inputs.value.abs().max().item(), dtype)
    assert (out >= low - ulp).all() and (out <= high + ulp).all()


def test_a_key_given_twice_weighs_twice(device):
    inputs = make_inputs(2, 1, 20, 30, 16, device=device)
    twice = kernel(inputs.query, *(torch.cat([x, x[:, :, :1]], 2) for x in (inputs.key, inputs.value)))
    bias = torch.zeros(30, device=device)
    bias[0] = math.log(2)
    torch.testing.assert_close(twice, kernel(*arguments(inputs), attn_mask=bias), rtol=0, atol=1e-6)


def test_a_constant_added_to_a_row_of_scores_moves_only_its_lse(device):
    inputs = make_inputs(2, 2, 20, 30, 16, device=device, padding="right")
    rows = torch.randn(2, 1, 20, 1, generator=torch.Generator().manual_seed(0)).to(device)
    out, lse = kernel(*arguments(inputs), return_lse=True)
    moved_out, moved_lse = kernel(*arguments(inputs), attn_mask=rows, return_lse=True)
    torch.testing.assert_close(moved_out, out, rtol=0, atol=1e-6)
    torch.testing.assert_close(moved_lse, lse + rows[..., 0], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "sizes", ((0, 2, 4, 5), (2, 0, 4, 5), (2, 2, 0, 5), (2, 2, 4, 0), (2, 2, 1, 0)), ids=str
)
def test_empty_sizes_give_empty_or_zero_results(device, sizes):
    batch, heads, queries, _ = sizes
    inputs = make_inputs(*sizes, 8, device=device)
    leaves = [x.requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
    out, lse = kernel(*leaves, return_lse=True)
    assert out.shape == (batch, heads, queries, 8) and lse.shape == (batch, heads, queries)
    assert not out.any() and (lse == -math.inf).all()
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape and not grad.any()


def test_output_lies_in_memory_as_batch_rows_heads_so_that_merging_heads_is_free(device):
    inputs = make_inputs(2, 3, 5, 6, 8, device=device)
    out = kernel(*arguments(inputs))
    assert out.transpose(1, 2).is_contiguous()
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


@pytest.mark.parametrize("padding", ("none", "right", "holes", "zero_keys"))
def test_attention_weights_are_those_of_the_forward(dtype, device, padding):
    inputs = make_inputs(2, 4, 20, 33, 16, dtype=dtype, device=device, kv_heads=2, padding=padding)
    query, key, value, mask = arguments(inputs)
    out, lse = kernel(query, key, value, mask, return_lse=True)
    weights = padfree.attention_weights(query, key, lse, mask, rows=[0, 7])
    live = (lse[:, :, [0, 7]] > -math.inf).float()
    torch.testing.assert_close(weights.sum(-1), live, rtol=0, atol=1e-5)
    if mask is not None:
        assert not weights.masked_select(mask[:, None, None, :]).any()
    values = value.repeat_interleave(2, dim=1).float()
    ulp = unit_in_last_place(1.0, dtype)
    torch.testing.assert_close(weights @ values, out[:, :, [0, 7]].float(), rtol=ulp, atol=max(ulp, 1e-6))


@pytest.mark.parametrize("queries", (1, 20))
def test_grad_modes_and_return_lse_change_no_bit(device, queries):
    inputs = make_inputs(2, 2, queries, 20, 8, device=device, padding="right")
    leaves = [x.requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
    out = kernel(*leaves, inputs.key_padding_mask)
    with torch.no_grad():
        assert torch.equal(kernel(*leaves, inputs.key_padding_mask), out)
    with torch.inference_mode():
        assert torch.equal(kernel(*leaves, inputs.key_padding_mask, return_lse=True)[0], out)
