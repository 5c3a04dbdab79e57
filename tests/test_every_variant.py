"""One small case of every variant through the kernels: the first thing to run after a change, in seconds."""

from collections.abc import Callable, Iterator
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
    Results,
    assert_matches_reference,
    assert_within_reference_error,
    eager_attention,
    make_inputs,
)

HALF = torch.float16


noise = partial(normal, seed=9)
hidden = partial(chosen, share=0.3, seed=8)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grouped heads, ragged tiles": (
        {"batch": 2, "heads": 4, "kv_heads": 2, "queries": 37, "keys": 70, "head_dim": 24, "dtype": HALF},
        {},
    ),
    "bf16, holes": (
        {
            "batch": 3,
            "heads": 2,
            "queries": 20,
            "keys": 45,
            "head_dim": 16,
            "dtype": torch.bfloat16,
            "padding": "holes",
        },
        {},
    ),
    "causal with a dead sample": (
        {
            "batch": 2,
            "heads": 1,
            "queries": 45,
            "keys": 45,
            "head_dim": 16,
            "dtype": HALF,
            "padding": "zero_keys",
        },
        {"window": (None, 0)},
    ),
    "window over several tiles": (
        {"batch": 1, "heads": 1, "queries": 150, "keys": 150, "head_dim": 16, "padding": "both_sides"},
        {"window": (50, 40)},
    ),
    "window open on the right, skipped queries": (
        {"batch": 2, "heads": 1, "queries": 70, "keys": 70, "head_dim": 16, "dtype": HALF, "padding": "left"},
        {"window": (5, None), "skip_padded_queries": True},
    ),
    "window over several tiles, no padding": (
        {"batch": 1, "heads": 1, "queries": 150, "keys": 150, "head_dim": 16, "padding": "none"},
        {"window": (60, 35)},
    ),
    "causal over several half tiles": (
        {
            "batch": 1,
            "heads": 1,
            "queries": 140,
            "keys": 140,
            "head_dim": 16,
            "dtype": HALF,
            "padding": "none",
        },
        {"window": (None, 3)},
    ),
    "skipped queries with holes": (
        {
            "batch": 3,
            "heads": 2,
            "queries": 70,
            "keys": 70,
            "head_dim": 16,
            "dtype": HALF,
            "padding": "both_sides",
        },
        {"skip_padded_queries": True},
    ),
    "keys past one scan of the mask": (
        {
            "batch": 2,
            "heads": 1,
            "queries": 3,
            "keys": 600,
            "head_dim": 16,
            "dtype": HALF,
            "padding": "both_sides",
        },
        {},
    ),
    "one query": (
        {
            "batch": 3,
            "heads": 2,
            "queries": 1,
            "keys": 600,
            "head_dim": 16,
            "dtype": HALF,
            "padding": "holes",
        },
        {},
    ),
    "one query of grouped heads": (
        {
            "batch": 2,
            "heads": 4,
            "kv_heads": 2,
            "queries": 1,
            "keys": 290,
            "head_dim": 16,
            "dtype": HALF,
            "padding": "left",
        },
        {"window": (None, 150), "scale": 0.3},
    ),
    "a scale of its own": (
        {"batch": 1, "heads": 2, "queries": 18, "keys": 18, "head_dim": 16, "dtype": HALF, "padding": "left"},
        {"scale": -0.7},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_matches_the_reference(variant: str) -> None:
    shape, options = VARIANTS[variant]
    assert_matches_reference(
        KERNEL,
        [make_inputs(**shape, lse_gradient=True, seed=seed) for seed in (1, 2, 3)],
        name=variant,
        **options,
    )


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


def test_an_explicit_triton_raises_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padfree._dispatch, "why_not_device", lambda *_: "no GPU")
    query = torch.zeros(1, 1, 4, 16)
    with pytest.raises(RuntimeError, match="^impl='triton' cannot run: no GPU; or use impl='reference'$"):
        padfree.attention(query, query, query, impl="triton")


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


def test_what_lies_beyond_the_longest_length_given_takes_no_part() -> None:
    """A wrong max_seqlen cannot be reported, but its rows are 0 and the other gradients those of the shorter sequence."""
    lengths, most = torch.tensor([70, 20]), 40
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    kept = torch.cat([torch.arange(40), torch.arange(70, 90)])
    cut = torch.tensor([0, 40, 60], dtype=torch.int32)
    query, key, value, d_out = (noise(90, 2, 16, seed=s).half() for s in range(4))

    def results(rows: Tensor, offsets: Tensor) -> list[Tensor]:
        leaves = [x[rows].requires_grad_() for x in (query, key, value)]
        out = padfree.attention_varlen(*leaves, offsets, offsets, most, most, impl="triton")
        return [out, *torch.autograd.grad(out, leaves, d_out[rows])]

    for got, wanted in zip(results(torch.arange(90), cu), results(kept, cut), strict=True):
        assert torch.equal(got[kept], wanted)
        assert not got[40:70].any()


def test_the_output_may_be_changed_in_place() -> None:
    inputs = make_inputs(1, 2, 8, 8, 16, dtype=HALF)
    out = KERNEL(inputs.query.requires_grad_(), inputs.key, inputs.value)
    assert torch.equal(out.detach() * 2, out.mul_(2))
