"""`auto` on a CPU: PyTorch's SDPA under padfree's contract where it can compute the call, the reference where not."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

import padfree
from drawn import chosen, normal
from known_bugs import assert_same_bits, fill_padding
from padfree.testing import (
    PADDING_PATTERNS,
    Inputs,
    assert_within_reference_error,
    eager_attention,
    make_inputs,
    run,
    visible_pairs,
)

FUSED = "_scaled_dot_product_flash_attention_for_cpu"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "skipped queries": {"skip_padded_queries": True},
    "causal": {"window": (None, 0)},
    "window": {"window": (3, 5)},
    "scale": {"scale": 0.7},
}


class Operators(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


@contextmanager
def fused(expected: bool = True) -> Iterator[None]:
    """Assert that SDPA's fused kernel runs in the block, or that it does not."""
    with Operators() as operators:
        yield
    assert (FUSED in operators.names) == expected, sorted(operators.names)


def auto(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    """What `run` asks for: the output that has no LSE beside it in the call, and the LSE of another."""
    lse = padfree.attention(query, key, value, mask, **options)[1]
    return padfree.attention(query, key, value, mask, **options | {"return_lse": False}), lse


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    """SDPA called by hand, for rows that all see a key."""
    keys = {"attn_mask": None, "window": None, "skip_padded_queries": False} | options
    visible = visible_pairs(query, key, mask, keys["attn_mask"], keys["window"], keys["skip_padded_queries"])
    out = scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=options.get("scale"))
    return out, torch.zeros(out.shape[:3])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("padding", PADDING_PATTERNS)
def test_its_output_obeys_the_error_rule(padding: str, options: str, dtype: torch.dtype) -> None:
    calls = [
        make_inputs(3, 4, 37, 37, 16, kv_heads=2, dtype=dtype, padding=padding, seed=s) for s in range(8)
    ]
    outs = []
    for attend in (partial(padfree.attention, impl="auto"), eager_attention, padfree.reference):
        with fused(attend is not eager_attention and attend is not padfree.reference):
            work = torch.float64 if attend is padfree.reference else dtype
            outs.append([attend(*padded_rows(x.to(work)), **OPTIONS[options]) for x in calls])
    assert_within_reference_error(*outs)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("padding", PADDING_PATTERNS)
def test_its_gradients_are_those_of_sdpa_and_zero_where_nothing_is_seen(padding: str, options: str) -> None:
    inputs = make_inputs(3, 4, 37, 37, 16, padding=padding)
    got, oracle = (run(attend, inputs, **OPTIONS[options]) for attend in (auto, padfree.reference))
    for name in ("out", "dq", "dk", "dv"):
        torch.testing.assert_close(getattr(got, name), getattr(oracle, name), rtol=1e-5, atol=1e-4)
    if bool((oracle.lse > -math.inf).all()):
        by_hand = run(sdpa, inputs, **OPTIONS[options])
        for name in ("out", "dq", "dk", "dv"):
            assert torch.equal(getattr(got, name), getattr(by_hand, name)), name


@pytest.mark.parametrize("kind", ["bool", "bias", "bias with -inf", "bf16 bias"])
def test_masks_obey_the_error_rule(kind: str) -> None:
    calls = []
    for seed in range(8):
        inputs = make_inputs(2, 2, 19, 23, 8, padding="holes", seed=seed)
        mask = normal(1, 2, 19, 23, seed=seed)
        hidden = chosen(2, 1, 19, 23, share=0.4, seed=seed)
        hidden[0, 0, 3] = True
        masks = {"bool": hidden, "bias": mask, "bf16 bias": mask.bfloat16()}
        masks["bias with -inf"] = mask.masked_fill(hidden, -math.inf)
        calls.append(replace(inputs, attn_mask=masks[kind]))

    def detached(*tensors: Any, attn_mask: Tensor, **options: Any) -> Any:
        # a bias that wants a gradient is the reference's; 0 stands for it here
        out, lse = auto(*tensors, attn_mask=attn_mask.detach(), **options)
        return out + 0 * attn_mask.float().nan_to_num(
            neginf=0
        ).sum() if attn_mask.is_floating_point() else out, lse

    for inputs in calls:
        with fused():
            got = run(detached, inputs)
        wanted = run(padfree.reference, inputs)
        for name in ("out", "dq", "dk", "dv"):
            torch.testing.assert_close(getattr(got, name), getattr(wanted, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias_dtype", DTYPES.values(), ids=DTYPES.keys())
def test_a_bias_that_does_not_fit_the_querys_dtype_keeps_its_own(
    dtype: torch.dtype, bias_dtype: torch.dtype
) -> None:
    """Beyond the largest fp16, the lowest number of its dtype in a whole row, and steps finer than bf16's."""
    query, key, value = (normal(1, 1, 4, 8, seed=seed, dtype=dtype) for seed in range(3))
    bias = torch.tensor(
        [[0, 3e4, 0, 1], [100.3, 100.7, 100, 0], [0, 1, 2, 3], [0, 0, 0, 0]], dtype=bias_dtype
    )
    bias[3] = torch.finfo(bias_dtype).min
    if bias_dtype != torch.float16:
        bias[0, 1] = 1e5
    got, wanted = (
        padfree.attention(query, key, value, attn_mask=bias, impl=impl) for impl in ("auto", "reference")
    )
    # SDPA rounds the weights, which are at most 1, to query's dtype.
    torch.testing.assert_close(got, wanted, rtol=0, atol=torch.finfo(dtype).eps)


def test_a_bias_may_be_differentiated_through_vmap() -> None:
    query, key, bias = normal(2, 2, 4, 8, seed=0), normal(1, 2, 4, 8, seed=1), normal(2, 4, 4, seed=2)

    def loss(bias: Tensor, impl: str) -> Tensor:
        def one(query: Tensor, bias: Tensor) -> Tensor:
            return padfree.attention(query[None], key, key, attn_mask=bias, impl=impl)[0]

        return torch.func.vmap(one)(query, bias).square().sum()

    got, wanted = (torch.func.grad(loss)(bias, impl) for impl in ("auto", "reference"))
    torch.testing.assert_close(got, wanted)


def test_a_tracer_finds_no_number_that_was_asked_for() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    tensors = padded_rows(make_inputs(2, 2, 9, 9, 8, padding="right"))
    dead = (*tensors[:3], torch.ones_like(tensors[3]))
    graph = make_fx(lambda *x: padfree.attention(*x))(*tensors)
    assert torch.equal(graph(*tensors), padfree.attention(*tensors)) and not graph(*dead).any()
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in tensors]
        assert padfree.attention(*fake).shape == tensors[0].shape


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_window_may_be_wider_than_any_number(impl: str) -> None:
    tensors = padded_rows(make_inputs(1, 1, 5, 5, 8))
    got = padfree.attention(*tensors, window=(10**30, 0), impl=impl)
    assert torch.equal(got, padfree.attention(*tensors, window=(None, 0), impl=impl))


@pytest.mark.parametrize("filler", [math.nan, math.inf])
@pytest.mark.parametrize("padding", ["right", "holes", "zero_keys", "all"])
def test_what_stands_in_padding_changes_no_bit(padding: str, filler: float) -> None:
    inputs = make_inputs(3, 2, 18, 18, 8, padding=padding)
    with fused():
        assert_same_bits(run(auto, fill_padding(inputs, filler)), run(auto, inputs))


def test_rows_without_a_key_are_zero_and_give_zero_whatever_they_hold() -> None:
    inputs = make_inputs(2, 2, 9, 9, 8, padding="zero_keys")
    inputs.query[0] = math.nan
    got = run(auto, inputs)
    for result in (got.out, got.dq, got.dk, got.dv):
        assert not result[0].any() and bool(result.isfinite().all())


def padded_rows(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return inputs.query, inputs.key, inputs.value, inputs.key_padding_mask


def test_what_sdpa_cannot_do_is_computed_by_the_reference() -> None:
    tensors = padded_rows(make_inputs(2, 2, 9, 9, 8, padding="right"))
    bias = normal(9, 9, seed=1).requires_grad_()
    for options in ({"return_lse": True}, {"dropout_p": 0.5}, {"scale": -1.0}, {"attn_mask": bias}):
        results = []
        for impl in ("auto", "reference"):
            torch.manual_seed(2)
            with fused(False):
                results.append(padfree.attention(*tensors, impl=impl, **options))
        got, wanted = (x if isinstance(x, tuple) else (x,) for x in results)
        assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    with fused(False):
        padfree.attention(*tensors, impl="reference")


@pytest.mark.parametrize("empty", ["batch", "heads", "queries", "keys"])
def test_empty_calls_are_as_the_reference_has_them(empty: str) -> None:
    sizes = {"batch": 2, "heads": 2, "queries": 3, "keys": 4, "head_dim": 8} | {empty: 0}
    tensors = padded_rows(make_inputs(**sizes))
    assert torch.equal(padfree.attention(*tensors), padfree.attention(*tensors, impl="reference"))


def test_packed_and_fused_buffers_take_it_too() -> None:
    cu = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    packed = [normal(9, 2, 8, seed=seed) for seed in range(3)]
    with fused():
        got = padfree.attention_varlen(*packed, cu, cu, 5, 5)
    wanted = padfree.reference_varlen(*packed, cu, cu, 5, 5)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    qkv = torch.stack(packed, 1)
    with fused():
        assert torch.equal(padfree.attention_qkvpacked(qkv, cu_seqlens=cu, max_seqlen=5), got)
    inputs = make_inputs(2, 2, 9, 9, 8, padding="right")
    padded = torch.stack([inputs.query, inputs.key, inputs.value], 2).transpose(1, 3)
    with fused():
        got = padfree.attention_qkvpacked(padded, inputs.key_padding_mask)
    assert torch.equal(got, padfree.attention(*padded_rows(inputs)).transpose(1, 2))


@pytest.mark.parametrize("padding", ["right", "zero_keys"])
def test_it_compiles_into_one_graph_and_works_under_torch_func(padding: str) -> None:
    query, key, value, mask = padded_rows(make_inputs(2, 2, 9, 9, 8, padding=padding))
    call = partial(padfree.attention, key_padding_mask=mask)
    wanted = call(query, key, value)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(query, key, value)
    torch.testing.assert_close(compiled, wanted)
    pulled = torch.func.grad(lambda q: call(q, key, value).square().sum())(query)
    leaf = query.clone().requires_grad_()
    torch.testing.assert_close(pulled, torch.autograd.grad(call(leaf, key, value).square().sum(), leaf)[0])


def test_the_interpreter_being_on_does_not_change_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = padded_rows(make_inputs(2, 2, 9, 9, 8, padding="right"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with fused():
        interpreted = padfree.attention(*tensors)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert torch.equal(interpreted, padfree.attention(*tensors))


def test_one_key_head_is_shared_by_a_view(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.extend((key, value))
        return torch.zeros_like(query)

    monkeypatch.setattr(padfree._sdpa, "scaled_dot_product_attention", attend)
    key = torch.randn(2, 1, 40, 8)
    padfree.attention(torch.randn(2, 16, 4, 8), key, key)
    assert [x.shape for x in seen] == [(2, 16, 40, 8)] * 2
    assert {x.untyped_storage().nbytes() for x in seen} == {key.untyped_storage().nbytes()}


@pytest.mark.parametrize("impl", ("auto", "reference"))
def test_gradients_of_packed_tensors_have_their_layout(impl: str) -> None:
    query, key = torch.randn(12, 4, 8, requires_grad=True), torch.randn(12, 2, 8, requires_grad=True)
    qkv, ends = torch.randn(12, 3, 2, 8, requires_grad=True), torch.tensor([0, 5, 12], dtype=torch.int32)
    out = padfree.attention_varlen(query, key, key, ends, ends, 7, 7, impl=impl)
    packed = padfree.attention_qkvpacked(qkv, cu_seqlens=ends, max_seqlen=7, impl=impl)
    for grad in torch.autograd.grad(out.sum() + packed.sum(), (query, key, qkv)):
        assert grad.is_contiguous()
