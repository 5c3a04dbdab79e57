"""Compile the library's own launches for a GPU that is not there, and read what the compiler made of them.

`compile_only(90)` stands in for Triton's driver: inside it every launch of a padfree kernel is compiled with exactly
the configuration and specialisation that the launcher would choose there, and not run. Works on any machine, with
TRITON_INTERPRET unset before Triton is imported.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from tempfile import NamedTemporaryFile
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from padfree._triton import configs
from padfree._triton.arguments import Tile

Arch = int | str
SHARED_LIMIT: dict[Arch, int] = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, "gfx942": 64 * 1024}
ARCHS = tuple(SHARED_LIMIT)


@dataclass
class Compiled:
    """One compiled kernel: its name, what it was compiled for (no tile if not padfree's), and the compiler's outputs."""

    name: str
    arch: Arch
    kernel: Any
    grid: tuple[int, ...]
    tile: Tile | None

    @property
    def ttir(self) -> str:
        return self.kernel.asm["ttir"]

    @property
    def assembly(self) -> str:
        """PTX, or AMD's assembly."""
        return self.kernel.asm.get("ptx") or self.kernel.asm["amdgcn"]

    @property
    def shared_bytes(self) -> int:
        return self.kernel.metadata.shared

    @property
    def num_warps(self) -> int:
        return self.kernel.metadata.num_warps

    @cached_property
    def resources(self) -> dict[str, int]:
        """Registers a thread, stack bytes and spilled: from the cubin, or from AMD's assembly."""
        if "cubin" in self.kernel.asm:
            names, text = ("REG", "STACK", "LOCAL"), self._tool_says("cuobjdump", "-res-usage")
        else:
            names = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
            text = self.assembly
        numbers = [int(re.findall(rf"\b{name}:\s*(\d+)", text)[-1]) for name in names]
        return dict(zip(("registers", "stack", "spills"), numbers, strict=True))

    @cached_property
    def serialized(self) -> str:
        """Why ptxas lets no wgmma of the kernel overlap another (its advisories C7510 to C7519); "" where it does."""
        if self.arch != 90:
            return ""  # wgmma is Hopper's alone
        said = self._tool_says("ptxas", "-arch=sm_90a", "-v", "-o", os.devnull, stage="ptx")
        return ", ".join(dict.fromkeys(re.findall(r"\bC751\d\b", said)))

    @cached_property
    def sass(self) -> str:
        """nvdisasm's text of the cubin; empty for AMD."""
        return self._tool_says("nvdisasm", "-c") if "cubin" in self.kernel.asm else ""

    def _tool_says(self, tool: str, *options: str, stage: str = "cubin") -> str:
        """What the CUDA tool that Triton would use prints about one stage of the compilation."""
        code = self.kernel.asm[stage]
        with NamedTemporaryFile(suffix=f".{stage}") as file:
            file.write(code if isinstance(code, bytes) else code.encode())
            file.flush()
            command = [getattr(knobs.nvidia, tool).path, *options, file.name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr


def arch_number(arch: Arch) -> int:
    """The architecture as the configuration table names it."""
    return arch if isinstance(arch, int) else int(arch.removeprefix("gfx"), 16)


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
    compiled: list[Compiled] = []
    run = JITFunction.run

    def compile_instead(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        name = self.fn.__name__
        if wanted is not None and name not in wanted:
            return None
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(Compiled(name, arch, kernel, grid, kwargs.get("TILE")))
        return kernel

    target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
    # The part of a driver that compiling asks for. Triton keeps compiled kernels by device, so each architecture is one.
    no_device = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: ARCHS.index(arch),
        get_current_stream=lambda device: 0,
    )
    with (
        patch.object(driver, "_active", no_device),
        patch.object(JITFunction, "run", compile_instead),
        patch.object(configs, "architecture", lambda device: arch_number(arch)),
    ):
        yield compiled
