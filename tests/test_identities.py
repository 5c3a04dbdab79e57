"""Gradients judged without a reference: identities of attention that hold at any size, and finite differences.

They see what a wrong reference would hide. Each identity stands above the lines that hold it.
"""

from functools import partial

import pytest
import torch

import padfree
from padfree.testing import PADDING_PATTERNS, make_inputs, run

kernel = partial(padfree.attention, impl="triton")

SHAPES = ((2, 2, 37, 37, 16), (2, 1, 70, 40, 24))


def assert_sums_agree(
    left: torch.Tensor, right: torch.Tensor, terms: torch.Tensor, dtype: torch.dtype
) -> None:
    """left == right up to the rounding of a sum whose terms have this absolute total."""
    allowed = 4 * torch.finfo(dtype).eps * terms.double() + 1e-6
    assert ((left - right).abs() <= allowed).all(), f"differ by {(left - right).abs().max().item():.2e}"


@pytest.fixture(params=[(padding, shape) for padding in PADDING_PATTERNS for shape in SHAPES], ids=str)
def solved(request, dtype, device):
    """(inputs, results in fp64) of one call."""
    padding, shape = request.param
    inputs = make_inputs(*shape, dtype=dtype, device=device, padding=padding, seed=3)
    results = run(kernel, inputs)
    return (
        inputs.to(torch.float64),
        type(results)(*(None if x is None else x.double() for x in results)),
        dtype,
    )


def test_the_five_identities_of_the_gradient(solved):
    inputs, results, dtype = solved
    live = (results.lse > -torch.inf)[..., None]
    d_out = inputs.d_out.masked_fill(~live, 0)
    # the weights of a live row sum to 1:  sum_n dv = sum_live d_out
    assert_sums_agree(results.dv.sum(2), d_out.sum(2), results.dv.abs().sum(2) + d_out.abs().sum(2), dtype)
    # a key added to all keys moves no weight:  sum_n dk = 0
    magnitude = results.dk.abs().sum(2) + inputs.query.abs().sum(2)
    assert_sums_agree(results.dk.sum(2), torch.zeros_like(results.dk.sum(2)), magnitude, dtype)
    # scores are bilinear in query and key:  <dq, q> = <dk, k>
    by_query = (results.dq * inputs.query).masked_fill(~live, 0)
    key = inputs.key
    value = inputs.value
    if inputs.key_padding_mask is not None:
        hidden = inputs.key_padding_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
    by_key = results.dk * key
    terms = by_query.abs().sum((2, 3)) + by_key.abs().sum((2, 3)) + inputs.query.abs().sum((2, 3))
    assert_sums_agree(by_query.sum((2, 3)), by_key.sum((2, 3)), terms, dtype)
    # out is linear in value:  <dv, v> = <d_out, out>
    by_value, by_out = results.dv * value, d_out * results.out
    terms = by_value.abs().sum((2, 3)) + by_out.abs().sum((2, 3))
    assert_sums_agree(by_value.sum((2, 3)), by_out.sum((2, 3)), terms, dtype)
    # what is hidden has no gradient
    if inputs.key_padding_mask is not None:
        assert not results.dk.masked_select(hidden).any() and not results.dv.masked_select(hidden).any()
        assert not results.dq.masked_select(~live).any()


@pytest.mark.parametrize("window", (None, (None, 0), (5, 3)), ids=str)
def test_the_gradient_of_the_lse_is_the_weights(device, window):
    """d lse_m / d score_mn = weight_mn, so that <dq, q> = sum_mn weight_mn * score_mn when d_lse = 1."""
    inputs = make_inputs(2, 2, 20, 20, 16, device=device, padding="right")
    query, key = inputs.query.requires_grad_(), inputs.key.requires_grad_()
    _, lse = kernel(query, key, inputs.value, inputs.key_padding_mask, window=window, return_lse=True)
    live = lse > -torch.inf
    (dq, dk) = torch.autograd.grad(lse[live].sum(), (query, key))
    scores = padfree.reference(
        query, key, inputs.value, inputs.key_padding_mask, window=window, return_lse=True
    )[1]
    (wanted_q, wanted_k) = torch.autograd.grad(scores[live].sum(), (query, key))
    torch.testing.assert_close(dq, wanted_q, rtol=0, atol=2e-6)
    torch.testing.assert_close(dk, wanted_k, rtol=0, atol=2e-6)


@pytest.mark.parametrize("queries", (1, 5))
@pytest.mark.parametrize("options", ({}, {"window": (2, 1)}, {"scale": -0.8}), ids=str)
def test_finite_differences_agree_in_the_fast_mode_of_gradcheck(device, queries, options):
    inputs = make_inputs(2, 2, queries, 6, 8, device=device, padding="right", seed=1)
    leaves = [x.requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]

    def attend(*tensors):
        return kernel(*tensors, inputs.key_padding_mask, **options)

    assert torch.autograd.gradcheck(attend, leaves, eps=1e-2, atol=1e-2, rtol=1e-2, fast_mode=True)


def test_finite_differences_agree_for_a_float_mask_and_the_lse(device):
    inputs = make_inputs(2, 2, 5, 6, 8, device=device, seed=2)
    bias = torch.randn(2, 1, 5, 6, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    leaves = [x.requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]

    def attend(query, key, value, bias):
        return kernel(query, key, value, attn_mask=bias, return_lse=True)

    assert torch.autograd.gradcheck(attend, (*leaves, bias), eps=1e-2, atol=1e-2, rtol=1e-2, fast_mode=True)


@pytest.mark.parametrize("window", (None, (0, 0)), ids=str)
def test_one_visible_key_takes_all_of_the_gradient(device, dtype, window):
    """P = 1: dv is d_out, and dq and dk vanish up to the rounding of delta = <out, d_out>, as no quotient of errors says."""
    inputs = make_inputs(
        2, 1, 20, 20, 16, dtype=dtype, device=device, padding="none" if window else "all", seed=4
    )
    if window is None:
        inputs.key_padding_mask[:, 9] = False
    results = run(kernel, inputs, window=window)
    largest = inputs.key.float().abs().max() * inputs.query.float().abs().max()
    bound = 16 * 16 * torch.finfo(torch.float32).eps * largest
    assert results.dq.abs().max() <= bound and results.dk.abs().max() <= 20 * bound
    wanted = inputs.d_out.double().sum(2) if window is None else inputs.d_out.double()
    got = results.dv[:, :, 9].double() if window is None else results.dv.double()
    total = inputs.d_out.double().abs().sum(2).max()
    assert (got - wanted).abs().max() <= 2 * torch.finfo(dtype).eps * total
