"""How kernels are launched: what a launch is made of is kept, so that the next one like it brings no more than pointers.

Describing a call, choosing its configuration and Triton's search for the compiled kernel cost the host several times what
the launch itself does (NOTES.md, "The host binds"). All of it follows from the layouts of the tensors and the options.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import triton
from torch import Tensor
from triton import JITFunction, knobs
from triton.backends import backends
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

MOST_KEPT = 4096
# Whose way from JITFunction.run to the driver was read; others launch in their own.
READ_TRITONS = ("3.6.", "3.7.")


class Launch(NamedTuple):
    """`kernel[grid](**arguments, **options)`: arguments in the kernel's order, and options with its TILE, the last one."""

    grid: tuple[int]
    options: dict[str, Any]
    arguments: dict[str, Any]


class Kept(NamedTuple):
    """A launch without its pointers: the kernel takes `fill(pointers, constants)`."""

    kernel: CompiledKernel
    grid: tuple[int]
    fill: Callable[[list[int], list[Any]], tuple[Any, ...]]
    constants: list[Any]


# By all that decides a launch but for its pointers. No tensor is held.
_kept: dict[tuple[Any, ...], Kept] = {}
# Kernels and shapes met: only what comes again is kept, since many batches have a shape of their own.
_seen: dict[tuple[Any, ...], None] = {}


def forget() -> None:
    """Describe and look up every launch anew, as a change to the table of configurations demands."""
    _kept.clear()


class Pointed(NamedTuple):
    """Tensors as a launch sees them: their pointers, and all else that Triton and the arguments know of them."""

    pointers: list[int]
    layouts: tuple[Any, ...]

    @classmethod
    def at(cls, *tensors: Tensor | None) -> "Pointed":
        pointers: list[int] = []
        layouts: list[Any] = []
        for tensor in tensors:
            if tensor is None:
                layouts.append(None)
            else:
                pointer = tensor.data_ptr()
                pointers.append(pointer)
                layouts += (tensor.dtype, tensor.device, tensor.shape, tensor.stride(), pointer % 16 == 0)
        return cls(pointers, tuple(layouts))


class Asked(Protocol):
    """What a launch wants to know of a call: the tensors that its inputs point to, and all else that decides them."""

    query: Tensor
    key: Tensor

    @property
    def pointed(self) -> Pointed: ...

    @property
    def scalars(self) -> tuple[Any, ...]: ...


def launch(
    kernel: Any, describe: Callable[[], Launch], call: Asked, config: Any, *tensors: Tensor | None
) -> None:
    """Launch `describe()` on the current device and stream; where one like it was kept, with the new pointers only.

    `tensors` are all that the arguments point to after the call's, in their order; `config` is one that was asked for.
    """
    if not _may_go_directly(kernel):
        ordinary_launch(kernel, describe())
        return
    shapes = (kernel.fn, call.query.shape, call.key.shape)
    if shapes not in _seen:
        _make_room(_seen)
        _seen[shapes] = None
        ordinary_launch(kernel, describe())
        return
    device, own = driver.active.get_current_device(), Pointed.at(*tensors)
    pointers = call.pointed.pointers + own.pointers
    key = (kernel.fn, device, config, call.scalars, call.pointed.layouts, own.layouts)
    kept = _kept.get(key)
    if kept is None:
        described = describe()
        _keep(key, ordinary_launch(kernel, described), described, pointers)
        return
    stream, compiled = driver.active.get_current_stream(device), kept.kernel
    # As JITFunction.run ends, without its hooks.
    compiled.run(
        *kept.grid, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
        *kept.fill(pointers, kept.constants),
    )  # fmt: skip


def ordinary_launch(kernel: Any, described: Launch) -> Any:
    """Launch as Triton does; what it ran, or nothing of use in the interpreter."""
    grid, options, arguments = described
    return kernel[grid](**arguments, **options)


def _may_go_directly(kernel: Any) -> bool:
    """Only on an NVIDIA GPU, by a Triton that is known, and where nobody watches its launches."""
    runtime = knobs.runtime
    return (
        isinstance(kernel, JITFunction)  # not the interpreter's
        and triton.__version__.startswith(READ_TRITONS)
        and "nvidia" in backends
        and isinstance(driver.active, backends["nvidia"].driver)
        and not (kernel.pre_run_hooks or runtime.debug or knobs.compilation.instrumentation_mode)
        and runtime.add_stages_inspection_hook is None
        and not (_is_set(runtime.launch_enter_hook) or _is_set(runtime.launch_exit_hook))
    )


def _is_set(hook: Any) -> bool:
    """Whether a hook does anything: Triton's default is a chain without members."""
    return bool(hook.calls) if isinstance(hook, knobs.HookChain) else hook is not None


def _make_room(kept: dict[tuple[Any, ...], Any]) -> None:
    if len(kept) >= MOST_KEPT:
        kept.clear()


def _keep(key: tuple[Any, ...], compiled: Any, described: Launch, pointers: list[int]) -> None:
    # Not what an asynchronous compilation only promises, nor what a hook of Triton's has refused.
    if not isinstance(compiled, CompiledKernel):
        return
    _make_room(_kept)
    grid, options, arguments = described
    found: list[int] = []
    constants: list[Any] = []
    source = _source((*arguments.values(), options["TILE"]), found, constants)
    assert found == pointers, "the tensors are not those of the arguments, in their order"
    _kept[key] = Kept(compiled, grid, _filler(source), constants)


def _source(argument: Any, pointers: list[int], constants: list[Any]) -> str:
    """An expression for the argument in which pointers and constants, which it notes, are members of p and c."""
    if isinstance(argument, Tensor):
        pointers.append(argument.data_ptr())
        return f"p[{len(pointers) - 1}]"
    if isinstance(argument, tuple):
        return f"({''.join([_source(member, pointers, constants) + ',' for member in argument])})"
    constants.append(argument)
    return f"c[{len(constants) - 1}]"


@lru_cache
def _filler(source: str) -> Callable[[list[int], list[Any]], tuple[Any, ...]]:
    """Groups are filled by generated code, as Triton binds arguments: walking them takes ten times as long."""
    return eval(f"lambda p, c: {source}")
