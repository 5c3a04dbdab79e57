"""The hooks of the sanitizer and the context manager that installs them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle, _get_np_dtype

import padfree._dispatch
from padfree._checks import KERNEL_DTYPES

from ._contraction import CONTRACTION_HOOKS
from ._launch import Launch, ProgramIndex
from ._memory import ADDRESS_MASK
from ._precision import BF16_HOOKS, BF16_NAN, create_atomic_rmw, create_dot, create_dot_with_tf32
from ._reduce import REDUCE_HOOKS
from ._report import Report
from ._speed import PLAIN, SPEED_HOOKS

# private interfaces of the interpreter: the self-test is what notices a change, so a new version is a decision
SUPPORTED_TRITON = ("3.6.", "3.7.")

Hook = tuple[object, str, Any]
ChoosePrograms = Callable[[str, ProgramIndex], Iterable[ProgramIndex] | None]

_create_masked_load = InterpreterBuilder.create_masked_load
_create_masked_store = InterpreterBuilder.create_masked_store
_create_atomic_cas = InterpreterBuilder.create_atomic_cas
_semantic_load = TritonSemantic.load
_implicit_cvt = interpreter._implicit_cvt
_patch_lang = interpreter._patch_lang
_patch_lang_tensor = interpreter._patch_lang_tensor


def poison_value(element_type: tl.dtype) -> Any:
    """What a masked-off lane without `other=` holds: a value no correct kernel lets through to a result."""
    dtype = _get_np_dtype(element_type)
    if element_type == tl.bfloat16:
        return BF16_NAN
    if dtype.kind == "f":
        return np.nan
    return True if dtype.kind == "b" else np.iinfo(dtype).max


def patch_tensor(tensor: type, scope: Any) -> None:
    """What Triton gives tensors in a kernel; 3.6 makes an int of an array, which NumPy 2.4 allows for no dimension only."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


class Sanitizer:
    """Checks every access of the launches made while its hooks are installed."""

    def __init__(self, seed: int, choose_programs: ChoosePrograms, tf32: bool) -> None:
        self.seed = seed
        self.choose_programs = choose_programs
        self.dot = create_dot_with_tf32 if tf32 else create_dot
        self.report = Report()
        self.launch: Launch | None = None
        self.other_given = False

    def hooks(self) -> list[Hook]:
        builder = InterpreterBuilder
        # functions, not bound methods: the interpreter passes its builder or executor as the first argument
        return [
            (GridExecutor, "__call__", lambda *a, **k: self.run(*a, **k)),
            (interpreter, "_implicit_cvt", self.convert_argument),
            (interpreter, "_patch_lang", self.patch_language),
            (interpreter, "_patch_lang_tensor", patch_tensor),
            # What padfree refuses users, these hooks have mended.
            (padfree._dispatch, "why_not_interpreter", lambda: None),
            (padfree._dispatch, "INTERPRETED_DTYPES", KERNEL_DTYPES),
            (TritonSemantic, "load", lambda *a, **k: self.note_other(*a, **k)),
            (builder, "create_masked_load", lambda *a, **k: self.load(*a, **k)),
            (builder, "create_masked_store", lambda *a, **k: self.store(*a, **k)),
            (builder, "create_atomic_rmw", lambda *a, **k: self.atomic_rmw(*a, **k)),
            (builder, "create_atomic_cas", lambda *a, **k: self.atomic_cas(*a, **k)),
            (builder, "create_dot", lambda *a, **k: self.count_dot(*a, **k)),
        ]

    def run(self, executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        launch = Launch(executor, self)
        launch.run(args, kwargs)

    def convert_argument(self, argument: Any) -> Any:
        converted = _implicit_cvt(argument)
        if self.launch is not None and hasattr(argument, "data_ptr"):
            converted.handle.data[0] = self.launch.register(argument)
        return converted

    def patch_language(self, fn: Callable[..., Any]) -> Any:
        return _patch_lang(fn) if self.launch is None else self.launch.patch_language(fn, _patch_lang)

    def note_other(self, semantic: Any, ptr: Any, mask: Any, other: Any, *rest: Any) -> Any:
        # the interpreter drops a scalar `other` that equals 0, so whether one was given is seen only here
        self.other_given = other is not None
        try:
            return _semantic_load(semantic, ptr, mask, other, *rest)
        finally:
            self.other_given = False

    def load(
        self,
        builder: InterpreterBuilder,
        ptrs: TensorHandle,
        mask: TensorHandle,
        other: TensorHandle | None,
        cache_modifier: Any,
        eviction_policy: Any,
        is_volatile: bool,
    ) -> TensorHandle:
        address, active = self._checked("load", ptrs, mask)
        if other is None and not self.other_given and not active.data.all():
            element_type = ptrs.get_element_ty()
            lanes = np.full(address.data.shape, poison_value(element_type), _get_np_dtype(element_type))
            other = TensorHandle(lanes, element_type)
        return _create_masked_load(
            builder, address, active, other, cache_modifier, eviction_policy, is_volatile
        )

    def store(
        self,
        builder: InterpreterBuilder,
        ptrs: TensorHandle,
        value: TensorHandle,
        mask: TensorHandle,
        cache_modifier: Any,
        eviction_policy: Any,
    ) -> Any:
        address, active = self._checked("store", ptrs, mask)
        return _create_masked_store(builder, address, value, active, cache_modifier, eviction_policy)

    def atomic_rmw(
        self,
        builder: InterpreterBuilder,
        operation: Any,
        ptr: TensorHandle,
        val: TensorHandle,
        mask: TensorHandle,
        sem: Any,
        scope: Any,
    ) -> TensorHandle:
        address, active = self._checked("atomic", ptr, mask)
        return create_atomic_rmw(builder, operation, address, val, active, sem, scope)

    def atomic_cas(
        self,
        builder: InterpreterBuilder,
        ptr: TensorHandle,
        cmp: TensorHandle,
        val: TensorHandle,
        sem: Any,
        scope: Any,
    ) -> TensorHandle:
        everywhere = TensorHandle(np.ones(ptr.data.shape, dtype=bool), tl.int1)
        address, active = self._checked("atomic", ptr, everywhere)
        if not active.data.all():
            return TensorHandle(np.copy(cmp.data), cmp.dtype.scalar)
        return _create_atomic_cas(builder, address, cmp, val, sem, scope)

    def count_dot(self, builder: InterpreterBuilder, *operands: Any) -> TensorHandle:
        if self.launch is not None:
            self.launch.counts["dots"] += 1
        return self.dot(builder, *operands)

    def _checked(self, access: str, ptrs: TensorHandle, mask: Any) -> tuple[TensorHandle, TensorHandle]:
        """The real addresses and the lanes that may safely be accessed, after noting every fault."""
        pointers = np.atleast_1d(ptrs.data)
        lanes = np.broadcast_to(np.asarray(mask.data, dtype=bool), pointers.shape)
        if self.launch is not None:
            everywhere = lanes.all()
            active = pointers.ravel() if everywhere else pointers[lanes]
            width = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
            safe = self.launch.check(access, active, width)
            if safe is not None:
                lanes = np.array(lanes)
                lanes[lanes] = safe
        return TensorHandle(pointers & ADDRESS_MASK, ptrs.dtype), TensorHandle(lanes, tl.int1)


@contextmanager
def sanitize(
    seed: int = 0,
    programs: Iterable[ProgramIndex] | ChoosePrograms | None = None,
    tf32: bool = True,
) -> Iterator[Report]:
    """Check every interpreted kernel launched inside the block; yields the Report.

    A launch with findings raises SanitizerError at its end, with the faulty lanes left out of memory.
    Args:
        seed: order in which the programs of each launch run
        programs: run only these (x, y, z) programs of each grid, which is still announced in full; or a function of
            the kernel's name and the grid that returns them, None for all
        tf32: round fp32 operands of a dot whose input_precision is tf32, as tensor cores do
    Raises:
        RuntimeError: this version of Triton is not one the hooks were checked against
    """
    if not triton.__version__.startswith(SUPPORTED_TRITON):
        raise RuntimeError(f"the sanitizer supports Triton 3.6 and 3.7, got {triton.__version__}")
    chosen = None if programs is None or callable(programs) else list(programs)
    sanitizer = Sanitizer(seed, programs if callable(programs) else lambda kernel, grid: chosen, tf32)
    with _installed([*BF16_HOOKS, *CONTRACTION_HOOKS, *REDUCE_HOOKS, *SPEED_HOOKS, *sanitizer.hooks()]):
        yield sanitizer.report


@contextmanager
def emulate_bf16() -> Iterator[None]:
    """Interpreted kernels compute bfloat16 as a GPU does, without any check."""
    with _installed([*BF16_HOOKS, *REDUCE_HOOKS]):
        yield


@contextmanager
def without_shortcuts() -> Iterator[None]:
    """Inside a `sanitize` block: nothing is skipped for speed."""
    with _installed(PLAIN):
        yield


@contextmanager
def _installed(hooks: Iterable[Hook]) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, hook in hooks:
            # only Triton after 3.7 has a get_bf16 of its own
            stack.enter_context(patch.object(owner, name, hook, create=name == "get_bf16"))
        yield
