"""Random tensors that are the same on every device: drawn on the CPU, moved to torch's default one."""

import torch
from torch import Tensor


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu", dtype=dtype).to(torch.get_default_device())


def chosen(*shape: int, share: float, seed: int) -> Tensor:
    """bool, True at about this share of places."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return (torch.rand(shape, generator=generator, device="cpu") < share).to(torch.get_default_device())
