"""The comparator must be able to fail: what it rejects, and a model of tiles counted by hand."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

import padfree
from padfree.testing import (
    PADDING_PATTERNS,
    Inputs,
    assert_matches_reference,
    assert_within_reference_error,
    eager_attention,
    make_inputs,
    padding_mask,
    run,
    unit_in_last_place,
    visited_tiles,
)

ONES = torch.ones(4)
TRUTH = torch.ones(4, dtype=torch.float64)


@pytest.mark.parametrize(
    "actual, low, truth, complaint",
    [
        (torch.tensor([1, 1, 1, math.nan]), ONES, TRUTH, "actual holds NaN or Inf"),
        (torch.tensor([1, 1, 1, math.inf]), ONES, TRUTH, "actual holds NaN or Inf"),
        (ONES, torch.tensor([1, 1, 1, math.nan]), TRUTH, "low holds NaN or Inf"),
        (ONES, ONES, TRUTH * math.nan, "truth holds NaN or Inf"),
        (ONES[:3], ONES, TRUTH, "shape"),
        (ONES.view(2, 2), ONES, TRUTH, "shape"),
        (ONES.half(), ONES, TRUTH, "dtype"),
        (torch.tensor([1, 1, 1, 1 + 5e-7]), ONES, TRUTH, "max error"),
        (torch.zeros(4), ONES, TRUTH, "max error"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_a_wrong_tensor_is_rejected_with_the_reason(actual, low, truth, complaint):
    with pytest.raises(AssertionError, match=complaint):
        assert_within_reference_error(actual, low, truth, name="out")


def test_the_budget_is_the_factor_times_the_error_of_eager_plus_one_ulp():
    ulp = 2.0**-23
    low = ONES + 10 * ulp
    for error, passes in ((16 * ulp, True), (17 * ulp, False)):
        if passes:
            by_max, _ = assert_within_reference_error(ONES + error, low, TRUTH)
            assert by_max == pytest.approx((16 * ulp, 10 * ulp, 16 * ulp), rel=1e-6)
        else:
            with pytest.raises(AssertionError, match="max error"):
                assert_within_reference_error(ONES + error, low, TRUTH)


def test_one_wrong_element_is_not_hidden_by_a_mean_nor_many_small_ones_by_a_max():
    low, truth = torch.ones(1000), torch.ones(1000, dtype=torch.float64)
    low[0] += 1e-3
    for actual, by in (
        (torch.ones(1000).index_fill(0, torch.tensor([5]), 1.1), "max"),
        (torch.ones(1000) + 1e-4, "mean"),
    ):
        with pytest.raises(AssertionError, match=f"{by} error"):
            assert_within_reference_error(actual, low, truth)


def test_empty_tensors_pass_and_zero_truth_leaves_no_slack():
    assert_within_reference_error(torch.ones(0), torch.ones(0), torch.ones(0).double())
    with pytest.raises(AssertionError, match="max error"):
        assert_within_reference_error(torch.full((2,), 1e-30), torch.zeros(2), torch.zeros(2).double())


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("magnitude", (1.0, 1.5, 3.0, 1000.0, 0.07))
def test_a_unit_in_the_last_place_is_the_gap_to_the_next_number(dtype, magnitude):
    x = torch.tensor(magnitude).to(dtype)
    above = torch.nextafter(x, torch.tensor(math.inf).to(dtype))
    assert unit_in_last_place(x.item(), dtype) == (above.double() - x.double()).item()


def spoiled(how: str):
    """An attention with one fault, otherwise the eager one."""

    def attend(query, key, value, key_padding_mask=None, *, scale=None, return_lse=True, **options):
        if how == "mask ignored":
            key_padding_mask = None
        if how == "scale missing":
            scale = 1.0
        if how == "heads transposed":
            key = key.flip(1)
        out, lse = eager_attention(
            query, key, value, key_padding_mask, scale=scale, return_lse=True, **options
        )
        if how == "zero output":
            out = out * 0
        if how == "lse in base 2":
            lse = lse / math.log(2)
        if how == "one row wrong":
            out = out.clone()
            out[-1, -1, -1] *= 1.001
        if how == "gradient doubled":
            out = out * 2 - out.detach()
        if how == "no gradient of key":
            out = (
                eager_attention(query, key.detach(), value, key_padding_mask, scale=scale, **options)
                + 0 * key.sum()
            )
        return out, lse

    return attend


FAULTS = (
    "mask ignored",
    "scale missing",
    "heads transposed",
    "zero output",
    "lse in base 2",
    "one row wrong",
    "gradient doubled",
    "no gradient of key",
)  # fmt: skip


@pytest.mark.parametrize("how", FAULTS)
def test_a_spoiled_attention_is_rejected(how):
    inputs = make_inputs(2, 2, 9, 9, 8, padding="right")
    assert_matches_reference(spoiled("in no way"), inputs)
    with pytest.raises(AssertionError, match=r"error|-inf|exactly 0"):
        assert_matches_reference(spoiled(how), inputs)


def test_a_tiny_value_in_a_dead_row_is_rejected():
    inputs = make_inputs(2, 1, 5, 5, 4, padding="zero_keys")

    def attend(*args, **options):
        out, lse = eager_attention(*args, **options)
        return out + 1e-9, lse

    with pytest.raises(AssertionError, match="exactly 0"):
        assert_matches_reference(attend, inputs)


def test_inputs_repeat_by_seed_and_differ_between_seeds():
    first, again, other = (make_inputs(2, 2, 5, 6, 4, padding="holes", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.query, again.query) and torch.equal(
        first.key_padding_mask, again.key_padding_mask
    )
    assert not torch.equal(first.query, other.query)
    assert make_inputs(1, 4, 2, 3, 4, kv_heads=2).key.shape == (1, 2, 3, 4)
    assert first.to(torch.float64).query.dtype == torch.float64


def test_an_unknown_padding_pattern_is_refused_by_name():
    with pytest.raises(ValueError, match="padding must be one of none, right"):
        make_inputs(1, 1, 2, 2, 4, padding="middle")


def test_the_reference_satisfies_the_rule_against_itself_in_every_dtype():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        calls = [
            make_inputs(2, 2, 20, 20, 8, dtype=dtype, padding="right", lse_gradient=True, seed=s)
            for s in range(4)
        ]
        assert_matches_reference(partial(padfree.attention, impl="reference"), calls, window=(5, 5))


def test_run_returns_the_gradients_autograd_gives():
    inputs = make_inputs(1, 1, 3, 4, 2, dtype=torch.float64)
    results = run(padfree.reference, replace(inputs, attn_mask=torch.zeros(3, 4, dtype=torch.float64)))
    leaves = [x.clone().requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
    padfree.reference(*leaves).backward(inputs.d_out)
    for got, leaf in zip((results.dq, results.dk, results.dv), leaves, strict=True):
        torch.testing.assert_close(got, leaf.grad)
    assert results.d_attn_mask is not None and results.d_attn_mask.shape == (3, 4)
    assert isinstance(inputs, Inputs)


@pytest.mark.parametrize(
    "lengths, window, skip, expected",
    [
        ([64], None, True, (1, 1, 4)),
        ([64], None, False, (2, 2, 4)),
        ([65], None, False, (4, 4, 4)),
        ([65, 10], None, True, (5, 5, 8)),
        ([65, 10], None, False, (6, 6, 8)),
        ([0], None, True, (0, 0, 4)),
        ([128], (None, 0), False, (3, 3, 4)),
        ([128], (0, 0), False, (2, 2, 4)),
        ([128], (0, 1), False, (3, 3, 4)),
    ],
)
def test_visited_tiles_are_those_counted_by_hand(lengths, window, skip, expected):
    padding = torch.arange(128) >= torch.tensor(lengths)[:, None]
    assert tuple(visited_tiles(padding, 128, 64, 64, window=window, skip_padded_queries=skip)) == expected


@pytest.mark.parametrize("pattern", PADDING_PATTERNS)
def test_the_patterns_hide_what_their_names_say(pattern):
    mask = padding_mask(pattern, 4, 9, generator=torch.Generator().manual_seed(0))
    if pattern == "none":
        assert mask is None
        return
    assert mask is not None and mask.shape == (4, 9) and mask.dtype == torch.bool
    visible = {"all": 0, "one_key": 1, "zero_keys": 0}
    if pattern in visible:
        assert (~mask[0]).sum() == visible[pattern]
    elif pattern == "right":
        assert (mask[:, 1:] >= mask[:, :-1]).all()
    elif pattern == "left":
        assert (mask[:, 1:] <= mask[:, :-1]).all()
    elif pattern == "first_tile":
        assert mask[:, :5].all() and not mask[:, 5:].any()
    else:
        assert mask.any() and not mask.all()
