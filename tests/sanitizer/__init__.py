"""A memory and race checker for Triton's CPU interpreter, for tests only.

>>> with sanitize(seed=3) as report:
...     padfree.attention(query, key, value, impl="triton")
>>> report.total["loads"], report.findings

Reported as SanitizerError at the end of the launch: accesses outside of the tensor a pointer came from (holes of
strided views included), elements shared between programs without atomics, two lanes of one store at one address,
stores into expanded tensors, grids no GPU accepts. Made visible in the results: masked-off lanes without `other=` hold
NaN or the largest integer, programs run in shuffled order, bfloat16 and TF32 round as on a GPU. `poison_empty` does the
same to uninitialised memory.
"""

from ._poison import poison_empty
from ._report import Finding, Report, SanitizerError
from ._sanitize import emulate_bf16, sanitize, without_shortcuts

__all__ = [
    "Finding",
    "Report",
    "SanitizerError",
    "emulate_bf16",
    "poison_empty",
    "sanitize",
    "without_shortcuts",
]
