"""Work the interpreter repeats or throws away; without it a call, forward and backward, takes 2.6 times as long.

Most of an interpreted kernel's time goes into the Python objects of Triton's front end: the type and the shape of every
intermediate, the rules of promotion and broadcasting of every operation. Here each of them is worked out once.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import FunctionType
from typing import Any, ParamSpec, TypeVar

import numpy as np
import triton.language as tl
from triton.language.core import constexpr, is_builtin
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle, interpreter_semantic

P, R = ParamSpec("P"), TypeVar("R")

_get_np_dtype = interpreter._get_np_dtype
_unwrap_if_constexpr = tl.core._unwrap_if_constexpr
_block_type_init = tl.block_type.__init__
_scalar_constant = TritonSemantic.scalar_constant
_binary_op_type_checking_impl = TritonSemantic.binary_op_type_checking_impl


def with_room_for_callees(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with a frame so large that Python maps its callees' frames together with it.

    Python's frame stack grows by 16 KiB, and shrinks again when a call returns: where a kernel's calls happened to
    cross such an edge, mapping memory took a fifth of the time of a generated test.
    """
    assert isinstance(function, FunctionType)
    function.__code__ = function.__code__.replace(co_stacksize=2**14)
    return function


# types

_INTEGERS = frozenset(tl.dtype.SINT_TYPES + tl.dtype.UINT_TYPES)
_FLOATS = frozenset(tl.dtype.FP_TYPES)
_SCALAR_SHAPE, _SCALAR_NUMEL = tl.tuple([]), constexpr(1)
_block_types: dict[tuple[Any, ...], dict[str, Any]] = {}


@cache
def _scalar_np_dtype(name: str) -> np.dtype:
    return _get_np_dtype(tl.dtype(name))


def get_np_dtype(element_type: tl.dtype) -> np.dtype:
    """The interpreter's own builds a table of all types for every lookup."""
    return (
        _scalar_np_dtype(element_type.name) if type(element_type) is tl.dtype else _get_np_dtype(element_type)
    )


def is_int(self: tl.dtype) -> bool:
    return self.name in _INTEGERS


def is_floating(self: tl.dtype) -> bool:
    return self.name in _FLOATS


def dtype_eq(self: tl.dtype, other: Any) -> bool:
    other = other.value if type(other) is constexpr else other
    return self is other or (isinstance(other, tl.dtype) and self.name == other.name)


def unwrap_if_constexpr(o: Any) -> Any:
    if type(o) is constexpr:
        return o.value
    return _unwrap_if_constexpr(o) if isinstance(o, (list, tuple, tl.tuple, constexpr)) else o


def block_type_init(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
    key = element_ty.name, *[size.value if type(size) is constexpr else size for size in shape]
    known = _block_types.get(key)
    if known is None:
        _block_type_init(self, element_ty, shape)
        shape = tl.tuple([constexpr(size) for size in self.shape])
        known = _block_types[key] = vars(self) | {
            "tensor_shape": shape,
            "tensor_numel": constexpr(self.numel),
        }
    self.__dict__.update(known)


def tensor_init(self: tl.tensor, handle: TensorHandle, type: tl.dtype) -> None:
    self.handle = handle
    self.type = type
    self.dtype = type.scalar
    self.shape, self.numel = (
        (type.tensor_shape, type.tensor_numel) if type.is_block() else (_SCALAR_SHAPE, _SCALAR_NUMEL)
    )


# operands

_constants: dict[tuple[Any, ...], tl.tensor] = {}
# what became of two operands: a tensor's type, a constant's tile
_operands: dict[tuple[Any, ...], list[Any]] = {}


def _shared(tensor: tl.tensor) -> tl.tensor:
    tensor.handle.data.setflags(write=False)
    return tensor


def _fresh(tensor: tl.tensor) -> tl.tensor:
    """A shared constant in a handle of its own: the interpreter's shifts put other data into their operands' handles."""
    return tl.tensor(TensorHandle(tensor.handle.data, tensor.handle.dtype), tensor.type)


def scalar_constant(self: TritonSemantic, value: Any, dtype: tl.dtype) -> tl.tensor:
    key = value, type(value), dtype.name
    constant = _constants.get(key)
    if constant is None:
        constant = _constants[key] = _shared(_scalar_constant(self, value, dtype))
    return _fresh(constant)


def binary_op_type_checking_impl(
    self: TritonSemantic, lhs: Any, rhs: Any, *rules: bool, **named_rules: bool
) -> tuple[tl.tensor, tl.tensor]:
    sides = lhs, rhs
    key = *[s.type.name if type(s) is tl.tensor else (s, type(s)) for s in sides], rules, *named_rules.items()
    known = _operands.get(key)
    if known is None:
        ready = _binary_op_type_checking_impl(self, lhs, rhs, *rules, **named_rules)
        pairs = zip(sides, ready, strict=True)
        _operands[key] = [
            out.type if type(side) is tl.tensor else _fresh(_shared(out)) for side, out in pairs
        ]
        return ready
    left, right = [
        _as_type(self, side, out) if type(side) is tl.tensor else _fresh(out)
        for side, out in zip(sides, known, strict=True)
    ]
    return left, right


def _as_type(semantic: TritonSemantic, tensor: tl.tensor, type: tl.dtype) -> tl.tensor:
    """The tensor promoted and broadcast to this type."""
    if tensor.type.name == type.name:
        return tensor
    tensor = semantic.cast(tensor, type.scalar)
    if tensor.type.name == type.name:
        return tensor
    tile = np.broadcast_to(tensor.handle.data, type.get_block_shapes().values)
    return tl.tensor(TensorHandle(tile, type.scalar), type)


# the language

# it computes every integer operation twice, for an assertion that is off unless `debug` is on
_options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)


def _interpreted(member: Callable[..., Any]) -> Callable[..., Any]:
    # past `builtin` alone: what it wraps may check dtypes
    function = getattr(member, "__wrapped__", member)

    def call(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
        return function(*args, _semantic=interpreter_semantic, **kwargs)

    return call


# found before a launch has replaced any of them
_builtins = {
    package: [(name, _interpreted(member)) for name, member in inspect.getmembers(package, is_builtin)]
    for package in (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
}


def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    """The interpreter's own searches the whole language for its functions in every launch."""
    for name, member in _builtins[package]:
        scope.set_attr(package, name, member)


SPEED_HOOKS: list[tuple[object, str, Any]] = [
    (interpreter, "_get_np_dtype", get_np_dtype),
    (interpreter, "_patch_builtin", patch_builtin),
    (interpreter.interpreter_builder, "options", _options),
    (tl.dtype, "is_int", is_int),
    (tl.dtype, "is_floating", is_floating),
    (tl.dtype, "__eq__", dtype_eq),
    (tl.core, "_unwrap_if_constexpr", unwrap_if_constexpr),
    (tl.block_type, "__init__", block_type_init),
    (tl.tensor, "__init__", tensor_init),
    (TritonSemantic, "scalar_constant", scalar_constant),
    (TritonSemantic, "binary_op_type_checking_impl", binary_op_type_checking_impl),
]
# found before the hooks are installed
PLAIN = [(owner, name, getattr(owner, name)) for owner, name, _ in SPEED_HOOKS]
