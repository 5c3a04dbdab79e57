"""How torch, and padfree with it, is asked to multiply fp32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# What to ask torch for, so that padfree multiplies so where it can; torch's own products are IEEE's but for "tf32".
ASKED = {"ieee": "ieee", "tf32x3": "none", "tf32": "tf32"}


@contextmanager
def multiplying_by(precision: str) -> Iterator[None]:
    """Inside the block fp32 is multiplied by `precision`, one of ASKED."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = ASKED[precision]
    try:
        yield
    finally:
        matmul.fp32_precision = before
