"""A loop of exp2 on registers: the rate of the special-function units, which bounds attention at small head_dim."""

import torch
import triton
import triton.language as tl

REPEATS, BLOCK, PROGRAMS_PER_SM = 2048, 1024, 16


@triton.jit
def exp2_loop(out_ptr, REPEATS: tl.constexpr, BLOCK: tl.constexpr):
    """x = exp2(-x), again and again; the store keeps the compiler from dropping the loop."""
    x = tl.arange(0, BLOCK).to(tl.float32) / BLOCK
    for _ in range(REPEATS):
        x = tl.exp2(-x)
    tl.store(out_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), x)


def launch(out: torch.Tensor) -> int:
    """Fill out [programs * BLOCK] fp32 with one launch; returns the number of exp2 it computes."""
    exp2_loop[(out.numel() // BLOCK,)](out, REPEATS=REPEATS, BLOCK=BLOCK)
    return out.numel() * REPEATS
