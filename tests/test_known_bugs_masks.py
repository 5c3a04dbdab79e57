"""Bugs of masks and padding that other libraries had, replayed by name: each docstring links the report."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from drawn import chosen
from known_bugs import KERNEL, assert_same_bits, fill_padding, kernel_results, sample
from padfree.testing import Inputs, assert_matches_reference, make_inputs
from padfree_bench.measuring.precision import multiplying_by
from sanitizer import poison_empty

INF = float("inf")
DEAD_ROW = 3


def hide_by_padding(inputs: Inputs) -> tuple[Inputs, dict[str, Any]]:
    mask = torch.zeros(2, 18, dtype=torch.bool)
    mask[0] = True
    return replace(inputs, key_padding_mask=mask), {}


def hide_by_bool_mask(inputs: Inputs) -> tuple[Inputs, dict[str, Any]]:
    mask = torch.zeros(18, 18, dtype=torch.bool)
    mask[DEAD_ROW] = True
    return replace(inputs, attn_mask=mask), {}


def hide_by_float_mask(inputs: Inputs) -> tuple[Inputs, dict[str, Any]]:
    mask = torch.zeros(2, 1, 18, 18)
    mask[:, :, DEAD_ROW] = -INF
    return replace(inputs, attn_mask=mask), {}


def hide_by_window(inputs: Inputs) -> tuple[Inputs, dict[str, Any]]:
    return replace(inputs, key=inputs.key[:, :, :12], value=inputs.value[:, :, :12]), {"window": (3, 0)}


def hide_by_window_and_padding(inputs: Inputs) -> tuple[Inputs, dict[str, Any]]:
    mask = torch.zeros(2, 18, dtype=torch.bool)
    mask[:, DEAD_ROW - 1 : DEAD_ROW + 1] = True
    return replace(inputs, key_padding_mask=mask), {"window": (1, 0)}


@pytest.mark.parametrize(
    "hide",
    [hide_by_padding, hide_by_bool_mask, hide_by_float_mask, hide_by_window, hide_by_window_and_padding],
)
def test_a_fully_masked_row_is_zero_with_zero_gradients(
    hide: Callable[[Inputs], tuple[Inputs, dict[str, Any]]],
) -> None:
    """torch#41508, torch#103963, torch#26098: NaN where a query sees no key."""
    calls = [hide(make_inputs(2, 2, 18, 18, 16, dtype=torch.float16, seed=seed)) for seed in range(3)]
    for results in assert_matches_reference(KERNEL, [inputs for inputs, _ in calls], **calls[0][1]):
        dead = results.lse == -INF
        assert dead.any() and not dead.all()
        assert not results.out[dead].signbit().any(), "a row that sees nothing is +0"
        assert not results.dq[dead].any()


def test_a_fully_padded_sample_leaves_shared_weights_their_gradient() -> None:
    """torch#41508: one fully masked row made every in_proj gradient NaN, though the loss ignored that row."""
    torch.manual_seed(0)
    project = torch.nn.Linear(16, 96)
    tokens = torch.randn(2, 9, 16)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[1] = True

    def gradient(batch: int) -> Tensor:
        query, key, value = project(tokens[:batch]).view(batch, 9, 3, 2, 16).permute(2, 0, 3, 1, 4)
        KERNEL(query, key, value, mask[:batch])[0].square().sum().backward()
        assert project.weight.grad is not None
        weight_gradient, project.weight.grad = project.weight.grad, None
        return weight_gradient

    torch.testing.assert_close(gradient(2), gradient(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("filler", [float("nan"), INF, -INF, "max"], ids=str)
def test_what_stands_in_padding_changes_no_bit(dtype: torch.dtype, filler: float | str) -> None:
    """torch#101967, flashinfer#358: NaN and Inf of masked keys leak through 0 * Inf."""
    filler = torch.finfo(dtype).max if isinstance(filler, str) else filler
    inputs = make_inputs(2, 1, 21, 21, 16, dtype=dtype, padding="holes")
    clean, poisoned = kernel_results(inputs), kernel_results(fill_padding(inputs, filler))
    assert_same_bits(poisoned, clean)
    assert inputs.key_padding_mask is not None
    hidden = inputs.key_padding_mask[:, None].expand(2, 1, 21)
    assert not poisoned.dk[hidden].any() and not poisoned.dv[hidden].any()


@pytest.mark.parametrize("padding", ["right", "both_sides", "zero_keys", "all"])
def test_every_element_of_every_result_is_written(padding: str) -> None:
    """fla#892, fla#1158, FBGEMM#5754, apex#1322, torch#176793: rows of torch.empty came back as they were."""
    inputs = replace(
        make_inputs(2, 2, 35, 35, 16, padding=padding, lse_gradient=True), attn_mask=torch.randn(2, 1, 35, 35)
    )
    with poison_empty() as count:
        results = kernel_results(inputs, skip_padded_queries=True)
    assert count.filled >= 6, "out, lse, dq, dk, dv and the mask's gradient were allocated poisoned"
    assert not any(x is not None and x.isnan().any() for x in results)


@pytest.mark.parametrize("logit", [-1e4, -1e5, -1e30])
def test_very_negative_logits_still_average_the_visible_values(logit: float) -> None:
    """flashinfer#4267, ocannl#548, flax#982, apex#93: a finite sentinel beats real scores."""
    inputs = make_inputs(2, 1, 5, 23, 16, padding="both_sides", seed=1)
    inputs = replace(inputs, query=torch.ones_like(inputs.query), key=torch.full_like(inputs.key, logit / 16))
    out = KERNEL(inputs.query, inputs.key, inputs.value, inputs.key_padding_mask, scale=1.0)
    assert inputs.key_padding_mask is not None
    visible = ~inputs.key_padding_mask[:, None, :, None]
    mean = (inputs.value * visible).sum(2, keepdim=True) / visible.sum(2, keepdim=True)
    torch.testing.assert_close(out, mean.expand_as(out))


@pytest.mark.parametrize("padding", ["none", "holes"])
def test_an_additive_mask_of_minus_infinity_means_what_a_bool_mask_does(padding: str) -> None:
    """torch#63271, torch#92554: float and bool masks were read differently, above all beside padding.

    Not bit for bit: adding a bias spends the multiply-add that a bool mask leaves to the exponent.
    """
    inputs = make_inputs(2, 2, 19, 37, 16, padding=padding)
    hidden = chosen(2, 1, 19, 37, share=0.4, seed=3)
    additive = torch.zeros(2, 1, 19, 37).masked_fill(hidden, -INF)
    for mask in (hidden, additive):
        assert_matches_reference(KERNEL, replace(inputs, attn_mask=mask))
    by_float = kernel_results(replace(inputs, attn_mask=additive))
    assert by_float.d_attn_mask is not None and not by_float.d_attn_mask[hidden].any()


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_column_of_the_lowest_float_is_a_bias_and_no_trap(everywhere: bool) -> None:
    """torch#109517, Automodel#2658, transformers#17306: finfo.min added to a score, or to itself, gave -inf or NaN."""
    bias = torch.zeros(1, 1, 1, 20)
    bias[..., :: 1 if everywhere else 3] = torch.finfo(torch.float32).min
    inputs = replace(make_inputs(1, 2, 7, 20, 16, padding="right"), attn_mask=bias)
    results = kernel_results(inputs)
    assert all(x is None or x.isfinite().all() for x in results)
    assert not everywhere or results.out.abs().sum() > 0
    if not everywhere:
        assert_matches_reference(KERNEL, inputs)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.float16], ids=str)
def test_a_0_1_padding_mask_is_refused(dtype: torch.dtype) -> None:
    """torch#86120, torch#86353, torch#136816, torch#137887: 0/1 masks were added to the scores or read upside down."""
    inputs = make_inputs(2, 1, 6, 6, 16, padding="right")
    assert inputs.key_padding_mask is not None
    with pytest.raises(TypeError, match="key_padding_mask must be bool with True = padding"):
        KERNEL(inputs.query, inputs.key, inputs.value, inputs.key_padding_mask.to(dtype))


def test_every_grad_mode_computes_the_same_bits() -> None:
    """torch#97111, torch#86120: the inference fast path took another variant and cut the output short."""
    inputs = make_inputs(2, 2, 17, 17, 16, padding="right")
    call = (inputs.query, inputs.key, inputs.value, inputs.key_padding_mask)
    trained = KERNEL(inputs.query.clone().requires_grad_(), *call[1:])
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            out = KERNEL(*call)
        assert out.shape == trained.shape and torch.equal(out, trained.detach())


@pytest.mark.parametrize("asked", range(1, 16), ids=lambda asked: f"{asked:04b}")
def test_each_gradient_comes_alone_and_unchanged(asked: int) -> None:
    """pytorch#188302: only the mask required a gradient, and the kernel read a null pointer."""
    inputs = replace(make_inputs(1, 1, 5, 7, 16, padding="right"), attn_mask=torch.randn(5, 7))
    every = kernel_results(inputs)
    wanted = (every.dq, every.dk, every.dv, every.d_attn_mask)
    leaves = [x.clone() for x in (inputs.query, inputs.key, inputs.value, inputs.attn_mask) if x is not None]
    for bit, leaf in enumerate(leaves):
        leaf.requires_grad_(bool(asked >> bit & 1))
    out = KERNEL(*leaves[:3], inputs.key_padding_mask, attn_mask=leaves[3])
    out.backward(inputs.d_out)
    for bit, (leaf, gradient) in enumerate(zip(leaves, wanted, strict=True)):
        assert (leaf.grad is not None) == bool(asked >> bit & 1)
        assert leaf.grad is None or (gradient is not None and torch.equal(leaf.grad, gradient))


@pytest.mark.parametrize("padding", ["right", "left", "holes"])
def test_a_sequence_does_not_depend_on_its_neighbours(padding: str) -> None:
    """transformers#29029, IndicBERT#20, mlx-vlm#1946, castor#176: results moved with the batch around a sequence."""
    inputs = make_inputs(3, 2, 37, 37, 16, padding=padding)
    batch = kernel_results(inputs)
    for b in range(3):
        alone = kernel_results(sample(inputs, b))
        assert_same_bits(alone, type(batch)(*(x[b : b + 1] for x in batch[:5])), f"sequence {b}")


def test_a_sequence_does_not_depend_on_how_far_it_is_padded() -> None:
    """transformers#29029: the same tokens padded to another length gave other logits."""
    inputs = make_inputs(1, 2, 11, 11, 16)
    expected = None
    for length in (11, 12, 16, 17, 31, 33, 64, 65):
        grow = (0, 0, 0, length - 11)
        padded = replace(
            inputs,
            **{
                n: torch.nn.functional.pad(getattr(inputs, n), grow, value=7.0)
                for n in ("query", "key", "value", "d_out")
            },
            key_padding_mask=torch.arange(length)[None] >= 11,
        )
        results = kernel_results(padded, skip_padded_queries=True)
        cut = type(results)(*(x[:, :, :11] for x in results[:5]))
        assert_same_bits(cut, cut if expected is None else expected, f"padded to {length}")
        expected = expected or cut


def dropped_weights(seed: int, keys: int = 40) -> tuple[Tensor, Tensor]:
    """(out, dv) with one-hot values, so that out is the dropped weights themselves."""
    torch.manual_seed(seed)
    query, key = torch.zeros(1, 2, keys, keys), torch.zeros(1, 2, keys, keys)
    value = torch.eye(keys).expand(1, 2, keys, keys).clone().requires_grad_()
    out = KERNEL(query, key, value, dropout_p=0.5)
    out.backward(torch.eye(keys).expand(1, 2, keys, keys))
    assert value.grad is not None
    return out.detach(), value.grad


def test_backward_drops_the_weights_that_forward_dropped() -> None:
    """torch#190717, torch#99905, FA#612: forward and backward drew different dropout masks."""
    with multiplying_by("ieee"):  # three TF32 products lose a last bit
        out, dv = dropped_weights(seed=5)
    assert torch.equal(out, dv.transpose(2, 3)), "dV of a one-hot gradient is the transposed weights"
    kept = (out > 0).float()
    assert 0.45 < kept.mean() < 0.55
    torch.testing.assert_close(out.max(), torch.tensor(2 / 40))
    assert not torch.equal(kept[:, 0], kept[:, 1]), "heads draw masks of their own"
    assert not torch.equal(kept, (dropped_weights(seed=6)[0] > 0).float())


def test_dropout_repeats_under_activation_checkpointing() -> None:
    """torch#99905: recomputation in backward drew a new mask."""
    from torch.utils.checkpoint import checkpoint

    inputs = make_inputs(2, 1, 9, 9, 16, padding="right")
    gradients = []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        torch.manual_seed(11)
        query = inputs.query.clone().requires_grad_()
        out = wrap(
            lambda q: KERNEL(q, inputs.key, inputs.value, inputs.key_padding_mask, dropout_p=0.3), query
        )
        out.backward(inputs.d_out)
        gradients.append(query.grad)
    assert gradients[0] is not None and gradients[1] is not None
    assert torch.equal(gradients[0], gradients[1])


class Attend(torch.nn.Module):
    """A module that calls the kernel, to be copied and stored."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(16, 48)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.project(x).unflatten(-1, (3, 1, 16)).permute(2, 0, 3, 1, 4)
        return KERNEL(query, key, value, mask)


def test_a_module_that_calls_the_kernel_can_be_copied_and_stored(tmp_path) -> None:
    """xformers#203, xformers#290, torch#180911: attention objects could not be pickled or deep-copied."""
    module = Attend()
    x, mask = torch.randn(2, 6, 16), torch.zeros(2, 6, dtype=torch.bool)
    wanted = module(x, mask)
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    loaded = Attend()
    loaded.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    for twin in (copy.deepcopy(module), loaded):
        assert torch.equal(twin(x, mask), wanted)
