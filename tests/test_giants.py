"""Offsets beyond 2^31 and 2^32 elements, and grids beyond 65,535, without the memory or the time they would need.

A lazily mapped tensor costs only the pages that are touched, and of each grid only chosen programs run. Every role
is stretched by one stride at a time; the results must equal, bit for bit, those of the same numbers held densely.
"""

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

import padfree
from padfree._triton import operators
from padfree._triton.backward import launch_backward
from padfree._triton.call import Call, heads_together
from padfree._triton.configs import choose
from sanitizer import sanitize
from sanitizer._memory import MAP_NORESERVE

S, D = 18, 16
FAR = {"2^31": 2**31 + 8, "2^32": 2**32 + 8}
ROLES = ("query", "key", "value", "padding", "attn_mask", "out", "lse", "d_out", "d_lse", "dq", "dk", "dv")

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="lazily mapped memory and sampled programs are the CPU's"
)


def stretched(like: Tensor, dim: int, stride: int) -> Tensor:
    """An unwritten tensor of this shape and dtype whose `dim` has this stride, in memory mapped when touched."""
    strides = [*torch.empty(like.shape, device="meta").stride()]
    strides[dim] = stride
    extent = sum((size - 1) * step for size, step in zip(like.shape, strides, strict=True)) + 1
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    pages = mmap.mmap(-1, extent * like.element_size(), flags=flags)
    return torch.frombuffer(pages, dtype=like.dtype).as_strided(like.shape, strides)


def stretch(tensor: Tensor, dim: int, stride: int) -> Tensor:
    return stretched(tensor, dim, stride).copy_(tensor)


def tensors(batch: int, heads: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = {
        name: torch.randn(batch, heads, S, D, generator=generator).half()
        for name in ("query", "key", "value", "d_out")
    }
    made["padding"] = torch.rand(batch, S, generator=generator) < 0.3
    made["attn_mask"] = torch.randn(batch, heads, S, S, generator=generator).half()
    made["d_lse"] = torch.randn(batch, heads, S, generator=generator)
    return made


def compute(inputs: dict[str, Tensor], outputs: dict[str, Tensor], queries: int = S) -> dict[str, Tensor]:
    """Forward and backward through the launchers, with these tensors in place of the allocated ones."""
    query, d_out, attn_mask, d_lse = (
        inputs[name][:, :, :queries] for name in ("query", "d_out", "attn_mask", "d_lse")
    )
    keys = inputs["key"], inputs["value"], inputs["padding"]
    call = Call(query, *keys, attn_mask, *[None] * 5, queries, S, 0.25, 0.0, -1, -1, False)
    with allocating(outputs):
        out, lse, _ = operators._forward(*_fields(call))
        grads = tuple(
            outputs.get(name, torch.empty(like.shape).half())
            for name, like in (("dq", query), ("dk", keys[0]), ("dv", keys[1]))
        )
        saved = (out, lse, d_out, d_lse)
        # One query's own backward has no gradient of attn_mask.
        d_mask = torch.empty(attn_mask.shape).half() if queries > 1 else None
        launch_backward(call, *saved, grads, d_mask)
    results = {"out": out, "lse": lse, "dq": grads[0], "dk": grads[1], "dv": grads[2]}
    return results if d_mask is None else results | {"d_mask": d_mask}


def _fields(call: Call) -> list[Any]:
    return [getattr(call, field.name) for field in fields(call)]


# what the backward allocates like the LSE, with its strides
ROW_SUMS = ("delta", "inverse", "refined")


@contextmanager
def allocating(outputs: dict[str, Tensor]) -> Iterator[None]:
    """The launchers write to these tensors as out, lse and the row sums."""
    allocate_like, row_sums = torch.empty_like, [outputs[name] for name in ROW_SUMS if name in outputs]
    with pytest.MonkeyPatch.context() as patch:
        if "out" in outputs:
            patch.setattr(Call, "empty_like", lambda call, like: outputs["out"])
        if "lse" in outputs:
            patch.setattr(Call, "empty_lse2", lambda call: outputs["lse"])
            patch.setattr(
                torch, "empty_like", lambda x: row_sums.pop() if x is outputs["lse"] else allocate_like(x)
            )
        yield


def dims_of(role: str) -> tuple[int, ...]:
    """The dimensions a huge tensor of this role may be huge in; out and lse come from the library, heads last or dense."""
    return {"padding": (0, 1), "lse": (0, 1), "out": (0, 1, 2), "d_lse": (0, 1, 2)}.get(role, (0, 1, 2, 3))


CASES = [
    (role, dim, far) for role in ROLES for dim in dims_of(role) for far in FAR if far == "2^31" or dim == 0
]


@pytest.mark.parametrize(("role", "dim", "far"), CASES, ids=[f"{r}-dim{d}-{f}" for r, d, f in CASES])
def test_a_role_stretched_beyond_32_bits_gives_the_same_bits(role: str, dim: int, far: str) -> None:
    """fla#1080, fla#1082, fla#818, sglang#20389, SageAttention#386, ffpa-attn#299, triton#1058: int32 offsets."""
    # three of what is stretched: a stride of 2^30 then fits 32 bits, and only its product with the index does not
    inputs = tensors(batch=3 if dim == 0 else 1, heads=3 if dim == 1 else 1)
    wanted = compute(inputs, {})
    size = {
        "out": wanted["out"],
        "lse": wanted["lse"],
        "dq": wanted["dq"],
        "dk": wanted["dk"],
        "dv": wanted["dv"],
    }.get(role)
    reach = (inputs[role] if size is None else size).shape[dim] - 1
    stride = -(-FAR[far] // reach // 8) * 8
    if size is None:
        got = compute(inputs | {role: stretch(inputs[role], dim, stride)}, {})
    else:
        got = compute(
            inputs,
            {name: stretched(size, dim, stride) for name in (role, *(ROW_SUMS if role == "lse" else ()))},
        )
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), f"{name} differs"


@pytest.mark.parametrize("role", ["query", "key", "value", "d_out"])
def test_one_query_reads_beyond_32_bits(role: str) -> None:
    """fla#1080: the single query's kernels compute offsets of their own."""
    inputs = tensors(batch=1, heads=3)
    wanted = compute(inputs, {}, queries=1)
    got = compute(inputs | {role: stretch(inputs[role], 1, FAR["2^31"] // 2)}, {}, queries=1)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def sampled(total: int) -> Callable[[str, tuple[int, int, int]], list[tuple[int, int, int]]]:
    """First, middle and last programs of each grid, wherever 2^16 and 2^31 rows may lie."""

    def choose_programs(kernel: str, grid: tuple[int, int, int]) -> list[tuple[int, int, int]]:
        return [(x, 0, 0) for x in sorted({0, 1, 65_535, 65_536, grid[0] // 2, grid[0] - 1}) if x < grid[0]]

    return choose_programs


@pytest.mark.parametrize(("batch", "heads"), [(65_535, 1), (1, 65_536), (131_073, 1), (2**16, 2**4)])
@pytest.mark.parametrize("queries", [1, 3])
def test_grids_beyond_65535_run_all_their_programs(batch: int, heads: int, queries: int) -> None:
    """torch#142228, torch#146704, xformers#845: grid.y and grid.z end at 65,535, and B * H grows past it."""
    shape = (batch, heads, queries, 16)
    rows = torch.arange(batch * heads, dtype=torch.float32).remainder(1021).view(batch, heads, 1, 1)
    query, key = torch.zeros(1, 1, 1, 16).expand(shape), torch.zeros(1, 1, 1, 16).expand(shape)
    value = rows.expand(batch, heads, queries, 16)
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    with sanitize(programs=sampled(batch * heads)) as report:
        out, lse = padfree.attention(*leaves, return_lse=True, impl="triton")
        dv = torch.autograd.grad(out, leaves[2], torch.ones(1).expand(shape))[0]
    assert set(report.kernels) and not report.findings
    flat_out, flat_dv, flat_rows = out.detach().flatten(0, 1), dv.flatten(0, 1), rows.flatten()
    for index in (0, 1, 65_535 % len(flat_rows), len(flat_rows) // 2, len(flat_rows) - 1):
        if index in (0, len(flat_rows) - 1):
            assert bool((flat_out[index] == flat_rows[index]).all()), f"out of head {index}"
            assert bool((flat_dv[index] - 1).abs().max() < 1e-6), f"dv of head {index}"
    assert lse.shape == (batch, heads, queries)


def test_lse_rows_beyond_32_bits_are_written_by_sampled_programs() -> None:
    """fla#1080: B * H * M passed 2^31, and the rows of the last heads landed before the first."""
    batch, heads, queries = 2**9, 2**10, 2**12 + 64
    assert batch * heads * queries > 2**31
    query = torch.zeros(1, 1, 1, 1).half().expand(batch, heads, queries, 1)
    key = torch.zeros(batch, 1, 1, 1).half().expand(batch, heads, 5, 1)
    config = choose("forward", torch.float16, 1, 5, query.device)
    tiles, together = -(-queries // config.block_m), heads_together(queries, 1, 2)
    # tiles of the highest rows come first in a group of heads: the last group begins with the highest rows of its heads
    highest_of_last = (batch * heads - together) * tiles + together - 1
    last = tiles * batch * heads - 1
    with sanitize(programs=[(0, 0, 0), (highest_of_last, 0, 0), (last, 0, 0)]) as report:
        _, lse2, _ = operators._forward(query, key, key, *[None] * 7, queries, 5, 1.0, 0.0, -1, -1, False)
    assert not report.findings and report.total["programs"] == 3
    expected = torch.tensor(5.0).log2()
    for b, h, m in ((0, 0, queries - 1), (batch - 1, heads - 1, queries - 1), (batch - 1, heads - 1, 0)):
        torch.testing.assert_close(lse2[b, h, m], expected)
