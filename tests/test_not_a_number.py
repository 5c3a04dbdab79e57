"""NaN where a query may see it must come out, forward and backward: a loss that hides it trains on silently."""

from dataclasses import replace

import pytest
import torch

from drawn import normal
from known_bugs import KERNEL
from padfree.testing import Inputs, make_inputs, run


def poisoned(where: str, queries: int) -> Inputs:
    inputs = make_inputs(1, 2, queries, 40, 16, dtype=torch.float16, padding="right", lse_gradient=True)
    bias = normal(1, 2, queries, 40, seed=3).half()
    inputs = replace(inputs, attn_mask=bias)
    assert inputs.attn_mask is not None
    nan = float("nan")
    match where:
        case "query":
            inputs.query[0, 1, 0, 3] = nan
        case "visible key":
            inputs.key[0, 1, 2, 5] = nan
        case "bias":
            inputs.attn_mask[0, 1, 0, 2] = nan
    return inputs


@pytest.mark.parametrize("where", ("query", "visible key", "bias"))
@pytest.mark.parametrize("queries", (1, 40))
def test_a_visible_nan_reaches_the_output_the_lse_and_the_gradients(where: str, queries: int) -> None:
    """A row's maximum drops NaN, and so does a comparison with the lowest number: neither may pass for "hidden"."""
    results = run(KERNEL, poisoned(where, queries))
    clean = run(KERNEL, poisoned("nowhere", queries))
    assert results.out[0, 1, 0].isnan().all() and results.lse[0, 1, 0].isnan()
    for name in ("dq", "dk", "dv", "d_attn_mask"):
        gradient, unharmed = getattr(results, name), getattr(clean, name)
        assert gradient[0, 1].isnan().any(), name
        assert torch.equal(gradient[0, 0], unharmed[0, 0]), name
    assert torch.equal(results.out[0, 0], clean.out[0, 0])


def test_all_that_one_query_sees_is_nan() -> None:
    inputs = make_inputs(1, 1, 1, 8, 16, padding="one_key")
    inputs.key[~inputs.key_padding_mask[:, None, :, None].expand_as(inputs.key)] = float("nan")  # type: ignore[index]
    out, lse = KERNEL(inputs.query, inputs.key, inputs.value, inputs.key_padding_mask, return_lse=True)
    assert out.isnan().all() and lse.isnan().all()
