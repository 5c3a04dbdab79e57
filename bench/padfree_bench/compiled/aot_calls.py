"""Which launches the compiled evidence covers: every row of the configuration table, every variant, every shape kind.

Tensors are on the meta device: a launch that is only compiled reads shapes, strides and dtypes, so a sequence
of any length costs nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from padfree._triton import configs, operators
from padfree._triton.call import OPEN, Call, heads_last
from padfree._triton.configs import Row
from padfree_bench.compiled.aot import Arch, Compiled, arch_number, compile_only

LONGEST = 4096
KIND_DTYPES = {"half": (torch.bfloat16, torch.float16), "float": (torch.float32,)}


@dataclass(frozen=True)
class Variant:
    """One combination of the options that select code in the kernels."""

    padding: bool = True
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
# (batch, query heads, key heads without grouping, what is taken from S and D): how a launcher's integers specialise.
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
    row: int = 0
    variant: str = "padded"
    shape: str = "sixteens"

    @property
    def kind(self) -> str:
        return configs.dtype_kind(getattr(torch, self.dtype))

    @property
    def table_row(self) -> Row:
        return configs.TABLE[self.passname, self.kind, configs.padded_head_dim(self.head_dim)][self.row]

    @property
    def seq(self) -> int:
        """A length that the row is chosen for: its own limit, or one past its predecessor's."""
        return min(self.table_row.max_length, LONGEST)


def make_call(target: Target) -> Call:
    """The call that leads to the target's row, on the meta device."""
    variant, (batch, heads, odd) = VARIANTS[target.variant], SHAPES[target.shape]
    seq, head_dim, dtype = target.seq - odd, target.head_dim - odd, getattr(torch, target.dtype)
    if variant.group > 1:
        heads *= variant.group
    kv_heads = heads // variant.group

    rows = 1 if target.passname == "single_query" else seq

    def tensor(count: int, seq: int) -> Tensor:
        shape = (1, batch * seq, count, head_dim) if variant.packed else (batch, seq, count, head_dim)
        return torch.empty(shape, dtype=dtype, device="meta").transpose(1, 2)

    cu_seqlens = torch.empty(batch + 1, dtype=torch.int32, device="meta") if variant.packed else None
    mask_dtype = torch.bool if variant.attn_mask == "bool" else dtype
    mask = (
        torch.empty(batch, heads, rows, seq, dtype=mask_dtype, device="meta") if variant.attn_mask else None
    )
    return Call(
        query=tensor(heads, rows),
        key=tensor(kv_heads, seq),
        value=tensor(kv_heads, seq),
        padding=torch.empty(batch, seq, dtype=torch.bool, device="meta") if variant.padding else None,
        attn_mask=mask,
        seed=torch.empty(1, dtype=torch.int64, device="meta") if variant.dropout else None,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_q=rows,
        max_k=seq,
        scale=variant.scale or target.head_dim**-0.5,
        dropout_p=0.1 if variant.dropout else 0.0,
        left=variant.left,
        right=variant.right,
        skip_padded_queries=variant.skip and rows == seq,
    )


def compile_target(target: Target) -> list[Compiled]:
    """The kernels that read the target's row, as autograd would launch them for its call."""
    call = make_call(target)
    arguments = [getattr(call, field.name) for field in fields(call)]
    lse = torch.empty(call.query.shape[:3], device="meta")
    out = heads_last(call.query)
    d_lse = torch.empty_like(lse) if VARIANTS[target.variant].lse_gradient else None
    saved = (out, lse, torch.empty_like(out), d_lse)
    with compile_only(target.arch, KERNELS[target.passname]) as compiled:
        operators._forward(*arguments)
        operators._backward(*saved, *arguments, VARIANTS[target.variant].attn_mask == "bias")
    return compiled


def table_targets(archs: tuple[Arch, ...], variants: tuple[str, ...] = ("padded",)) -> Iterator[Target]:
    """Every row of the table on every architecture that takes it, in every dtype of its kind."""
    for arch in archs:
        for (passname, kind, head_dim), rows in configs.TABLE.items():
            for index, row in enumerate(rows):
                for dtype in KIND_DTYPES[kind]:
                    for variant in variants_of(passname, variants):
                        target = Target(
                            arch, passname, str(dtype).removeprefix("torch."), head_dim, index, variant
                        )
                        extras = make_call(target).extras(passname) > 0
                        if (
                            configs.row_for(passname, dtype, head_dim, target.seq, arch_number(arch), extras)
                            is row
                        ):
                            yield target


def variants_of(passname: str, variants: tuple[str, ...]) -> tuple[str, ...]:
    """The variants on which a pass has a kernel: only a float mask has a gradient."""
    if passname != "attn_mask_gradient":
        return variants
    return tuple(
        dict.fromkeys(variant if VARIANTS[variant].attn_mask == "bias" else "bias" for variant in variants)
    )
