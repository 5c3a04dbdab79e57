"""fp32 by three TF32 products, summed as the matrix units of a GPU sum, under the error rule; and who asks for it."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from drawn import normal
from known_bugs import KERNEL
from padfree._triton import backward, call, configs
from padfree.reference import reference
from padfree.testing import assert_matches_reference, make_inputs, run
from padfree_bench.measuring.precision import ASKED, multiplying_by
from sanitizer import _precision
from sanitizer._matrix_units import AMPERE, HOPPER, MatrixUnits, dot_tf32x3, rounded_to_tf32

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU has matrix units of its own"
)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels choose what they do by the architecture of an H100 or H200."""
    monkeypatch.setattr(configs, "architecture", lambda device: 90)
    with multiplying_by("tf32x3"):
        yield


def pairs(count: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(0)
    for _ in range(count):
        yield tuple(random.standard_normal((2, size, size)).astype(np.float32))


def error(products: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> float:
    return max(float(np.abs(got - true).max()) for got, true in zip(products, exact, strict=True))


def test_three_tf32_products_err_little_more_than_one_rounding() -> None:
    given = list(pairs(4, 32))
    exact = [a.astype(np.float64) @ b.astype(np.float64) for a, b in given]
    fp32 = error([true.astype(np.float32) for true in exact], exact)
    errors = {units: error([dot_tf32x3(a, b, units) for a, b in given], exact) for units in (HOPPER, AMPERE)}
    one = error([rounded_to_tf32(a).astype(np.float64) @ rounded_to_tf32(b) for a, b in given], exact)
    assert fp32 < errors[HOPPER] < errors[AMPERE] < 10 * fp32 < one / 100


def test_a_matrix_unit_cuts_off_and_never_rounds_up() -> None:
    """1 and seven products of 3/4 of its last bit: together five and a quarter bits, of which two fit below the last one."""
    a, b = np.ones((1, 8), np.float32), np.full((8, 1), 0.75 * 2.0**-23, np.float32)
    b[0] = 1.0
    assert dot_tf32x3(a, b, MatrixUnits(8, 2)) == np.float32(1 + 5 * 2.0**-23)
    assert dot_tf32x3(a, b, MatrixUnits(8, 0)) == np.float32(1)
    assert dot_tf32x3(-a, b, MatrixUnits(8, 2)) == np.float32(-1 - 5 * 2.0**-23)


def test_infinity_and_nan_come_through_and_zeros_count_for_nothing() -> None:
    a, b = np.zeros((3, 8), np.float32), np.full((8, 1), 1e-30, np.float32)
    a[0, 0], a[1, 0], a[2, 0] = np.inf, np.nan, 1e-8
    found = dot_tf32x3(a, b, HOPPER)[:, 0]
    assert np.isposinf(found[0]) and np.isnan(found[1]) and found[2] == np.float32(1e-38)


@interpreted
@pytest.mark.parametrize("head_dim, padding", [(8, "holes"), (64, "right")])
def test_the_kernels_obey_the_error_rule(head_dim: int, padding: str, on_hopper: None, judge: Any) -> None:
    judge(
        lambda seeds: assert_matches_reference(
            KERNEL,
            [make_inputs(1, 1, 40, 70, head_dim, padding=padding, lse_gradient=True, seed=s) for s in seeds],
        )
    )


@interpreted
def test_the_gradient_of_a_bias_obeys_the_error_rule(on_hopper: None, judge: Any) -> None:
    def with_bias(seed: int) -> Any:
        inputs = make_inputs(2, 1, 40, 70, 16, padding="left", seed=seed)
        return replace(inputs, attn_mask=normal(1, 1, 40, 70, seed=seed))

    judge(lambda seeds: assert_matches_reference(KERNEL, [with_bias(seed) for seed in seeds]))


@interpreted
def test_one_visible_key_returns_its_value_but_for_the_last_bit(on_hopper: None) -> None:
    """The two TF32 parts of a number hold 23 of its 24 bits; by IEEE products the value comes back whole."""
    query, key, value = (normal(1, 1, 5, 16, seed=seed) for seed in (0, 1, 2))
    hidden = torch.arange(5)[None] != 3
    found = KERNEL(query, key, value, hidden)
    off = (found / value[:, :, 3:4] - 1).abs().max()
    assert 0 < off <= 2.0**-23


@interpreted
def test_one_tf32_product_or_a_lost_small_part_breaks_the_rule(
    on_hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [make_inputs(1, 1, 40, 70, 16, seed=seed) for seed in (0, 1)]
    assert_matches_reference(KERNEL, calls)
    with multiplying_by("tf32"), pytest.raises(AssertionError, match="exceeds"):
        assert_matches_reference(KERNEL, calls)
    without_small_b = lambda a, b, units: dot_tf32x3(a, rounded_to_tf32(b), units)
    monkeypatch.setattr(_precision, "dot_tf32x3", without_small_b)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_matches_reference(KERNEL, calls)


@interpreted
def test_a_pass_that_multiplies_unlike_the_others_errs_more(
    on_hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dk twice as wrong as eager's on an H200: that pass alone took TF32 products, and `inverse` fitted other weights."""
    inputs = make_inputs(1, 1, 150, 150, 64, seed=0)
    truth = run(reference, inputs.to(torch.float64)).dk

    def rms() -> float:
        return float((run(KERNEL, inputs).dk - truth).square().mean().sqrt())

    alike, launch = rms(), backward.launch_key_gradient

    def launch_by_three_products(*args: Any) -> None:
        with multiplying_by("tf32x3"):
            launch(*args)

    monkeypatch.setattr(backward, "launch_key_gradient", launch_by_three_products)
    with multiplying_by("ieee"):
        assert rms() > 1.15 * alike


@pytest.mark.parametrize(
    "arch, dtype, head_dim, asked, expected",
    [
        (90, torch.float32, 8, "none", "tf32x3"),
        (90, torch.float32, 64, "none", "tf32x3"),
        (90, torch.float32, 65, "none", "ieee"),
        (90, torch.float32, 64, "ieee", "ieee"),
        (90, torch.float32, 64, "tf32", "tf32"),
        (90, torch.bfloat16, 64, "tf32", "ieee"),
        (80, torch.float32, 64, "none", "ieee"),
        (100, torch.float32, 64, "none", "ieee"),
        (configs.GFX942, torch.float32, 64, "none", "ieee"),
        (0, torch.float32, 64, "none", "ieee"),
        (80, torch.float32, 64, "tf32", "tf32"),
    ],
)
def test_torchs_setting_chooses_how_fp32_is_multiplied(
    arch: int, dtype: torch.dtype, head_dim: int, asked: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "architecture", lambda device: arch)
    precision = next(name for name, value in ASKED.items() if value == asked)
    with multiplying_by(precision):
        assert call.dot_precision(dtype, head_dim, torch.device("cpu")) == expected


def test_nothing_is_asked_for_by_default_and_the_older_switches_ask() -> None:
    """What torch makes of its settings, which the choice rests on."""
    matmul = torch.backends.cuda.matmul
    assert matmul.fp32_precision == "none"
    try:
        for ask, expected in (
            (lambda: setattr(matmul, "allow_tf32", True), "tf32"),
            (lambda: setattr(matmul, "allow_tf32", False), "ieee"),
            (lambda: torch.set_float32_matmul_precision("high"), "tf32"),
            (lambda: torch.set_float32_matmul_precision("highest"), "ieee"),
        ):
            ask()
            assert matmul.fp32_precision == expected
    finally:
        matmul.allow_tf32 = False
        matmul.fp32_precision = "none"
