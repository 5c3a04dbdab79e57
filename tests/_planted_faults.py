"""Small kernels with one planted fault each; the constexpr FAULT turns a kernel into its clean twin.

`PLANTED` maps a fault's name to (run(fault), the kind of finding). Each run also checks the clean twin's result.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

N = 13
BLOCK = 16


@triton.jit
def copy_kernel(
    x_ptr, out_ptr, n, LOAD_EXTRA: tl.constexpr, STORE_EXTRA: tl.constexpr, MASK_STORE: tl.constexpr
):
    i = tl.program_id(0) * 16 + tl.arange(0, 16)
    x = tl.load(x_ptr + i, mask=i < n + LOAD_EXTRA, other=0.0)
    if MASK_STORE:
        tl.store(out_ptr + i, x, mask=i < n + STORE_EXTRA)
    else:
        tl.store(out_ptr + i, x)


def copy(**fault: int) -> None:
    x, out = torch.arange(N, dtype=torch.float32), torch.zeros(N)
    copy_kernel[(1,)](x, out, N, **{"LOAD_EXTRA": 0, "STORE_EXTRA": 0, "MASK_STORE": True, **fault})
    assert torch.equal(out, x)


@triton.jit
def first_kernel(x_ptr, out_ptr, OFFSET: tl.constexpr):
    tl.store(out_ptr, tl.load(x_ptr + OFFSET))


def load_before_start(fault: bool) -> None:
    first_kernel[(1,)](torch.ones(4), torch.zeros(1), -1 if fault else 0)


def load_of_empty_tensor(fault: bool) -> None:
    first_kernel[(1,)](torch.ones(0 if fault else 1), torch.zeros(1), 0)


@triton.jit
def accumulate_kernel(x_ptr, out_ptr, FAULT: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0))
    if FAULT:
        tl.store(out_ptr, tl.load(out_ptr) + x)
    else:
        tl.atomic_add(out_ptr, x)


def accumulate(fault: bool) -> None:
    x, out = torch.ones(4), torch.zeros(1)
    accumulate_kernel[(4,)](x, out, fault)
    assert out.item() == 4


@triton.jit
def mixed_atomic_kernel(out_ptr, FAULT: tl.constexpr):
    if FAULT and tl.program_id(0) == 0:
        tl.store(out_ptr, 1.0)
    else:
        tl.atomic_add(out_ptr, 1.0)


def mixed_atomic(fault: bool) -> None:
    mixed_atomic_kernel[(3,)](torch.zeros(1), fault)


@triton.jit
def overlap_kernel(out_ptr, STEP: tl.constexpr):
    tl.store(out_ptr + tl.program_id(0) * STEP + tl.arange(0, 16), 1.0)


def overlapping_tiles(fault: bool) -> None:
    overlap_kernel[(3,)](torch.zeros(48), 15 if fault else 16)


@triton.jit
def shift_kernel(x_ptr, out_ptr):
    i = tl.program_id(0)
    tl.store(out_ptr + i, tl.load(x_ptr + i + 1))


def read_what_another_writes(fault: bool) -> None:
    x = torch.arange(9.0)
    shift_kernel[(8,)](x, x if fault else torch.zeros(8))


def read_through_an_overlapping_view(fault: bool) -> None:
    storage = torch.arange(20.0)
    shift_kernel[(8,)](storage[:9], storage[4:12] if fault else storage[9:17])


@triton.jit
def far_kernel(x_ptr, out_ptr, WIDE: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    i = tile * 1024 + tl.arange(0, 1024)
    tl.store(out_ptr + tl.arange(0, 1024), tl.load(x_ptr + i))


FAR_ELEMENTS = 3 * 2**30
FAR_PROGRAM = (FAR_ELEMENTS // 1024 - 1, 0, 0)


def int32_overflow(fault: bool) -> None:
    x = torch.empty(FAR_ELEMENTS, dtype=torch.uint8)  # mapped lazily: only the last page is touched
    x[-1024:] = 7
    out = torch.zeros(1024, dtype=torch.uint8)
    far_kernel[(FAR_ELEMENTS // 1024,)](x, out, not fault)
    assert (out == 7).all()


@triton.jit
def nothing_kernel(x_ptr):
    pass


def grid_limit(fault: bool) -> None:
    nothing_kernel[(1, 65536 if fault else 3)](torch.zeros(1))


@triton.jit
def pair_kernel(out_ptr, LANES: tl.constexpr):
    i = tl.arange(0, 16)
    tl.store(out_ptr + i // LANES, i * 1.0)


def two_lanes_one_address(fault: bool) -> None:
    pair_kernel[(1,)](torch.zeros(16), 2 if fault else 1)


@triton.jit
def row_kernel(x_ptr, out_ptr, stride_x, strides):
    d = tl.arange(0, 4)
    row = tl.program_id(0)
    tl.store(out_ptr + row * strides[0] + d * strides[1], tl.load(x_ptr + row * stride_x + d))


def store_into_expanded(fault: bool) -> None:
    out = torch.zeros(4).expand(3, 4) if fault else torch.zeros(3, 4)
    row_kernel[(1,)](torch.ones(3, 4), out, 4, out.stride())


def hole_of_a_strided_view(fault: bool) -> None:
    query = torch.arange(36.0).view(3, 3, 4)[
        :, 0
    ]  # rows of a fused projection: key and value lie in the holes
    out = torch.zeros(3, 4)
    row_kernel[(3,)](query, out, 4 if fault else query.stride(0), out.stride())
    assert torch.equal(out, query)


def rows_of_another_argument(fault: bool) -> None:
    fused = torch.arange(24.0).view(2, 3, 4)
    row_kernel[(3,)](fused[0, :1] if fault else fused[0], fused[1], 4, fused[1].stride())


@triton.jit
def load_pair(pointers, index, i):
    return tl.load(pointers[0] + i) + tl.load(pointers[1] + i + index)


@triton.jit
def tuple_kernel(pointers, out_ptr, FAULT: tl.constexpr):
    i = tl.arange(0, 16)
    tl.store(out_ptr + i, load_pair(pointers, FAULT, i))


def tensor_in_a_tuple(fault: bool) -> None:
    tuple_kernel[(1,)]((torch.ones(16), torch.ones(16)), torch.zeros(16), int(fault))


@triton.jit
def atomic_kernel(out_ptr, n):
    i = tl.arange(0, 16)
    tl.atomic_add(out_ptr + i, i * 1.0, mask=i < n)


def atomic_bound(fault: bool) -> None:
    atomic_kernel[(1,)](torch.zeros(N), N + fault)


PLANTED: dict[str, tuple[Callable[[bool], None], str]] = {
    "load mask one too long": (lambda fault: copy(LOAD_EXTRA=int(fault)), "load out of bounds"),
    "store mask one too long": (lambda fault: copy(STORE_EXTRA=int(fault)), "store out of bounds"),
    "unmasked store": (lambda fault: copy(MASK_STORE=not fault), "store out of bounds"),
    "load before the start": (load_before_start, "load out of bounds"),
    "load of an empty tensor": (load_of_empty_tensor, "load out of bounds"),
    "non-atomic accumulation": (accumulate, "store-load race"),
    "store among atomics": (mixed_atomic, "store-atomic race"),
    "overlapping tiles": (overlapping_tiles, "store-store race"),
    "output read by another program": (read_what_another_writes, "load-store race"),
    "output read through another view": (read_through_an_overlapping_view, "load-store race"),
    "int32 offset past 2^31": (int32_overflow, "load out of bounds"),
    "grid.y of 65536": (grid_limit, "grid limit"),
    "two lanes at one address": (two_lanes_one_address, "duplicate lanes"),
    "store into an expanded output": (store_into_expanded, "store into an expanded tensor"),
    "hole of a strided view": (hole_of_a_strided_view, "load out of bounds"),
    "rows of another argument": (rows_of_another_argument, "load out of bounds"),
    "tensor in a tuple": (tensor_in_a_tuple, "load out of bounds"),
    "atomic mask one too long": (atomic_bound, "atomic out of bounds"),
}
