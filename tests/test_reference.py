"""The oracle itself: plain loops, torch's own attention and gradcheck say that `reference` is right."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import padfree
from padfree.testing import PADDING_PATTERNS, eager_attention, make_inputs, run

FP64 = torch.float64


def loops(inputs, *, scale=None, window=(None, None), skip_padded_queries=False):
    """(out, lse) one scalar at a time; None of torch's broadcasting is trusted."""
    query, key, value, padding = inputs.query, inputs.key, inputs.value, inputs.key_padding_mask
    batch, heads, queries, head_dim = query.shape
    group = heads // key.shape[1]
    left, right = (math.inf if side is None else side for side in window)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    out, lse = torch.zeros_like(query), torch.full(query.shape[:3], -math.inf, dtype=FP64)
    for b in range(batch):
        for h in range(heads):
            for m in range(queries):
                shown = [n for n in range(key.shape[2]) if m - left <= n <= m + right]
                if padding is not None:
                    shown = [n for n in shown if not padding[b, n]]
                    if skip_padded_queries and padding[b, m]:
                        continue
                if not shown:
                    continue
                scores = [scale * float(query[b, h, m] @ key[b, h // group, n]) for n in shown]
                total = math.fsum(math.exp(score) for score in scores)
                lse[b, h, m] = math.log(total)
                for n, score in zip(shown, scores, strict=True):
                    out[b, h, m] += math.exp(score) / total * value[b, h // group, n]
    return out, lse


@pytest.mark.parametrize("padding", PADDING_PATTERNS)
@pytest.mark.parametrize("window", ((None, None), (None, 0), (2, 1)), ids=str)
def test_reference_equals_loops_over_scalars(padding, window):
    inputs = make_inputs(2, 2, 6, 6, 3, dtype=FP64, kv_heads=1, padding=padding, seed=1)
    for skip in (False, True):
        wanted = loops(inputs, window=window, skip_padded_queries=skip)
        got = padfree.reference(
            inputs.query, inputs.key, inputs.value, inputs.key_padding_mask,
            window=window, skip_padded_queries=skip, return_lse=True,
        )  # fmt: skip
        for actual, expected in zip(got, wanted, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("scale", (None, 0.3))
def test_reference_equals_torch_where_torch_can(causal, scale):
    inputs = make_inputs(2, 4, 7, 9, 5, dtype=FP64, kv_heads=2, seed=2)
    query, key, value = inputs.query, inputs.key, inputs.value
    wanted = scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale, enable_gqa=True)
    got = padfree.reference(query, key, value, scale=scale, window=(None, 0) if causal else None)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ((2, 2, 7, 9), (1, 2, 1, 9), (7, 9), (9,), (2, 1, 7, 1)), ids=str)
def test_attn_mask_is_added_or_hides_as_in_torch(form):
    inputs = make_inputs(2, 2, 7, 9, 5, dtype=FP64, seed=3)
    tensors = inputs.query, inputs.key, inputs.value
    bias = torch.randn(form, dtype=FP64, generator=torch.Generator().manual_seed(3))
    wanted = scaled_dot_product_attention(*tensors, attn_mask=bias.expand(2, 2, 7, 9))
    torch.testing.assert_close(padfree.reference(*tensors, attn_mask=bias), wanted, rtol=1e-12, atol=1e-12)
    hidden = bias > 1.5
    wanted = scaled_dot_product_attention(*tensors, attn_mask=~hidden.expand(2, 2, 7, 9))
    got = padfree.reference(*tensors, attn_mask=hidden)
    live = ~hidden.expand(2, 2, 7, 9).all(-1)
    torch.testing.assert_close(got[live], wanted[live], rtol=1e-12, atol=1e-12)
    assert not got[~live].any()


def test_reference_equals_multihead_attention_with_the_same_padding_mask():
    torch.manual_seed(4)
    module = torch.nn.MultiheadAttention(12, 3, bias=False, batch_first=True, dtype=FP64)
    hidden = torch.randn(2, 6, 12, dtype=FP64)
    padding = torch.arange(6) >= torch.tensor([[6], [4]])
    wanted, _ = module(hidden, hidden, hidden, key_padding_mask=padding)
    query, key, value = (
        (hidden @ w.T).unflatten(-1, (3, 4)).transpose(1, 2) for w in module.in_proj_weight.detach().chunk(3)
    )
    out = padfree.reference(query, key, value, padding)
    got = out.transpose(1, 2).flatten(2) @ module.out_proj.weight.T
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", ("right", "holes", "zero_keys"))
def test_reference_can_be_differentiated_twice(padding):
    inputs = make_inputs(2, 2, 4, 5, 3, dtype=FP64, padding=padding, seed=5)
    leaves = [x.requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
    bias = torch.randn(4, 5, dtype=FP64, requires_grad=True)

    def attend(query, key, value, bias):
        out, lse = padfree.reference(
            query, key, value, inputs.key_padding_mask, attn_mask=bias, return_lse=True
        )
        return out, lse.masked_fill(lse == -math.inf, 0)

    assert torch.autograd.gradcheck(attend, (*leaves, bias))
    assert torch.autograd.gradgradcheck(attend, (*leaves, bias))


@pytest.mark.parametrize("poison", (math.nan, math.inf, 1e300))
def test_what_stands_in_padding_changes_no_bit_of_the_reference(poison):
    inputs = make_inputs(2, 2, 6, 6, 3, dtype=FP64, padding="holes", seed=6)
    clean = run(padfree.reference, inputs)
    hidden = inputs.key_padding_mask[:, None, :, None].expand_as(inputs.key)
    inputs.key[hidden] = poison
    inputs.value[hidden] = poison
    for got, wanted in zip(run(padfree.reference, inputs)[:5], clean[:5], strict=True):
        assert torch.equal(got, wanted)


def test_a_given_dropout_mask_is_replayed_and_the_drawn_one_has_its_probability():
    inputs = make_inputs(1, 1, 4, 5, 5, dtype=FP64, seed=7)
    identity = torch.eye(5, dtype=FP64)[None, None]
    dropped = torch.tensor([True, False, True, False, False]).expand(1, 1, 4, 5)
    full = padfree.reference(inputs.query, inputs.key, identity)
    got = padfree.reference(inputs.query, inputs.key, identity, dropout_p=0.25, dropout_mask=dropped)
    torch.testing.assert_close(got, full.masked_fill(dropped, 0) / 0.75, rtol=1e-12, atol=0)
    torch.manual_seed(0)
    zeros, ones = torch.zeros(4, 4, 20, 2), torch.ones(4, 4, 50, 2)
    kept = padfree.reference(zeros, ones, ones, dropout_p=0.3).mean()
    assert abs(kept - 1) < 0.02


def test_packed_reference_equals_one_sequence_at_a_time():
    inputs = make_inputs(1, 4, 12, 15, 3, dtype=FP64, kv_heads=2, seed=8)
    query, key, value = (x[0].transpose(0, 1) for x in (inputs.query, inputs.key, inputs.value))
    cu_q, cu_k = (
        torch.tensor([0, 5, 5, 12], dtype=torch.int32),
        torch.tensor([0, 0, 6, 15], dtype=torch.int32),
    )
    out, lse = padfree.reference_varlen(query, key, value, cu_q, cu_k, 7, 9, window=(3, 3), return_lse=True)
    assert not out[:5].any() and (lse[:, :5] == -math.inf).all()
    wanted = padfree.reference(
        inputs.query[:, :, 5:], inputs.key[:, :, 6:], inputs.value[:, :, 6:], window=(3, 3), return_lse=True
    )
    assert torch.equal(out[5:], wanted[0][0].transpose(0, 1)) and torch.equal(lse[:, 5:], wanted[1][0])


@pytest.mark.parametrize("padding", PADDING_PATTERNS)
def test_the_eager_attention_of_the_error_rule_agrees_in_fp64(padding):
    inputs = make_inputs(2, 4, 9, 9, 4, dtype=FP64, kv_heads=2, padding=padding, lse_gradient=True, seed=9)
    options = {"window": (4, 2), "skip_padded_queries": True, "scale": -0.7}
    for got, wanted in zip(
        run(eager_attention, inputs, **options)[:5],
        run(padfree.reference, inputs, **options)[:5],
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def test_the_reference_by_name_is_the_reference():
    inputs = make_inputs(2, 2, 6, 6, 3, padding="right")
    tensors = inputs.query, inputs.key, inputs.value, inputs.key_padding_mask
    assert torch.equal(padfree.attention(*tensors, impl="reference"), padfree.reference(*tensors))


def test_auto_tells_the_shapes_of_meta_tensors():
    query = torch.zeros(2, 3, 5, 8, device="meta")
    out, lse = padfree.attention(query, query, query, query.new_zeros(2, 5).bool(), return_lse=True)
    assert (out.shape, out.device.type, lse.shape) == (query.shape, "meta", query.shape[:3])
