"""What can be asserted of a compiled kernel, as plain numbers and names: the rows of the report and of the test."""

import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import torch
import triton

from padfree_bench.compiled.aot import SHARED_LIMIT, Arch, Compiled, backend_of
from padfree_bench.compiled.aot_calls import Target, compile_target
from padfree_bench.compiled.cost_model import Costs, costs_of, occupancy

ATOMICS = re.compile(r"\b(?:atom|red)\.|_atomic_|\bds_(?:add|min|max|cmpst)_")
OPERATION = re.compile(r"^\s*(%[\w:#]+) = \"?([\w.]+)\"? ?([^\n]*)", re.MULTILINE)
VALUE = re.compile(r"%\w+")
HALF_DOT = re.compile(r"tt\.dot [^\n]*: tensor<(\d+)x(\d+)x(?:bf16|f16)")


@dataclass(frozen=True)
class Facts:
    """One kernel for one target. `stack` is bytes a thread; occupancy is CTAs a multiprocessor.

    `exponents` and `fused` count exp2 and multiply-adds of the source, of one element each.
    `serialized` holds ptxas's advisories (C7510 to C7519) that wgmma instructions wait for one another.
    """

    triton: str
    kernel: str
    arch: Arch
    passname: str
    dtype: str
    head_dim: int
    variant: str
    shape: str
    row: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    target: str
    registers: int
    stack: int
    spills: int
    shared: int
    shared_limit: int
    ctas: int
    atomics: int
    f64: int
    tf32: int
    half_dots: int
    wgmma: int
    serialized: str
    mma_sync: int
    ex2_full: int
    exponents: int
    fused: int
    narrow_offsets: tuple[str, ...]
    costs: Costs | None

    @property
    def name(self) -> str:
        config = (self.block_m, self.block_n, self.num_warps, self.num_stages)
        return f"{self.kernel} {self.arch} {self.dtype} D{self.head_dim} {self.variant} {self.shape} {config}"


def argument_paths(name: str, kind: Any) -> Iterator[str]:
    """The names of what an argument passes to the compiled kernel, in order, such as `inputs.q.strides.1`."""
    if isinstance(kind, tuple):
        names = getattr(kind, "_fields", range(len(kind)))
        for field, inner in zip(names, kind, strict=True):
            yield from argument_paths(f"{name}.{field}", inner)
    elif kind != "constexpr":
        yield name


def narrow_offsets(ttir: str, signature: dict[str, Any]) -> tuple[str, ...]:
    """Products and sums with a stride that are computed in fewer than 64 bits, where an offset can wrap.

    A stride is an i32 argument; from each the values are followed until they are widened. A stride rounded
    down to a multiple, (stride // 8) * 8, cannot wrap.
    """
    paths = [path for name, kind in signature.items() for path in argument_paths(name, kind)]
    names = VALUE.findall(ttir[ttir.index("tt.func") : ttir.index(") attributes")])
    narrow = {value for value, path in zip(names, paths, strict=True) if ".strides." in path}
    assert narrow, "no stride among the arguments: a stride of every tensor is expected to vary"
    divided: dict[str, str] = {}
    found = []
    for match in OPERATION.finditer(ttir):
        result, operation, rest = match[1].split(":")[0], match[2], match[3].split(" loc(")[0]
        operands = VALUE.findall(rest)
        if operation == "arith.extsi" or not narrow & set(operands):
            continue
        if operation == "arith.divsi":
            divided[result] = operands[1]
        rounded = operation == "arith.muli" and divided.get(operands[0]) == operands[1]
        if operation in ("arith.muli", "arith.addi", "tt.addptr") and not rounded:
            found.append(f"{operation} {rest}")
        if not operation.startswith("arith.cmp"):
            narrow.add(result)
    return tuple(found)


def facts_of(compiled: Compiled, target: Target) -> Facts:
    """Read one compiled kernel."""
    text, constants, resources = compiled.assembly, compiled.constants, compiled.resources
    block_m, block_n = constants.get("BLOCK_M", 1), constants.get("BLOCK_N", 1)
    return Facts(
        triton=triton.__version__,
        kernel=compiled.name,
        arch=target.arch,
        passname=target.passname,
        dtype=target.dtype,
        head_dim=target.head_dim,
        variant=target.variant,
        shape=target.shape,
        row=target.row,
        block_m=block_m,
        block_n=block_n,
        num_warps=compiled.num_warps,
        num_stages=constants.get("num_stages", 1),
        target=re.search(r"\.target sm_(\d+)|amdgcn-amd-amdhsa--(gfx\w+)", text).expand(r"\1\2"),  # type: ignore[union-attr]
        registers=resources["registers"],
        stack=resources["stack"],
        spills=resources["spills"],
        shared=compiled.shared_bytes,
        shared_limit=SHARED_LIMIT[target.arch],
        ctas=occupancy(target.arch, resources["registers"], compiled.num_warps, compiled.shared_bytes),
        atomics=len(ATOMICS.findall(text)),
        f64=len(re.findall(r"\.f64\b|_f64\b", text)),
        tf32=len(re.findall(r"tf32|xf32", text)),
        half_dots=len(HALF_DOT.findall(compiled.ttir)),
        wgmma=len(re.findall(r"\bwgmma\.mma_async", text)),
        serialized=compiled.serialized,
        mma_sync=len(re.findall(r"\bmma\.sync", text)),
        ex2_full=len(re.findall(r"\bex2\.approx\.f32", text)),
        exponents=compiled.ttir.count("math.exp2"),
        fused=compiled.ttir.count("math.fma"),
        narrow_offsets=narrow_offsets(compiled.ttir, compiled.kernel.src.signature),
        costs=costs_of(compiled) if backend_of(target.arch) == "cuda" else None,
    )


def facts_of_target(target: Target) -> list[Facts]:
    """Compile a target and read each of its kernels."""
    torch.set_num_threads(1)
    return [facts_of(compiled, target) for compiled in compile_target(target)]


def facts_of_targets(targets: list[Target], jobs: int = 1) -> list[Facts]:
    """The same for many targets, `jobs` at a time; results in the order of the targets."""
    if jobs == 1 or len(targets) < 2:
        return [facts for target in targets for facts in facts_of_target(target)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return [facts for found in pool.map(facts_of_target, targets) for facts in found]


def main() -> None:
    """Targets as JSON on standard input, facts as JSON on standard output: for processes that interpret kernels."""
    targets = [Target(**fields) for fields in json.load(sys.stdin)]
    json.dump([asdict(facts) for facts in facts_of_targets(targets)], sys.stdout)


if __name__ == "__main__":
    main()
