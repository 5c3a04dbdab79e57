"""Work the interpreter repeats or throws away; without it a test-suite of attention kernels runs a third faster."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import FunctionType
from typing import ParamSpec, TypeVar

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

P, R = ParamSpec("P"), TypeVar("R")

_get_np_dtype = interpreter._get_np_dtype


@cache
def _scalar_np_dtype(name: str) -> np.dtype:
    return _get_np_dtype(tl.dtype(name))


def get_np_dtype(element_type: tl.dtype) -> np.dtype:
    """The interpreter's own builds a table of all types for every lookup."""
    return (
        _scalar_np_dtype(element_type.name) if type(element_type) is tl.dtype else _get_np_dtype(element_type)
    )


def with_room_for_callees(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with a frame so large that Python maps its callees' frames together with it.

    Python's frame stack grows by 16 KiB, and shrinks again when a call returns: where a kernel's calls happened to
    cross such an edge, mapping memory took a fifth of the time of a generated test.
    """
    assert isinstance(function, FunctionType)
    function.__code__ = function.__code__.replace(co_stacksize=2**14)
    return function


# it computes every integer operation twice, for an assertion that is off unless `debug` is on
_options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)

SPEED_HOOKS = [
    (interpreter, "_get_np_dtype", get_np_dtype),
    (interpreter.interpreter_builder, "options", _options),
]
