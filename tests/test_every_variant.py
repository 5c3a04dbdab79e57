"""One small case of every variant through the kernels: the first thing to run after a change, in seconds."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import padfree
from drawn import chosen, normal
from known_bugs import KERNEL, assert_same_bits, fill_padding, kernel_results
from padfree.testing import (
    Inputs,
    assert_matches_reference,
    assert_within_reference_error,
    eager_attention,
    make_inputs,
)

HALF = torch.float16

noise = partial(normal, seed=9)
hidden = partial(chosen, share=0.3, seed=8)
inputs_of = partial(partial, make_inputs, lse_gradient=True)

# batch, heads, queries, keys and head_dim of the inputs, and the options of the call
VARIANTS: dict[str, tuple[Callable[..., Inputs], dict[str, Any]]] = {
    "grouped heads, ragged tiles": (inputs_of(2, 4, 37, 70, 24, kv_heads=2, dtype=HALF), {}),
    "bf16, holes": (inputs_of(3, 2, 20, 45, 16, dtype=torch.bfloat16, padding="holes"), {}),
    "causal with a dead sample": (
        inputs_of(2, 1, 45, 45, 16, dtype=HALF, padding="zero_keys"),
        {"window": (None, 0)},
    ),
    "window over several tiles": (inputs_of(1, 1, 150, 150, 16, padding="both_sides"), {"window": (50, 40)}),
    "window open on the right, skipped queries": (
        inputs_of(2, 1, 70, 70, 16, dtype=HALF, padding="left"),
        {"window": (5, None), "skip_padded_queries": True},
    ),
    "window over several tiles, no padding": (inputs_of(1, 1, 150, 150, 16), {"window": (60, 35)}),
    "causal over several half tiles": (inputs_of(1, 1, 140, 140, 16, dtype=HALF), {"window": (None, 3)}),
    "skipped queries with holes": (
        inputs_of(3, 2, 70, 70, 16, dtype=HALF, padding="both_sides"),
        {"skip_padded_queries": True},
    ),
    "keys past one scan of the mask": (inputs_of(2, 1, 3, 600, 16, dtype=HALF, padding="both_sides"), {}),
    "one query": (inputs_of(3, 2, 1, 600, 16, dtype=HALF, padding="holes"), {}),
    "one query of grouped heads": (
        inputs_of(2, 4, 1, 290, 16, kv_heads=2, dtype=HALF, padding="left"),
        {"window": (None, 150), "scale": 0.3},
    ),
    "a scale of its own": (inputs_of(1, 2, 18, 18, 16, dtype=HALF, padding="left"), {"scale": -0.7}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_matches_the_reference(variant: str) -> None:
    inputs, options = VARIANTS[variant]
    assert_matches_reference(KERNEL, [inputs(seed=seed) for seed in (1, 2, 3)], name=variant, **options)


@pytest.mark.parametrize("magnitude", [1.0, 3.0])
def test_fp32_out_and_lse_are_as_exact_as_eager_fp32(magnitude: float) -> None:
    calls = [
        make_inputs(2, 2, 20, 50, 16, padding="holes", magnitude=magnitude, seed=seed) for seed in range(4)
    ]
    entry_points: tuple[Callable[..., Any], ...] = (KERNEL, eager_attention, padfree.reference)
    actual, low, truth = (
        [
            entry_point(
                c.query.to(dtype), c.key.to(dtype), c.value.to(dtype), c.key_padding_mask, return_lse=True
            )
            for c in calls
        ]
        for entry_point, dtype in zip(
            entry_points, (torch.float32, torch.float32, torch.float64), strict=True
        )
    )
    for which, name in enumerate(("out", "lse")):
        assert_within_reference_error(
            *([r[which] for r in results] for results in (actual, low, truth)), name=name
        )


MASKS = {
    "bool per head": lambda b, h, m, n: hidden(h, m, n),
    "bool per sample": lambda b, h, m, n: hidden(b, 1, m, n),
    "bias per element": lambda b, h, m, n: noise(b, h, m, n).masked_fill(hidden(b, h, m, n), -float("inf")),
    "bias per key": lambda b, h, m, n: noise(b, 1, 1, n),
    "bias per head": lambda b, h, m, n: noise(h, 1, 1),
    "bias per row": lambda b, h, m, n: noise(1, 1, m, 1),
    "bias shared by the batch": lambda b, h, m, n: noise(h, m, n),
}


MASK_CASES = [(mask, *case) for mask in MASKS for case in ((21, None), (21, (9, 4)), (1, (0, 30)))]


# the last two are summed over more rows than one tile holds
@pytest.mark.parametrize(
    ("mask", "queries", "window"), [*MASK_CASES, *((f"bias per {x}", 70, None) for x in ("key", "head"))]
)
def test_an_attn_mask_matches_the_reference(mask: str, queries: int, window: Any) -> None:
    shape = (2, 2, queries, 38)
    attn_mask = MASKS[mask](*shape)
    calls = [
        replace(
            make_inputs(*shape, 16, dtype=HALF, padding="right", lse_gradient=True, seed=seed),
            attn_mask=attn_mask if attn_mask.dtype == torch.bool else attn_mask.half(),
        )
        for seed in (1, 2)
    ]
    assert_matches_reference(KERNEL, calls, name=mask, window=window)


@pytest.mark.parametrize("queries", [1, 19])
def test_dropout_matches_the_reference_under_its_own_mask(queries: int) -> None:
    inputs = make_inputs(2, 2, queries, 37, 40, dtype=HALF, padding="right", seed=4)
    inputs = replace(inputs, attn_mask=noise(2, 1, queries, 37).half())

    def seeded(*tensors: Tensor, **options: Any) -> Any:
        torch.manual_seed(3)
        return KERNEL(*tensors, dropout_p=0.3, **options)

    def reference_options(*tensors: Tensor, **options: Any) -> Any:
        return seeded(
            *tensors, **{k: v for k, v in options.items() if k not in ("dropout_p", "dropout_mask")}
        )

    flat = torch.zeros(2, 2, queries, 40), torch.zeros(2, 2, 37, 40), torch.eye(37, 40).expand(2, 2, 37, 40)
    dropped = seeded(*flat)[..., :37] == 0
    assert 0.2 < dropped.float().mean() < 0.4
    assert_matches_reference(reference_options, inputs, dropout_mask=dropped, dropout_p=0.3)


def test_an_explicit_triton_raises_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padfree._dispatch, "why_not_device", lambda *_: "no GPU")
    query = torch.zeros(1, 1, 4, 16)
    with pytest.raises(RuntimeError, match="^impl='triton' cannot run: no GPU; or use impl='reference'$"):
        padfree.attention(query, query, query, impl="triton")


def test_padding_is_inert_on_every_variant() -> None:
    for padding in ("right", "holes", "zero_keys"):
        inputs = replace(
            make_inputs(2, 1, 37, 37, 24, dtype=HALF, padding=padding), attn_mask=noise(1, 1, 37, 37)
        )
        for options in ({}, {"window": (4, 4)}, {"skip_padded_queries": True}):
            assert_same_bits(
                kernel_results(fill_padding(inputs, float("nan")), **options),
                kernel_results(inputs, **options),
                padding,
            )


def test_what_stands_in_skipped_queries_is_inert() -> None:
    inputs = make_inputs(2, 2, 37, 37, 24, padding="holes", lse_gradient=True)
    assert inputs.key_padding_mask is not None
    padded = inputs.key_padding_mask[:, None, :, None]
    nan = float("nan")
    poisoned = replace(
        fill_padding(inputs, nan),
        query=inputs.query.masked_fill(padded, nan),
        d_out=inputs.d_out.masked_fill(padded, nan),
    )
    options = {"skip_padded_queries": True}
    assert_same_bits(kernel_results(poisoned, **options), kernel_results(inputs, **options))


def test_attention_weights_are_those_the_kernel_used() -> None:
    inputs = make_inputs(2, 2, 9, 16, 16, padding="right")
    call = (inputs.query, inputs.key)
    out, lse = KERNEL(*call, inputs.value, inputs.key_padding_mask, scale=0.3, return_lse=True)
    weights = padfree.attention_weights(*call, lse, inputs.key_padding_mask, rows=[0, 5], scale=0.3)
    torch.testing.assert_close(weights @ inputs.value, out[:, :, [0, 5]])


@pytest.mark.parametrize("queries", [1, 20])
def test_the_only_visible_key_gets_no_gradient_in_fp32(queries: int) -> None:
    """One weight of 1, whatever the score: rounding of the LSE or of out must not show in dq and dk."""
    inputs = make_inputs(2, 2, queries, 40, 16, padding="all", lse_gradient=False)
    assert inputs.key_padding_mask is not None
    inputs.key_padding_mask[:, 17] = False
    got = kernel_results(inputs)
    assert got.dq.abs().max() < 1e-10 and got.dk.abs().max() < 1e-10


@pytest.mark.parametrize("queries", [1, 20])
def test_keys_of_equal_score_share_equally_in_fp32(queries: int) -> None:
    """log2(11) lies between the fp32 numbers near an LSE this large: P recomputed from it is off by 3e-5."""
    keys, large = 11, torch.full((1, 1, 20, 16), 8.0)
    value, d_out = torch.randn(1, 1, keys, 16), torch.randn(1, 1, queries, 16)
    query, key = large[:, :, :queries], large[:, :, :keys]
    leaves = [query.clone(), key.clone(), value, torch.zeros(1, 1, queries, keys)]
    out = KERNEL(*(x.requires_grad_() for x in leaves[:3]), attn_mask=leaves[3].requires_grad_(), scale=1.0)
    dq, dk, dv, d_mask = torch.autograd.grad(out, leaves, d_out)
    d_scores = d_out @ (value - value.mean(2, keepdim=True)).mT / keys
    exact = {"rtol": 2e-6, "atol": 2e-6}
    torch.testing.assert_close(dv, (d_out.sum(2, keepdim=True) / keys).expand_as(dv), **exact)
    torch.testing.assert_close(d_mask, d_scores, **exact)
    torch.testing.assert_close(dk, 8.0 * d_scores.sum(2)[..., None].expand_as(dk), rtol=2e-6, atol=4e-5)
    assert dq.abs().max() < 4e-5


def test_heads_merge_without_a_copy(device: torch.device) -> None:
    query = torch.zeros(2, 3, 5, 8, device=device)
    out = padfree.attention(query, query, query, impl="triton")
    assert out.transpose(1, 2).is_contiguous()


def test_the_lse_alone_gives_the_gradient_it_gives_beside_a_zero_one() -> None:
    inputs = make_inputs(1, 2, 9, 16, 16, dtype=HALF, padding="left", lse_gradient=True)
    query = inputs.query.requires_grad_()
    out, lse = KERNEL(query, inputs.key, inputs.value, inputs.key_padding_mask, return_lse=True)
    alone = torch.autograd.grad(lse, query, inputs.d_lse, retain_graph=True)[0]
    assert alone.any()
    assert torch.equal(
        alone, torch.autograd.grad([out, lse], query, [torch.zeros_like(out), inputs.d_lse])[0]
    )


def test_the_output_may_be_changed_in_place() -> None:
    inputs = make_inputs(1, 2, 8, 8, 16, dtype=HALF)
    out = KERNEL(inputs.query.requires_grad_(), inputs.key, inputs.value)
    assert torch.equal(out.detach() * 2, out.mul_(2))
