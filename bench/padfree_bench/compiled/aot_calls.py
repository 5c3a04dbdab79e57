"""Which launches the compiled evidence covers: every row of the configuration table, every variant, every shape kind.

Tensors are on the meta device: a launch that is only compiled reads shapes, strides and dtypes, so a sequence
of any length costs nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from padfree._triton import configs, operators
from padfree._triton.call import OPEN, Call, heads_last
from padfree_bench.compiled.aot import Arch, Compiled, arch_number, compile_only
from padfree_bench.measuring.precision import multiplying_by

LONGEST = 4096
KIND_DTYPES = {"half": ("bfloat16", "float16"), "float": ("float32",), "tf32x3": ("float32",)}


@dataclass(frozen=True)
class Variant:
    """One combination of the options that select code in the kernels."""

    padding: bool = True
    spans: bool = False
    lengths: bool = False
    skip: bool = True
    attn_mask: str | None = None
    dropout: bool = False
    left: int = OPEN
    right: int = OPEN
    packed: bool = False
    group: int = 1
    lse_gradient: bool = False
    scale: float | None = None


VARIANTS = {
    "padded": Variant(),
    "keys": Variant(skip=False),
    "spans": Variant(spans=True),
    "lengths": Variant(padding=False, lengths=True),
    "dense": Variant(padding=False, skip=False),
    "packed": Variant(padding=False, skip=False, packed=True),
    "dropout": Variant(dropout=True),
    "window": Variant(left=64, right=64),
    "causal": Variant(right=0),
    "bool": Variant(skip=False, attn_mask="bool"),
    "bias": Variant(skip=False, attn_mask="bias"),
    "grouped": Variant(group=2, lse_gradient=True),
    "unit scale": Variant(scale=1.0),
    "everything": Variant(
        skip=False, attn_mask="bias", dropout=True, left=64, right=64, group=2, lse_gradient=True
    ),
}
# (batch, key heads, what is taken from S and D): how a launcher's integers specialise.
SHAPES = {"sixteens": (16, 16, 0), "ones": (1, 1, 0), "neither": (3, 6, 3)}

# The kernels that read a pass's rows; a pass that is missing here is an error, never skipped.
KERNELS = {
    "forward": ("attention_forward_kernel",),
    "query_gradient": ("query_gradient_kernel",),
    "key_gradient": ("key_gradient_kernel",),
    "attn_mask_gradient": ("attn_mask_gradient_kernel",),
    "single_query": ("single_query_forward_kernel", "single_query_backward_kernel"),
}


@dataclass(frozen=True)
class Target:
    """One thing to compile: a row of the table, for a dtype and an architecture, of a variant, in a shape kind."""

    arch: Arch
    passname: str
    dtype: str
    head_dim: int
    variant: str = "padded"
    shape: str = "sixteens"
    row: int = 0
    precision: str = "ieee"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def seq(self) -> int:
        """The longest length that the row is chosen for."""
        kind = configs.dtype_kind(self.torch_dtype, self.precision)
        key = self.passname, kind, configs.padded_head_dim(self.head_dim)
        return min(configs.TABLE[key][self.row].max_length, LONGEST)


def make_call(target: Target) -> Call:
    """The call that leads to the target's row, on the meta device."""
    variant, (batch, kv_heads, odd) = VARIANTS[target.variant], SHAPES[target.shape]
    seq, head_dim, heads = target.seq - odd, target.head_dim - odd, kv_heads * variant.group
    rows = 1 if target.passname == "single_query" else seq
    empty = partial(torch.empty, device="meta")

    def tensor(count: int, seq: int) -> Tensor:
        batch_and_rows = (1, batch * seq) if variant.packed else (batch, seq)
        return empty(*batch_and_rows, count, head_dim, dtype=target.torch_dtype).transpose(1, 2)

    cu_seqlens = empty(batch + 1, dtype=torch.int32) if variant.packed else None
    mask_dtype = torch.bool if variant.attn_mask == "bool" else target.torch_dtype
    return Call(
        query=tensor(heads, rows), key=tensor(kv_heads, seq), value=tensor(kv_heads, seq),
        padding=empty(batch, seq, dtype=torch.bool) if variant.padding else None,
        attn_mask=empty(batch, heads, rows, seq, dtype=mask_dtype) if variant.attn_mask else None,
        seed=empty(1, dtype=torch.int64) if variant.dropout else None,
        cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
        key_lengths=empty(batch, dtype=torch.int32) if variant.lengths else None,
        spans=empty(batch, 3, dtype=torch.int32) if variant.spans else None,
        max_q=rows, max_k=seq,
        scale=variant.scale or target.head_dim**-0.5, dropout_p=0.1 if variant.dropout else 0.0,
        left=variant.left, right=variant.right, skip_padded_queries=variant.skip and rows == seq,
    )  # fmt: skip


def compile_target(target: Target) -> list[Compiled]:
    """The kernels that read the target's row, as autograd would launch them for its call."""
    call, variant = make_call(target), VARIANTS[target.variant]
    lse, out = torch.empty(call.query.shape[:3], device="meta"), heads_last(call.query)
    saved = (out, lse, torch.empty_like(out), torch.empty_like(lse) if variant.lse_gradient else None)
    kernels = KERNELS[target.passname]
    with multiplying_by(target.precision), compile_only(target.arch, kernels) as compiled:
        operators._forward(*_fields(call))
        backward = replace(call, spans=call.spans if variant.spans else call.empty_spans())
        operators._backward(*saved, *_fields(backward), variant.attn_mask == "bias")
    return compiled


def _fields(call: Call) -> list[Any]:
    return [getattr(call, field.name) for field in fields(call)]


def table_targets(archs: tuple[Arch, ...], variants: tuple[str, ...] = ("padded",)) -> Iterator[Target]:
    """Every row of the table on every architecture that takes it, in every dtype of its kind."""
    for arch, ((passname, kind, head_dim), rows) in product(archs, configs.TABLE.items()):
        precision = kind if kind == "tf32x3" else "ieee"
        if precision == "tf32x3" and arch_number(arch) not in configs.TF32X3_ARCHS:
            continue
        options = product(enumerate(rows), KIND_DTYPES[kind], variants_of(passname, variants))
        for (index, row), dtype, variant in options:
            target = Target(arch, passname, dtype, head_dim, variant, row=index, precision=precision)
            call = make_call(target)
            asked = passname, target.torch_dtype, head_dim, target.seq, arch_number(arch)
            if configs.row_for(*asked, call.extras(passname) > 0, call.knows_lengths, precision) is row:
                yield target


def variants_of(passname: str, variants: tuple[str, ...]) -> tuple[str, ...]:
    """The variants on which a pass has a kernel: only a float mask has a gradient."""
    if passname != "attn_mask_gradient":
        return variants
    return tuple(dict.fromkeys(name if VARIANTS[name].attn_mask == "bias" else "bias" for name in variants))
