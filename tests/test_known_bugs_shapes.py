"""Bugs of shapes, strides and numbers that other libraries had, replayed by name: each docstring links the report."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import padfree
from drawn import chosen, normal
from known_bugs import KERNEL, assert_same_bits, kernel_results
from padfree._triton.call import Call
from padfree._triton.configs import TABLE
from padfree.testing import assert_matches_reference, make_inputs

TAIL_LENGTHS = (1, 2, 3, 5, 15, 16, 17, 31, 33, 63, 65, 127, 129)
HEAD_DIMS = (1, 2, 3, 8, 15, 16, 17, 24, 40, 48, 59, 64, 80, 96, 111, 128, 160, 192, 256)


@pytest.mark.parametrize("length", TAIL_LENGTHS)
def test_the_tail_of_a_tile_adds_nothing_to_a_gradient(length: int) -> None:
    """FA#443, FA#1947: rows and keys past the end reached the backward, and large logits overflowed there."""
    # a lone key has dq = 0 and leaves no budget for rounding, so every length is judged beside a longer one
    shapes = [(1, 1, size, size, 16) for size in (length, length + 9)]
    calls = [
        make_inputs(*shape, magnitude=5.0, dtype=torch.float16, seed=s) for shape in shapes for s in (0, 1)
    ]
    assert_matches_reference(KERNEL, calls)


@pytest.mark.parametrize(("queries", "keys"), [(70, 33), (5, 100), (129, 7)])
def test_lengths_need_be_no_multiple_of_a_tile(queries: int, keys: int) -> None:
    """torch#153799, torch#136232, torch#141126: NaN or wrong blocks unless S was a multiple of 128."""
    mask = chosen(queries, keys, share=0.3, seed=2)
    mask[:, 0] = False
    assert_matches_reference(
        KERNEL,
        [
            replace(make_inputs(1, 1, queries, keys, 16, padding="right", seed=s), attn_mask=mask)
            for s in (0, 1)
        ],
    )


@pytest.mark.parametrize("first", [1, 9])
def test_very_short_sequences_are_exact(first: int) -> None:
    """fla#88: lengths up to 8 came out wrong."""
    calls = [
        make_inputs(2, 1, length, length, 16, seed=s) for length in range(first, first + 8) for s in range(2)
    ]
    assert_matches_reference(KERNEL, calls)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim_uses_all_of_its_columns(head_dim: int) -> None:
    """triton#621, sglang#1281, Triton-distributed#202: of 128 columns 64 were used, others crashed."""
    shape = (1, 1, 6, 19, head_dim)
    calls = [
        make_inputs(*shape, padding="right", lse_gradient=True, dtype=torch.float16, seed=s) for s in range(3)
    ]
    assert_matches_reference(KERNEL, calls)


SIZES = ("batch", "heads", "queries", "keys")


@pytest.mark.parametrize("empty", SIZES)
def test_empty_sizes_give_empty_or_zero_results(empty: str, sanitizer_report: Any) -> None:
    """FA#1159, FA#2470, FA#2568, torch#141218, torch#174950: SIGFPE or an illegal instruction on an empty batch."""
    batch, heads, queries, keys = (0 if name == empty else 2 + i for i, name in enumerate(SIZES))
    results = kernel_results(make_inputs(batch, heads, queries, keys, 16, kv_heads=heads))
    assert not any(x.any() for x in (results.out, results.dq, results.dk, results.dv))
    assert bool((results.lse == -float("inf")).all())
    if sanitizer_report is not None and empty != "keys":
        assert sanitizer_report.total["launches"] == 0


def expand_batch(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


def expand_heads(x: Tensor) -> Tensor:
    return x[:, :1].expand_as(x)


def expand_rows(x: Tensor) -> Tensor:
    return x[:, :, :1].expand_as(x)


def every_other_row(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2)[:, :, ::2]


def every_other_column(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 3)[..., ::2]


def columns_first(x: Tensor) -> Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def rows_before_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def inside_a_larger_buffer(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:3], 3 * x.shape[3] + 1), float("nan"))
    wide[..., 1 : 1 + x.shape[3]] = x
    return wide[..., 1 : 1 + x.shape[3]]


def one_value(x: Tensor) -> Tensor:
    return x[:1, :1, :1, :1].expand_as(x)


EXPANDED = [expand_batch, expand_heads, expand_rows]
STRIDED = [every_other_row, every_other_column, columns_first, rows_before_heads, inside_a_larger_buffer]


@pytest.mark.parametrize("view", EXPANDED)
def test_expanded_keys_equal_repeated_ones(view: Callable[[Tensor], Tensor]) -> None:
    """torch#191937: stride-0 keys were wrong where S % 32 == 1."""
    inputs = make_inputs(2, 2, 33, 33, 16, padding="right")
    expanded = replace(inputs, key=view(inputs.key), value=view(inputs.value))
    repeated = replace(expanded, key=expanded.key.contiguous(), value=expanded.value.contiguous())
    assert_same_bits(kernel_results(expanded), kernel_results(repeated))


@pytest.mark.parametrize("view", STRIDED)
def test_any_strides_of_the_inputs_give_the_same_bits(view: Callable[[Tensor], Tensor]) -> None:
    """VeOmni#958: a last dimension whose stride is not 1 was read as if it were."""
    inputs = make_inputs(2, 2, 21, 21, 24, padding="left")
    strided = replace(inputs, query=view(inputs.query), key=view(inputs.key), value=view(inputs.value))
    assert strided.query.stride() != inputs.query.stride()
    assert_same_bits(kernel_results(strided), kernel_results(inputs))


@pytest.mark.parametrize("view", [*EXPANDED, *STRIDED, one_value])
def test_any_strides_of_the_incoming_gradient_give_the_same_bits(view: Callable[[Tensor], Tensor]) -> None:
    """FA#355, torch#194719, TransformerEngine#623, quack#126, cuEquivariance#177: strided dO read as contiguous."""
    inputs = make_inputs(2, 2, 21, 21, 24, padding="left")
    strided = replace(inputs, d_out=view(inputs.d_out))
    contiguous = replace(strided, d_out=strided.d_out.contiguous())
    assert_same_bits(kernel_results(strided), kernel_results(contiguous))


@pytest.mark.parametrize("mask_view", ["expanded", "strided", "sliced", "transposed"])
def test_any_strides_of_the_masks_give_the_same_bits(mask_view: str) -> None:
    """torch#191937: a mask's strides were taken for those of a contiguous one."""
    padding, mask = chosen(3, 19, share=0.3, seed=4), normal(3, 2, 11, 19, seed=5)
    views: dict[str, tuple[Tensor, Tensor]] = {
        "expanded": (padding[:1].expand(3, 19), mask[:, :1, :, :1].expand(3, 2, 11, 19)),
        "strided": (padding.repeat_interleave(2, 1)[:, ::2], mask.repeat_interleave(2, 3)[..., ::2]),
        "sliced": (
            torch.nn.functional.pad(padding, (3, 4), value=True)[:, 3:-4],
            mask.repeat(1, 2, 1, 1)[:, 1:3],
        ),
        "transposed": (padding.t().contiguous().t(), mask.transpose(2, 3).contiguous().transpose(2, 3)),
    }
    inputs = make_inputs(3, 2, 11, 19, 16)
    viewed = replace(inputs, key_padding_mask=views[mask_view][0], attn_mask=views[mask_view][1])
    plain = replace(
        inputs, key_padding_mask=views[mask_view][0].contiguous(), attn_mask=views[mask_view][1].contiguous()
    )
    assert_same_bits(kernel_results(viewed), kernel_results(plain))


CONFIGS = {(c.block_m, c.block_n): c for rows in TABLE.values() for c in (row.config for row in rows)}


@pytest.mark.parametrize("tiles", sorted(CONFIGS), ids=lambda tiles: f"{tiles[0]}x{tiles[1]}")
def test_every_configuration_gives_the_same_answer(
    tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """fla#1228, triton#6547, triton#4217, triton#781, triton#9230: a bad configuration hid behind a good one."""
    config = CONFIGS[tiles]
    monkeypatch.setattr(Call, "config", lambda self, passname: config)
    queries = 1 if tiles[0] == 1 else 70
    calls = [
        make_inputs(1, 1, queries, 70, 16, dtype=torch.float16, padding="both_sides", seed=s) for s in (0, 1)
    ]
    assert_matches_reference(KERNEL, calls, window=(20, 30))


def test_mixed_dtypes_are_refused_and_autocast_works() -> None:
    """xformers#1046, fla#1264, NATTEN#94, torch#111276, apex#1431: half queries met full keys and gave garbage."""
    inputs = make_inputs(1, 1, 5, 5, 16)
    with pytest.raises(TypeError, match="key must have query's dtype torch.float16, got torch.float32"):
        KERNEL(inputs.query.half(), inputs.key, inputs.value)
    project = torch.nn.Linear(16, 48)
    with torch.autocast(inputs.query.device.type, torch.bfloat16):
        query, key, value = project(torch.randn(2, 7, 16)).unflatten(-1, (3, 1, 16)).permute(2, 0, 3, 1, 4)
        out = KERNEL(query, key, value)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert project.weight.grad is not None and bool(project.weight.grad.isfinite().all())


def test_fp32_is_ieee_unless_the_caller_allows_tf32() -> None:
    """triton#1671, triton#1821, triton#8654, triton#5895: tl.dot rounds fp32 operands to TF32 by default."""
    inputs = [make_inputs(1, 1, 33, 33, 32, seed=s) for s in (0, 1)]
    assert_matches_reference(KERNEL, inputs)
    allowed = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(AssertionError, match="exceeds"):
            assert_matches_reference(KERNEL, inputs)
    finally:
        torch.backends.cuda.matmul.fp32_precision = allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("magnitude", [10.0, 1e2, 1e4])
def test_huge_logits_stay_finite(magnitude: float, dtype: torch.dtype) -> None:
    """torch#121558, torch#125674, vllm#56578: logits of 133,120 gave NaN, and the backward saturated."""
    results = kernel_results(make_inputs(1, 2, 17, 17, 16, magnitude=magnitude, dtype=dtype, padding="right"))
    assert all(x.isfinite().all() for x in (results.out, results.dq, results.dk, results.dv))
    assert results.lse.abs().max() > magnitude


@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-30, 1.0, 2.0])
def test_any_finite_scale_is_right(scale: float) -> None:
    """torch#105190: a negative scale turned the softmax upside down."""
    calls = [make_inputs(2, 1, 18, 18, 16, padding="right", dtype=torch.float16, seed=s) for s in range(3)]
    assert_matches_reference(KERNEL, calls, scale=scale)


def test_denormal_weights_keep_an_absolute_floor() -> None:
    """torch#125557, triton#5735: weights below 2^-126 were flushed, or were not, without a stated bound."""
    keys = 24
    query, key = torch.ones(1, 1, 1, 16), torch.zeros(1, 1, keys, 16)
    # logits fall from 0 to -103, where exp reaches the last denormal; the last 16 weights are read off one by one
    key[0, 0, :, 0] = -torch.linspace(0, 103, keys)
    value = torch.eye(keys)[None, None, :, -16:]
    out, lse = KERNEL(query, key, value, scale=1.0, return_lse=True)
    truth = padfree.reference(query.double(), key.double(), value.double(), scale=1.0)
    assert isinstance(truth, Tensor) and 0 < truth.min() < 2**-126
    # a logit of 100 is known to an ulp of 2^-17, and so is the logarithm of its weight
    assert bool(((out.double() - truth).abs() <= 2**-126 * keys + truth * 2**-15).all())
    assert bool(lse.isfinite().all())


def test_meta_strides_are_the_real_ones() -> None:
    """torch#147701, cuEquivariance#223, FastVideo#1647: the compiled graph trusted strides that were not the real ones."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = make_inputs(3, 2, 7, 7, 16)
    arguments = [
        x.transpose(1, 2).contiguous().transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value)
    ]
    rest = (*[None] * 7, 7, 7, 0.25, 0.0, -1, -1, False)
    real = torch.ops.padfree.forward(*arguments, *rest)
    gradients = torch.ops.padfree.backward(*real[:2], inputs.d_out, None, *arguments, *rest, False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) for x in arguments]
        fake = torch.ops.padfree.forward(*fakes, *rest)
        fake_gradients = torch.ops.padfree.backward(
            *fake[:2], mode.from_tensor(inputs.d_out), None, *fakes, *rest, False
        )
    assert real[0].transpose(1, 2).is_contiguous(), "heads are merged after attention without a copy"
    for got, wanted in zip((*fake, *fake_gradients), (*real, *gradients), strict=True):
        assert (got.shape, got.stride(), got.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)


def test_a_second_derivative_is_refused_with_a_hint() -> None:
    """torch#116350, FA#699, pytorch#92348: double backward returned a silent zero."""
    inputs = make_inputs(1, 1, 4, 4, 16)
    query = inputs.query.requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable once.*impl='reference'"):
        torch.autograd.grad(KERNEL(query, inputs.key, inputs.value).sum(), query, create_graph=True)
