"""An NVIDIA GPU that is not there, for Triton: whatever would reach the CUDA driver is noted instead of run.

Tensors lie on the CPU, and nothing is compiled: a kernel is what its source, its specialisation and its options are.
For a process of its own, without TRITON_INTERPRET.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import triton.compiler
from torch import Tensor
from triton import JITFunction
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from padfree._triton import configs

CudaDriver: Any = backends["nvidia"].driver


class Reached(NamedTuple):
    """What the driver is asked to launch; arguments as its launcher flattens them."""

    kernel: str
    grid: tuple[int, int, int]
    stream: int
    function: Any
    metadata: Any
    arguments: list[Any]


class Kernel(CompiledKernel):
    """Compiled for these arguments and options, but for the machine code."""

    def __init__(self, source: Any, options: dict[str, Any]) -> None:
        self.src, self.name, self.hash = source, source.name, f"{source.hash()} {sorted(options.items())}"
        self.metadata = SimpleNamespace(
            shared=0, tmem_size=None, num_warps=options["num_warps"], hash=self.hash
        )
        self.packed_metadata = options["num_warps"], options["num_stages"], self.hash
        self.kernel, self.metadata_group = self.hash, dict[str, str]()
        self.module = self.function = self._run = None


class Driver(CudaDriver):
    """Triton's driver for CUDA with the GPU cut off; `reached` is what it was asked for."""

    def __init__(self) -> None:  # no CUDA is looked for
        self.reached: list[Reached] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 1},
            load_binary=lambda name, binary, shared, device: (object(), f"loaded {binary}", 0, 0, 1024),
        )
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 17

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launcher(x: int, y: int, z: int, stream: int, function: Any, packed: Any, *rest: Any) -> None:
            _metadata, enter, leave, *arguments = rest
            for hook in (enter, leave):
                if hook is not None:
                    hook(_metadata)
            flat = list(flatten(tuple(source.signature.values()), tuple(arguments)))
            self.reached.append(Reached(metadata.hash, (x, y, z), stream, function, packed, flat))

        return launcher


def flatten(signature: Any, argument: Any) -> Iterator[Any]:
    """As Triton's launchers do: groups member by member, pointers as numbers, and nothing that is compiled in."""
    if isinstance(signature, tuple):
        for kind, member in zip(signature, argument, strict=True):
            yield from flatten(kind, member)
    elif signature != "constexpr":
        yield argument.data_ptr() if isinstance(argument, Tensor) else argument


@contextmanager
def standin_driver(*kernels: JITFunction) -> Iterator[Driver]:
    """Inside, `kernels` are launched on the GPU that is not there."""
    standin = Driver()
    with (
        patch.object(driver, "_active", standin),
        patch.object(configs, "architecture", lambda device: 90),
        patch.object(triton.compiler, "compile", lambda source, target, options: Kernel(source, options)),
    ):
        for kernel in kernels:
            kernel.device_caches = defaultdict(kernel.create_binder)
        yield standin
