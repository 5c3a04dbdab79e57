"""Shadow memory of one launch: which addresses each argument owns, and which program read or wrote them.

A pointer handed to a kernel carries the number of its argument above bit 48, where no address of a process reaches.
Pointer arithmetic keeps that tag, so an access is checked against the very tensor its pointer came from: a row of
`key` reached through `query` is a fault even though the memory is mapped.
"""

import math
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

TAG_SHIFT = 48
ADDRESS_MASK = np.uint64((1 << TAG_SHIFT) - 1)
SEVERAL_PROGRAMS = -1
# exact element sets cost a byte per element of the span; beyond this a strided tensor is checked by its span alone
EXACT_SPAN_ELEMENTS = 1 << 24
MMAP_CELLS = 1 << 24
MAP_NORESERVE = 0x4000  # absent from Python's mmap module


def zero_cells(count: int) -> np.ndarray:
    """int32 zeros; a large array is mapped lazily, so that a tensor of 2^32 elements costs only what is touched."""
    if count <= MMAP_CELLS:
        return np.zeros(count, dtype=np.int32)
    pages = mmap.mmap(-1, count * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return np.frombuffer(pages, dtype=np.int32)


@dataclass
class Conflict:
    """Lanes of one access that meet another program's access to the same element."""

    kind: str
    lanes: int
    other_program: int


class Segment:
    """A stretch of memory one or more overlapping arguments live in, with one shadow cell per element.

    A cell is 0 (untouched), a program's number, or SEVERAL_PROGRAMS.
    """

    def __init__(self, start: int, end: int, granule: int) -> None:
        self.start = np.uint64(start)
        self.cells = -(-(end - start) // granule)
        self.granule = granule
        self.shift = np.uint64(granule.bit_length() - 1)
        self.maps: dict[str, np.ndarray] = {}

    def record(self, access: str, addresses: np.ndarray, width: int, program: int) -> list[Conflict]:
        """Note an access and return how it conflicts with what other programs of this launch did before."""
        cells = ((addresses - self.start) >> self.shift).astype(np.int64)
        if width > self.granule:
            cells = (cells[:, None] + np.arange(width // self.granule)).ravel()
        conflicts = []
        for earlier in ("load", "store", "atomic"):
            # loads never disturb loads, and atomics are ordered among themselves
            if earlier in self.maps and not (access == earlier and access != "store"):
                seen = self.maps[earlier][cells]
                foreign = (seen != 0) & (seen != program)
                if foreign.any():
                    other = int(seen[foreign][0])
                    conflicts.append(Conflict(f"{earlier}-{access} race", int(foreign.sum()), other))
        self._mark(access, cells, program)
        return conflicts

    def _mark(self, access: str, cells: np.ndarray, program: int) -> None:
        if access not in self.maps:
            self.maps[access] = zero_cells(self.cells)
        seen = self.maps[access][cells]
        others = (seen != 0) & (seen != program)
        self.maps[access][cells] = np.where(others, SEVERAL_PROGRAMS, program) if others.any() else program


@dataclass
class Argument:
    """A tensor argument of the launch, as the addresses that belong to it."""

    name: str
    tag: int
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    segment: Segment | None = None
    elements: np.ndarray | None = field(init=False, default=None)
    first: np.uint64 = field(init=False)
    end: np.uint64 = field(init=False)

    def __post_init__(self) -> None:
        self.size = math.prod(self.shape)
        extent = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)) + 1
        self.span = extent * self.itemsize if self.size else 0
        self.pointer = (self.tag << TAG_SHIFT) | self.address
        self.first = np.uint64(self.pointer)
        self.end = np.uint64(self.pointer + self.span)
        self.expanded = any(
            size > 1 and stride == 0 for size, stride in zip(self.shape, self.strides, strict=True)
        )
        if self.size and self.size != extent and extent <= EXACT_SPAN_ELEMENTS:
            self.elements = np.zeros(extent, dtype=bool)
            # an expanded dimension repeats the same elements: once is enough, and it may be huge
            kept = [pair for pair in zip(self.shape, self.strides, strict=True) if pair[1]]
            view = np.lib.stride_tricks.as_strided(self.elements, [k[0] for k in kept], [k[1] for k in kept])
            view[...] = True

    def owns(self, pointers: np.ndarray, width: int) -> np.ndarray:
        """Which tagged pointers reach whole elements of this tensor."""
        inside = (pointers >= self.first) & (pointers + np.uint64(width) <= self.end)
        if self.elements is not None:
            index = (pointers[inside] - self.first) // np.uint64(self.itemsize)
            inside[inside] = self.elements[index.astype(np.int64)]
        return inside

    def owns_all(self, pointers: np.ndarray, width: int) -> bool:
        """The common case of `owns`, without a mask."""
        if pointers.min() < self.first or int(pointers.max()) + width > int(self.end):
            return False
        if self.elements is None:
            return True
        index = (pointers - self.first) // np.uint64(self.itemsize)
        return bool(self.elements[index.astype(np.int64)].all())

    def distance(self, pointer: int, width: int) -> str:
        """Where a foreign pointer lies, in bytes, seen from this tensor."""
        if pointer < int(self.first):
            return f"{int(self.first) - pointer} bytes before the start"
        if pointer + width > int(self.end):
            return f"{pointer + width - int(self.end)} bytes past the end"
        return f"{pointer - int(self.first)} bytes after the start, in a hole between its elements"

    def __str__(self) -> str:
        return f"`{self.name}` of shape {list(self.shape)} and strides {list(self.strides)}"


class Arguments:
    """All tensor arguments of a launch."""

    def __init__(self) -> None:
        self.all: list[Argument] = []

    def add(self, name: str, tensor: Tensor) -> int:
        """Register a tensor and return the tagged pointer the kernel gets instead of its address."""
        argument = Argument(
            name=name,
            tag=len(self.all) + 1,
            address=tensor.data_ptr(),
            shape=tuple(tensor.shape),
            strides=tuple(tensor.stride()),
            itemsize=tensor.element_size(),
        )
        self.all.append(argument)
        return argument.pointer

    def join_segments(self) -> None:
        """Give arguments that overlap in memory (views of one storage) one shadow."""
        group: list[Argument] = []
        end = 0
        for argument in sorted((a for a in self.all if a.span), key=lambda a: a.address):
            if group and argument.address >= end:
                _share_segment(group, end)
                group = []
            group.append(argument)
            end = (
                max(end, argument.address + argument.span)
                if len(group) > 1
                else argument.address + argument.span
            )
        if group:
            _share_segment(group, end)

    def by_tag(self, pointers: np.ndarray) -> Iterator[tuple[Argument | None, np.ndarray | slice]]:
        """The argument each lane's pointer came from; the lanes of a tile nearly always share one."""
        tags = pointers >> np.uint64(TAG_SHIFT)
        if tags[0] == tags[-1] and (tags == tags[0]).all():
            yield self._get(int(tags[0])), slice(None)
            return
        for tag in np.unique(tags):
            yield self._get(int(tag)), tags == tag

    def holding(self, address: int) -> Argument | None:
        """Some argument whose memory an untagged address lies in."""
        return next((a for a in self.all if a.address <= address < a.address + a.span), None)

    def _get(self, tag: int) -> Argument | None:
        return self.all[tag - 1] if 1 <= tag <= len(self.all) else None


def _share_segment(group: Iterable[Argument], end: int) -> None:
    group = list(group)
    start = group[0].address
    granule = math.gcd(*(a.itemsize for a in group), *(a.address - start for a in group))
    segment = Segment(start, end, granule)
    for argument in group:
        argument.segment = segment
