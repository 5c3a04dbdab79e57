"""Output, LSE and every gradient against fp64 under the error rule of padfree.testing: the numeric sweep.

Each class of cases runs with every seed of conftest.py. Sizes are small because the interpreter is slow; the odd ones
stand just beside a tile's edge (16, 32, 64) or a power of two.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch

import padfree
from padfree._checks import KERNEL_DTYPES
from padfree._triton import configs
from padfree._triton.configs import TABLE
from padfree.testing import PADDING_PATTERNS, Inputs, assert_matches_reference, make_inputs

kernel = partial(padfree.attention, impl="triton")

HEAD_DIMS = (1, 2, 3, 8, 15, 16, 17, 24, 40, 48, 59, 64, 80, 96, 111, 128, 160, 192, 256)
WINDOWS = ((None, 0), (0, None), (3, 0), (2, 5), (0, 1), (None, 3), (20, 20))
# what a mask of [B, H, M, N] may leave to broadcasting, and forms with fewer dimensions
ATTN_MASK_FORMS = ("BHMN", "1HMN", "B1MN", "11MN", "BH1N", "BHM1", "B11N", "1111", "HMN", "MN", "N")


@pytest.fixture
def check(dtype, device, judge):
    """Judge the kernel on one class of cases, a call for each seed."""

    def check(*shape: int, attn_mask: Any = None, **arguments: Any) -> None:
        names = ("kv_heads", "padding", "magnitude", "lse_gradient")
        built = {name: arguments.pop(name) for name in names if name in arguments}

        def assert_exact(seeds: Sequence[int]) -> None:
            calls = [make_inputs(*shape, dtype=dtype, device=device, seed=seed, **built) for seed in seeds]
            if attn_mask is not None:
                calls = [attn_mask(call, seed) for call, seed in zip(calls, seeds, strict=True)]
            assert_matches_reference(kernel, calls, name=f"{shape} {built} {arguments}", **arguments)

        judge(assert_exact)

    return check


@pytest.mark.parametrize("padding", PADDING_PATTERNS)
def test_any_padding_pattern_is_exact(check, padding):
    check(2, 1, 33, 33, 16, padding=padding)
    check(2, 1, 5, 70, 8, padding=padding)


@pytest.mark.parametrize("padding", PADDING_PATTERNS)
def test_skipped_queries_are_zero_and_the_rest_exact(check, padding):
    check(2, 1, 67, 67, 8, padding=padding, skip_padded_queries=True)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_any_head_dim_is_exact(check, head_dim):
    check(2, 1, 19, 18, head_dim, padding="right")


@pytest.mark.parametrize("length", (2, 3, 5, 15, 16, 17, 31, 32, 63, 64, 65, 129))
def test_any_length_is_exact(check, length):
    check(1, 1, length, length, 8)


@pytest.mark.parametrize("queries, keys", ((1, 2), (1, 33), (2, 65), (40, 3), (66, 2), (33, 64)))
def test_queries_and_keys_may_differ_in_number(check, queries, keys):
    check(2, 1, queries, keys, 16, padding="zero_keys")


@pytest.mark.parametrize("padding", ("right", "left", "holes", "zero_keys"))
def test_one_query_against_a_padded_sequence_is_exact(check, padding):
    check(2, 2, 1, 70, 59, padding=padding)
    check(2, 4, 1, 40, 8, padding=padding, kv_heads=2, lse_gradient=True)


@pytest.mark.parametrize("heads, kv_heads", ((4, 1), (4, 2), (6, 3), (3, 3)))
def test_grouped_key_heads_collect_their_queries_gradients(check, heads, kv_heads):
    check(2, heads, 9, 35, 16, kv_heads=kv_heads, padding="holes", window=(8, 8))


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_any_window_is_exact(check, window):
    check(1, 1, 70, 70, 8, window=window)
    check(2, 1, 40, 40, 16, padding="left", window=window, skip_padded_queries=True)
    check(2, 1, 13, 38, 8, padding="both_sides", window=window)


def random_attn_mask(form: str, mask_dtype: torch.dtype):
    """A maker of attn_masks of this broadcast form: 1 and absent letters are broadcast."""

    def add(inputs: Inputs, seed: int) -> Inputs:
        sizes = dict(zip("BHMN", (*inputs.query.shape[:3], inputs.key.shape[2]), strict=True)) | {"1": 1}
        generator = torch.Generator().manual_seed(seed)
        mask = torch.randn([sizes[letter] for letter in form], generator=generator)
        mask = mask > 0.7 if mask_dtype == torch.bool else mask.to(mask_dtype)
        return Inputs(**vars(inputs) | {"attn_mask": mask.to(inputs.query.device)})

    return add


@pytest.mark.parametrize("form", ATTN_MASK_FORMS)
def test_any_broadcast_form_of_attn_mask_is_exact_and_has_its_own_gradient(check, form, dtype):
    check(2, 2, 18, 35, 8, attn_mask=random_attn_mask(form, torch.bool), padding="right")
    check(2, 2, 18, 35, 8, attn_mask=random_attn_mask(form, dtype), padding="holes")
    check(
        2, 4, 34, 34, 8, kv_heads=2, attn_mask=random_attn_mask(form, dtype), window=(6, 9), lse_gradient=True
    )


def test_attn_mask_may_stay_fp32_beside_a_low_precision_query(check):
    check(2, 2, 20, 20, 16, attn_mask=random_attn_mask("BHMN", torch.float32), padding="right")


@pytest.mark.parametrize("padding", ("none", "right", "holes", "zero_keys"))
def test_gradient_through_lse_is_exact(check, padding):
    check(2, 1, 34, 34, 16, padding=padding, lse_gradient=True, skip_padded_queries=True, window=(9, None))


@pytest.mark.parametrize("scale", (0.0, 1e-30, 1.0, -0.4, 2.5))
def test_any_scale_is_exact(check, scale):
    check(2, 1, 35, 35, 16, padding="right", scale=scale)


@pytest.mark.parametrize("magnitude", (1e-3, 3.0, 8.0))
def test_peaked_and_flat_weights_are_exact(check, magnitude):
    check(2, 1, 34, 34, 16, padding="left", magnitude=magnitude)


@pytest.mark.parametrize("dropout_p", (0.1, 0.6))
@pytest.mark.parametrize("padding", ("none", "right", "holes"))
def test_dropout_drops_the_same_weights_forward_and_backward(dtype, device, judge, padding, dropout_p):
    batch, heads, queries, keys = 2, 2, 20, 35
    identity = torch.eye(keys, dtype=dtype, device=device).expand(batch, heads, keys, keys)
    zeros = identity.new_zeros(batch, heads, queries, keys)
    torch.manual_seed(7)
    # equal weights of 1/N on V = I make the output the dropped weights themselves
    dropped = kernel(zeros, torch.zeros_like(identity), identity, dropout_p=dropout_p) == 0

    def seeded_kernel(*args: Any, **options: Any) -> Any:
        torch.manual_seed(7)
        return kernel(*args, **options)

    def assert_exact(seeds: Sequence[int]) -> None:
        built = {"dtype": dtype, "device": device, "padding": padding}
        calls = [make_inputs(batch, heads, queries, keys, 16, seed=seed, **built) for seed in seeds]
        assert_matches_reference(
            seeded_kernel, calls, dropout_mask=dropped, dropout_p=dropout_p, name=padding
        )

    judge(assert_exact)
    assert (
        abs(dropped.float().mean().item() - dropout_p)
        < 5 * (dropout_p * (1 - dropout_p) / dropped.numel()) ** 0.5
    )


CONFIGS = sorted(
    {(passname, kind, row.config) for (passname, kind, _), rows in TABLE.items() for row in rows}
)


@pytest.mark.parametrize("passname, kind, config", CONFIGS, ids=lambda part: str(part).removeprefix("Config"))
def test_every_configuration_of_the_table_is_exact(passname, kind, config, device, judge, monkeypatch):
    """Forced on a shape it was not chosen for: its tile may be larger or smaller than the sequence."""
    row_for, forced = configs.row_for, configs.Row(config, "forced")
    monkeypatch.setattr(
        configs, "row_for", lambda name, *key: forced if name == passname else row_for(name, *key)
    )
    dtype = torch.float32 if kind == "float" else torch.float16
    queries = 1 if passname == "single_query" else 35

    def assert_exact(seeds: Sequence[int]) -> None:
        calls = [
            make_inputs(2, 1, queries, 67, 24, dtype=dtype, device=device, padding="left", seed=seed)
            for seed in seeds
        ]
        if passname == "attn_mask_gradient":
            mask = random_attn_mask("BHMN", dtype)
            calls = [mask(call, seed) for call, seed in zip(calls, seeds, strict=True)]
        assert_matches_reference(kernel, calls, window=(40, 20), name=str(config))

    judge(assert_exact)


def test_the_table_answers_every_dtype_head_dim_and_length():
    for passname in {passname for passname, _, _ in TABLE}:
        for dtype in KERNEL_DTYPES:
            for head_dim in range(1, 257):
                for length in (1, 400, 1024, 1025, 1 << 20):
                    config = configs.choose(passname, dtype, head_dim, length, torch.device("cpu"))
                    assert min(config[:4]) >= 1
