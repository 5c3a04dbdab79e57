"""A GPU that is not there: PADFREE_STANDIN_GPU=1 runs the kernels' tests up to the kernel and asks where its tensors are.

torch's meta device stands in for the GPU: the kernel's entry point refuses tensors of the CPU as on a GPU machine, and so does
every operation on tensors of both. Nothing is computed: a test ends, as passed, at its first call that the kernel would
take, or where it looks at a number. TRITON_INTERPRET=0 leaves the interpreter's checker out.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.utils._device

ACTIVE = os.environ.get("PADFREE_STANDIN_GPU") == "1"
# What torch says where a number of a tensor without numbers is asked for.
NO_NUMBERS = ("meta tensor", "Meta tensor", "with Meta", "'Meta' backend", "data-dependent", "autocast")


class Reached(Exception):
    """The call got as far as the kernel."""


def reach(*_: Any) -> Any:
    raise Reached


def with_generator_of_the_device(draw: Callable[..., Any]) -> Callable[..., Any]:
    """torch refuses a generator of another device than the result's, but on the meta device."""

    def checked(*args: Any, generator: torch.Generator | None = None, **kwargs: Any) -> Any:
        device = torch.device(kwargs.get("device") or torch.get_default_device())
        if generator is not None and generator.device.type != device.type:
            raise RuntimeError(f"Expected a {device.type} generator but found {generator.device.type}")
        return draw(*args, generator=generator, **kwargs)

    return checked


def refuse_all_but(device: torch.device | str) -> str | None:
    return None if torch.device(device).type == "meta" else f"no GPU: tensors are on {device}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    if not ACTIVE:
        return (yield)
    from padfree import _dispatch
    from padfree._triton import autograd

    torch.utils._device._device_constructors()  # torch looks its own functions up before they are wrapped
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "why_not_device", refuse_all_but)
        patch.setattr(autograd, "run", reach)
        patch.setattr(autograd, "run_qkvpacked", reach)
        for name in ("rand", "randn", "randint"):
            patch.setattr(torch, name, with_generator_of_the_device(getattr(torch, name)))
        try:
            return (yield)
        except Reached:
            return None
        except (RuntimeError, NotImplementedError) as error:
            if any(words in str(error) for words in NO_NUMBERS):
                return None
            raise
