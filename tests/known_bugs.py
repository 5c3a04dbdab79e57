"""What the replays of other libraries' bugs and the properties share: the kernel by name, comparison bit for bit."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import padfree
from padfree.testing import Inputs, Results, run

KERNEL: Callable[..., Any] = partial(padfree.attention, impl="triton")


def assert_same_bits(actual: Results, expected: Results, why: str = "") -> None:
    """Every result is equal, NaN nowhere."""
    for field in Results._fields:
        got, wanted = getattr(actual, field), getattr(expected, field)
        assert (got is None) == (wanted is None), f"{why} {field}"
        # torch.equal compares values of different dtypes
        same = got is None or (got.dtype == wanted.dtype and torch.equal(got, wanted))
        assert same, f"{why} {field}: {_difference(got, wanted)}"


def kernel_results(inputs: Inputs, **options: Any) -> Results:
    return run(KERNEL, inputs, **options)


def fill_padding(inputs: Inputs, filler: float) -> Inputs:
    """The same call with `filler` in every padded row of key and value."""
    assert inputs.key_padding_mask is not None
    padded = inputs.key_padding_mask[:, None, :, None]
    return replace(
        inputs, key=inputs.key.masked_fill(padded, filler), value=inputs.value.masked_fill(padded, filler)
    )


def sample(inputs: Inputs, b: int) -> Inputs:
    """Sequence b of a batch, alone."""
    tensors = {
        name: getattr(inputs, name)
        for name in ("query", "key", "value", "d_out", "key_padding_mask", "d_lse")
    }
    return replace(inputs, **{name: x[b : b + 1] for name, x in tensors.items() if x is not None})


def _difference(got: Tensor, wanted: Tensor) -> str:
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return f"{list(got.shape)} {got.dtype} against {list(wanted.shape)} {wanted.dtype}"
    return f"{int((got != wanted).sum())} of {got.numel()} elements differ, by up to {(got - wanted).abs().max():.1e}"
