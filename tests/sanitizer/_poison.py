"""Uninitialised memory made visible: torch.empty and its kin return NaN, or the largest integer, to library code."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

# filling would map every page of a lazily mapped tensor of billions of elements
MAX_POISONED_BYTES = 1 << 28

_ALLOCATORS: list[tuple[Any, str]] = [
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch, "empty_permuted"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
]


@dataclass
class PoisonCount:
    """How many allocations were filled, and how many were left alone for their size."""

    filled: int = 0
    too_large: int = 0


def poison(tensor: Tensor) -> None:
    """Fill a tensor in place with NaN (floating point), the largest value (integers) or True (bool)."""
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(float("nan"))
    elif tensor.dtype == torch.bool:
        tensor.fill_(True)
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).max)


@contextmanager
def poison_empty(modules: tuple[str, ...] = ("padfree",)) -> Iterator[PoisonCount]:
    """Poison the results of torch.empty* called from code of these packages; yields the count."""
    count = PoisonCount()

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.partition(".")[0] not in modules or tensor.device.type == "meta":
                return tensor
            if tensor.untyped_storage().nbytes() > MAX_POISONED_BYTES:
                count.too_large += 1
                return tensor
            with torch.no_grad():
                poison(tensor)
            count.filled += 1
            return tensor

        return allocate_poisoned

    with ExitStack() as stack:
        for owner, name in _ALLOCATORS:
            stack.enter_context(patch.object(owner, name, poisoned(getattr(owner, name))))
        yield count
