"""Who computes a call: the Triton kernel where it can run, plain PyTorch where it cannot, and the reason in words."""

import math
import os
from functools import cache
from importlib.metadata import version
from typing import Literal

import torch
from torch import Tensor

from padfree._arguments import Arguments, computed_dtype
from padfree._checks import KERNEL_DTYPES
from padfree._sdpa import attend_without_kernel

Impl = Literal["auto", "triton", "reference"]
IMPLS = ("auto", "triton", "reference")
# What Triton's interpreter computes right on a CPU; of bf16 it takes the bits for a number.
INTERPRETED_DTYPES = (torch.float32, torch.float16)
LN2 = math.log(2)


def compute(call: Arguments, impl: str) -> tuple[Tensor, Tensor | None]:
    """out [B, H, M, D], and the LSE [B, H, M] where the options ask for it."""
    if choose_impl(impl, call.query) == "reference":
        return attend_without_kernel(call, impl)
    from padfree._triton.autograd import KernelOptions, run

    dropout_p, scale, window, skip_padded_queries, return_lse = call.options
    options = KernelOptions.of(call.query, scale, dropout_p, window, skip_padded_queries)
    out, lse2 = run(call, options)
    return out, lse2 * LN2 if return_lse else None


def choose_impl(impl: str, query: Tensor) -> str:
    """Resolve `impl` for this tensor: "triton" or "reference". An explicit "triton" raises where it cannot run."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "auto":
        return "triton" if query.is_cuda and why_not(query) is None else "reference"
    if impl == "triton" and (reason := why_not(query)) is not None:
        raise RuntimeError(f"impl='triton' cannot run: {reason}; or use impl='reference'")
    return impl


def why_not(query: Tensor) -> str | None:
    """Why the kernel could not compute attention for this query, or None where it can. Nothing is launched."""
    dtype = computed_dtype(query)
    if dtype not in KERNEL_DTYPES:
        return f"the kernel computes fp32, fp16 and bf16, query is {dtype}"
    reason = why_not_device(query.device)
    interpreted = reason is not None or os.environ.get("TRITON_INTERPRET") == "1"
    if query.device.type == "cpu" and interpreted and dtype not in INTERPRETED_DTYPES:
        return (
            "no GPU, and Triton's interpreter gets bf16 wrong: it multiplies bit patterns; use fp32 or fp16"
        )
    return reason


def why_not_device(device: torch.device | str) -> str | None:
    """Why the kernel could not run on this device, or None where it can."""
    device = torch.device(device)
    if device.type == "cuda":
        if torch.version.cuda is not None and torch.cuda.get_device_capability(device) < (8, 0):
            return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
        return None
    if device.type != "cpu":
        return f"no kernel for device type {device.type!r}"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "no GPU: set TRITON_INTERPRET=1 to run it in Triton's interpreter"
    return why_not_interpreter()


@cache
def why_not_interpreter() -> str | None:
    """Why Triton's interpreter fails with the NumPy that is installed, or None where it does not."""
    triton, numpy = version("triton"), version("numpy")
    # Triton 3.6 makes an int of an array with one element, which NumPy 2.4 no longer allows.
    if _major_minor(triton) < (3, 7) and _major_minor(numpy) >= (2, 4):
        return (
            f"Triton {triton}'s interpreter does not work with NumPy {numpy}: use NumPy < 2.4 or Triton 3.7"
        )
    return None


def _major_minor(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".")[:2])
