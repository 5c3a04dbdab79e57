"""One sanitized kernel launch: its arguments, its programs in shuffled order, its findings."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, interpreter_builder

from ._memory import ADDRESS_MASK, Argument, Arguments
from ._report import Finding, SanitizerError, add_finding, describe, kernel_line
from ._speed import with_room_for_callees

if TYPE_CHECKING:
    from ._sanitize import Sanitizer

ProgramIndex = tuple[int, int, int]

MAX_GRID = (2**31 - 1, 65535, 65535)

# the interpreter keeps the current program in one global object, so launches of several threads take turns
_turn = threading.RLock()


class Launch:
    """Runs a grid under the rules of a GPU."""

    def __init__(self, executor: GridExecutor, sanitizer: Sanitizer) -> None:
        self.executor = executor
        self.sanitizer = sanitizer
        self.kernel: str = executor.fn.__name__
        self.report = sanitizer.report
        self.findings: list[Finding] = []
        self.counts = self.report.kernels[self.kernel]
        self.arguments = Arguments()
        self.argument_name = ""
        self.program = 0
        self.indices: list[ProgramIndex] = []
        self.patched: set[Any] = set()
        self.scopes: list[Any] = []

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        executor = self.executor
        kwargs = {name: value for name, value in kwargs.items() if name in executor.arg_names}
        # on a CPU the arguments are used in place: copying a lazily mapped tensor onto itself would touch all of it
        on_device = any(_is_on_device(value) for value in (*args, *kwargs.values()))
        host_args, host_kwargs = executor._init_args_hst(args, kwargs) if on_device else (args, kwargs)
        for hook in executor.pre_run_hooks:
            hook(*host_args, **host_kwargs)
        with _turn:
            outer, self.sanitizer.launch = self.sanitizer.launch, self
            try:
                self.sanitizer.patch_language(executor.fn)
                self.run_programs(inspect.getcallargs(executor.fn, *host_args, **host_kwargs))
            except Exception as error:
                if self.findings:
                    raise SanitizerError(describe(self.findings)) from error
                raise InterpreterError(repr(error)) from error
            finally:
                for scope in reversed(self.scopes):
                    scope.restore()
                self.sanitizer.launch = outer
                for finding in self.findings:
                    add_finding(self.report.findings, finding)
        if self.findings:
            raise SanitizerError(describe(self.findings))
        if on_device:
            executor._restore_args_dev(args, host_args, kwargs, host_kwargs)

    @with_room_for_callees
    def run_programs(self, arguments: dict[str, Any]) -> None:
        converted = {}
        for name, value in arguments.items():
            self.argument_name = name
            is_constant = name in self.executor.constexprs
            converted[name] = value if is_constant else self.sanitizer.convert_argument(value)
        self.arguments.join_segments()
        grid = self.executor.grid
        grid = tuple(grid(converted) if callable(grid) else grid)
        if len(grid) > 3:
            raise ValueError(f"a grid has at most 3 dimensions, got {grid}")
        x, y, z = grid + (1,) * (3 - len(grid))
        self.counts["launches"] += 1
        if any(size > limit for size, limit in zip((x, y, z), MAX_GRID, strict=True)):
            self.find("grid limit", f"grid {(x, y, z)} exceeds the limits {MAX_GRID} of a GPU")
            return
        interpreter_builder.set_grid_dim(x, y, z)
        for index in self.order((x, y, z)):
            self.indices.append(index)
            self.program = len(self.indices)
            interpreter_builder.set_grid_idx(*index)
            self.executor.fn(**converted)
        self.counts["programs"] += len(self.indices)

    def order(self, grid: ProgramIndex) -> Iterable[ProgramIndex]:
        chosen = self.sanitizer.choose_programs(self.kernel, grid)
        indices = list(np.ndindex(grid) if chosen is None else chosen)
        # the launch number varies the order between launches of one test, the seed between runs of it
        shuffle = np.random.default_rng([self.sanitizer.seed, self.counts["launches"]]).permutation(
            len(indices)
        )
        return [indices[position] for position in shuffle]

    def register(self, argument: Any) -> int:
        """The tagged pointer of a tensor argument."""
        tensor = (
            argument if isinstance(argument, Tensor) else argument.base
        )  # a TensorWrapper casts the element type
        return self.arguments.add(self.argument_name, tensor)

    def patch_language(self, fn: Callable[..., Any], patch: Callable[..., Any]) -> None:
        """Patch triton.language once per launch; the interpreter does so on every call of a device function."""
        modules = _language_modules(fn)
        if not modules <= self.patched:
            self.patched |= modules
            self.scopes.append(patch(fn))

    def check(self, access: str, pointers: np.ndarray, width: int) -> np.ndarray | None:
        """Note the faults of one access by its active lanes; returns the lanes that are safe, None for all."""
        self.counts[f"{access}s"] += 1
        if not pointers.size:
            return None
        if access == "store" and not (pointers[1:] > pointers[:-1]).all():
            repeated = pointers.size - np.unique(pointers).size
            if repeated:
                self.find(
                    "duplicate lanes", f"{repeated} lanes of one store write an address another lane writes"
                )
        safe = None
        for argument, lanes in self.arguments.by_tag(pointers):
            mine = pointers[lanes]
            if argument is None or not argument.owns_all(mine, width):
                owned = np.zeros(mine.size, dtype=bool) if argument is None else argument.owns(mine, width)
                self._find_foreign(access, argument, mine[~owned], width)
                safe = np.ones(pointers.size, dtype=bool) if safe is None else safe
                safe[lanes] = owned
                mine = mine[owned]
            if argument is not None and mine.size:
                self._record(access, argument, mine & ADDRESS_MASK, width)
        return safe

    def find(self, kind: str, message: str) -> None:
        index = self.indices[-1] if self.indices else (0, 0, 0)
        add_finding(self.findings, Finding(kind, self.kernel, kernel_line(), index, message))

    def _find_foreign(self, access: str, argument: Argument | None, pointers: np.ndarray, width: int) -> None:
        first = int(pointers[0])
        if argument is None:
            place = "at an address that comes from no tensor argument"
        else:
            place = f"{argument.distance(first, width)} of {argument}"
        neighbour = self.arguments.holding(first & int(ADDRESS_MASK))
        if neighbour is not None and neighbour is not argument:
            place += f", inside {neighbour}"
        self.find(f"{access} out of bounds", f"{pointers.size} lanes, the first {place}")

    def _record(self, access: str, argument: Argument, addresses: np.ndarray, width: int) -> None:
        if access == "store" and argument.expanded:
            self.find("store into an expanded tensor", f"{argument} has several indices for one element")
        assert argument.segment is not None, "a tensor with elements has a segment"
        for conflict in argument.segment.record(access, addresses, width, self.program):
            other = "several programs"
            if conflict.other_program > 0:
                other = f"program {self.indices[conflict.other_program - 1]}"
            self.find(conflict.kind, f"{conflict.lanes} lanes meet elements {other} accessed in {argument}")


def _is_on_device(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(_is_on_device(item) for item in value)
    tensor = getattr(value, "base", value)
    return isinstance(tensor, Tensor) and tensor.device.type != "cpu"


@cache
def _language_modules(fn: Callable[..., Any]) -> frozenset[Any]:
    return frozenset(m for m in fn.__globals__.values() if inspect.ismodule(m) and m in (tl, tl.core))
