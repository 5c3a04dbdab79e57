"""What can be asserted of a compiled kernel, as plain numbers and names: the rows of the report and of the test."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
import triton

from padfree_bench.compiled.aot import SHARED_LIMIT, Compiled
from padfree_bench.compiled.aot_calls import Target, compile_target
from padfree_bench.compiled.costs import costs_of, excluded, occupancy

ATOMICS = re.compile(r"\b(?:atom|red)\.|_atomic_|\bds_(?:add|min|max|cmpst)_")
OPERATION = re.compile(r"^\s*(%[\w:#]+) = \"?([\w.]+)\"? ?([^\n]*)", re.MULTILINE)
VALUE = re.compile(r"%\w+")
HALF_DOT = re.compile(r"tt\.dot [^\n]*: tensor<(\d+)x(\d+)x(?:bf16|f16)")

Facts = dict[str, Any]


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
    """Read one compiled kernel.

    `stack` is bytes a thread, `ctas` how many fit on a multiprocessor. `serialized` holds ptxas's advisories (C7510 to
    C7519) that wgmma instructions wait for one another. `exponents` and `fused` count exp2 and multiply-adds of the
    source, of one element each.
    """
    text, ttir, tile = compiled.assembly, compiled.ttir, compiled.tile
    assert tile is not None, f"{compiled.name} is no kernel of padfree's"
    built_for = re.search(r"\.target sm_(\d+)|amdgcn-amd-amdhsa--(gfx\w+)", text)
    assert built_for is not None, f"the assembly of {compiled.name} names no architecture"

    def count(pattern: str | re.Pattern[str]) -> int:
        return len(re.findall(pattern, text))

    return {
        "triton": triton.__version__,
        "kernel": compiled.name,
        **asdict(target),
        "block_m": tile.BLOCK_M,
        "block_n": tile.BLOCK_N,
        "num_warps": compiled.num_warps,
        "num_stages": compiled.kernel.metadata.num_stages,
        "target": built_for[1] or built_for[2],
        **compiled.resources,
        "shared": compiled.shared_bytes,
        "shared_limit": SHARED_LIMIT[target.arch],
        "ctas": occupancy(
            target.arch, compiled.resources["registers"], compiled.num_warps, compiled.shared_bytes
        ),
        "atomics": count(ATOMICS),
        "f64": count(r"\.f64\b|_f64\b"),
        "tf32": count(r"tf32|xf32"),
        "half_dots": len(HALF_DOT.findall(ttir)),
        "wgmma": count(r"\bwgmma\.mma_async"),
        "serialized": compiled.serialized,
        "mma_sync": count(r"\bmma\.sync"),
        "ex2_full": count(r"\bex2\.approx\.f32"),
        "exponents": ttir.count("math.exp2"),
        "fused": ttir.count("math.fma"),
        "narrow_offsets": narrow_offsets(ttir, compiled.kernel.src.signature),
        "costs": costs_of(compiled),
        "excluded": excluded(compiled),
    }


def facts_of_target(target: Target) -> list[Facts]:
    """Compile a target and read each of its kernels."""
    torch.set_num_threads(1)
    return [facts_of(compiled, target) for compiled in compile_target(target)]


def main() -> None:
    """Targets as JSON on standard input, facts as JSON on standard output: for processes that interpret kernels."""
    targets = [Target(**fields) for fields in json.load(sys.stdin)]
    json.dump([facts for target in targets for facts in facts_of_target(target)], sys.stdout, default=asdict)


if __name__ == "__main__":
    main()
