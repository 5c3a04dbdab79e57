"""Compile the library's own launches for a GPU that is not there, and read what the compiler made of them.

`compile_only("cuda", 90)` stands in for Triton's driver: inside it every launch of a padfree kernel is compiled
with exactly the configuration and specialisation that the launcher would choose there, and not run. Works on
any machine, with TRITON_INTERPRET unset before Triton is imported.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from padfree._triton import configs

Arch = int | str
ARCHS: tuple[Arch, ...] = (80, 90, 100, "gfx942")
WARP_SIZE = {"cuda": 32, "hip": 64}
SHARED_LIMIT: dict[Arch, int] = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, "gfx942": 64 * 1024}


class NoDevice:
    """The part of Triton's driver that compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # Triton keeps compiled kernels by device: each architecture is one of its own.
        return ARCHS.index(self.target.arch)

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass
class Compiled:
    """One compiled kernel: its name, what it was compiled for, and the compiler's own outputs."""

    name: str
    arch: Arch
    kernel: Any
    grid: tuple[int, ...]
    constants: dict[str, Any] = field(default_factory=dict)

    @property
    def ttir(self) -> str:
        return self.kernel.asm["ttir"]

    @property
    def assembly(self) -> str:
        """PTX, or AMD's assembly."""
        return self.kernel.asm["amdgcn" if backend_of(self.arch) == "hip" else "ptx"]

    @property
    def shared_bytes(self) -> int:
        return self.kernel.metadata.shared

    @property
    def num_warps(self) -> int:
        return self.kernel.metadata.num_warps

    @cached_property
    def resources(self) -> dict[str, int]:
        """Registers a thread, stack bytes and spilled: from the cubin, or from AMD's assembly."""
        return (
            _gcn_usage(self.assembly)
            if backend_of(self.arch) == "hip"
            else _cubin_usage(self.kernel.asm["cubin"])
        )

    @cached_property
    def serialized(self) -> str:
        """Why ptxas lets no wgmma of the kernel overlap another (its advisories C7510 to C7519); "" where it does."""
        if self.arch != 90:
            return ""  # wgmma is Hopper's alone
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(self.assembly)
            file.flush()
            command = [tool("ptxas"), "-arch=sm_90a", "-v", file.name, "-o", os.devnull]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        return ", ".join(dict.fromkeys(re.findall(r"\bC751\d\b", said)))

    @cached_property
    def sass(self) -> str:
        """nvdisasm's text of the cubin; empty for AMD."""
        return (
            ""
            if backend_of(self.arch) == "hip"
            else _run_tool("nvdisasm", "-c", cubin=self.kernel.asm["cubin"])
        )


def parse_arch(text: str) -> Arch:
    """80, 90, 100 or gfx942 as the command line has it; ValueError for any other."""
    arch: Arch = int(text) if text.isdigit() else text
    if arch not in ARCHS:
        raise ValueError(f"arch must be one of {', '.join(map(str, ARCHS))}, got {text!r}")
    return arch


def arch_number(arch: Arch) -> int:
    """The architecture as the configuration table names it."""
    return arch if isinstance(arch, int) else int(arch.removeprefix("gfx"), 16)


def backend_of(arch: Arch) -> str:
    return "cuda" if isinstance(arch, int) else "hip"


def why_not_compile() -> str | None:
    """Why kernels cannot be compiled in this process, or None."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 interprets kernels instead of compiling them; unset it"
    return None


@contextmanager
def compile_only(arch: Arch, wanted: tuple[str, ...] | None = None) -> Iterator[list[Compiled]]:
    """Collect what launches inside the block, of the `wanted` kernels if named, would run on this architecture."""
    if reason := why_not_compile():
        raise RuntimeError(reason)
    target = GPUTarget(backend_of(arch), arch, WARP_SIZE[backend_of(arch)])
    compiled: list[Compiled] = []
    run, architecture, previous = JITFunction.run, configs.architecture, driver._active

    def warm_up(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if wanted is not None and self.fn.__name__ not in wanted:
            return None
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        options = {name: value for name, value in kwargs.items() if name.startswith("num_")}
        constants = kwargs["TILE"]._asdict() | options if "TILE" in kwargs else options
        compiled.append(Compiled(self.fn.__name__, arch, kernel, grid, constants))
        return kernel

    driver.set_active(NoDevice(target))
    JITFunction.run = warm_up  # type: ignore[method-assign]
    configs.architecture = lambda device: arch_number(arch)  # type: ignore[assignment]
    try:
        yield compiled
    finally:
        JITFunction.run = run  # type: ignore[method-assign]
        configs.architecture = architecture
        driver._active = previous


def tool(name: str) -> str:
    """Path of a CUDA tool in Triton's wheel."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run_tool(name: str, *options: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool(name), *options, file.name], capture_output=True, text=True, check=True
        ).stdout


def _cubin_usage(cubin: bytes) -> dict[str, int]:
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _run_tool("cuobjdump", "-res-usage", cubin=cubin)))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]), "spills": int(found["LOCAL"])}


def _gcn_usage(assembly: str) -> dict[str, int]:
    def last(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[-1])

    return {
        "registers": last("vgpr_count"),
        "stack": last("private_segment_fixed_size"),
        "spills": last("vgpr_spill_count"),
    }
