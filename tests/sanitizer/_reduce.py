"""Reductions of the interpreter: bfloat16 sums, and user-defined combines a whole tile at a time.

The interpreter calls a user-defined combine once per element, about 0.2 ms each; a tree over the axis calls it once
per level with half of the tile on each side, which is also closer to how a GPU associates.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import ReduceOps, TensorHandle

from ._precision import bf16_to_fp32, fp32_to_bf16

_sum = ReduceOps.sum


def reduce_sum(self: ReduceOps, operand: Any) -> Any:
    if operand.dtype != tl.bfloat16:
        return _sum(self, operand)
    total = np.sum(bf16_to_fp32(operand.handle.data), axis=self.axis, keepdims=self.keep_dims)
    return self.to_tensor(fp32_to_bf16(total), operand.dtype)


def generic_reduce(self: ReduceOps, operands: tuple[Any, ...]) -> list[Any]:
    dtypes = [operand.dtype for operand in operands]
    shape = operands[0].handle.data.shape
    parts = [operand.handle.data for operand in operands]
    if self.axis is None:
        parts = [part.reshape(-1) for part in parts]
    parts = [np.moveaxis(part, 0 if self.axis is None else self.axis, -1) for part in parts]
    while parts[0].shape[-1] > 1:
        length = parts[0].shape[-1]
        pairs = length - length % 2
        sides = [part[..., side:pairs:2] for side in (0, 1) for part in parts]
        tiles = [
            tl.core.tensor(TensorHandle(side, dtype), tl.block_type(dtype, list(side.shape)))
            for side, dtype in zip(sides, dtypes * 2, strict=True)
        ]
        combined = self.combine_fn.fn(*tiles)
        combined = combined if isinstance(combined, tuple) else (combined,)
        halves = [np.broadcast_to(tile.handle.data, sides[0].shape) for tile in combined]
        parts = [np.concatenate([h, p[..., pairs:]], axis=-1) for h, p in zip(halves, parts, strict=True)]
    results = [part[..., 0] for part in parts]
    if self.keep_dims and self.axis is None:
        results = [result.reshape((1,) * len(shape)) for result in results]
    elif self.keep_dims:
        results = [np.expand_dims(result, self.axis) for result in results]
    return [self.to_tensor(result, dtype) for result, dtype in zip(results, dtypes, strict=True)]


REDUCE_HOOKS = [(ReduceOps, "sum", reduce_sum), (ReduceOps, "generic_reduce", generic_reduce)]
