"""The host side that every kernel shares: one description of a call, and the arguments all kernels take."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import chain
from typing import Any

import torch
import triton
from torch import Tensor

from padfree._triton import scores, spans, tiles
from padfree._triton.arguments import Dropout, Inputs, Sizes, Tile, View, Window
from padfree._triton.configs import Config, choose, has_tf32x3, limits_registers, padded_head_dim
from padfree._triton.launch import Pointed

OPEN = -1
MAX_PROGRAMS = 2**31 - 1
LOG2E = math.log2(math.e)
# Bytes that heads launched side by side may share in the L2: a third of an H100's, two fifths of an A100's.
L2_BYTES = 16 * 2**20


@cache
def settle_cache_keys() -> None:
    """Let Triton hash the shared device functions in one order, before any kernel.

    A kernel's key on disk depends on whether its callees were hashed before it (Triton 3.6 and 3.7: `_update_hash` reads
    a callee's constants before it has looked for them), so a process that starts with another kernel would compile anew.
    """
    for function in chain.from_iterable(vars(module).values() for module in (scores, tiles, spans)):
        if isinstance(function, triton.JITFunction):
            _ = function.cache_key


@dataclass
class Call:
    """One attention call in the padded form; a packed one is B = 1 with cu_seqlens, its rows end to end.

    query [B,H,M,D]; key, value [B,H_kv,N,D]; padding [B,N] bool or None; attn_mask 4-D or None;
    key_lengths [B] int32 or None; spans [B,3] int32, what a launch found in `padding` before, or None;
    seed [1] int64 or None (no dropout); max_q and max_k are M and N, or the longest packed sequence;
    left and right are a window's sides, OPEN where it has none. scale > 0.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    padding: Tensor | None
    attn_mask: Tensor | None
    seed: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    key_lengths: Tensor | None
    spans: Tensor | None
    max_q: int
    max_k: int
    scale: float
    dropout_p: float
    left: int
    right: int
    skip_padded_queries: bool

    @property
    def batch(self) -> int:
        return self.query.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.numel() - 1

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.key.shape[1]

    @property
    def has_padding(self) -> bool:
        return self.padding is not None or self.key_lengths is not None

    @property
    def knows_lengths(self) -> bool:
        """Sequences may end before max_k, and no mask need be read to see where."""
        return self.key_lengths is not None or self.cu_seqlens_k is not None

    @property
    def is_empty(self) -> bool:
        """No output row exists, so no kernel may be launched."""
        return self.batch == 0 or self.heads == 0 or self.max_q == 0 or self.query.shape[2] == 0

    def extras(self, passname: str) -> int:
        """How many things the pass holds in registers beside a tile of scores."""
        head_dim = self.query.shape[3]
        window_at_wide_head = (self.left, self.right) != (OPEN, OPEN) and head_dim > 64
        # dk and dv are held across the query heads that share them
        grouped = passname == "key_gradient" and self.heads != self.kv_heads
        return (
            (self.attn_mask is not None)
            + (self.seed is not None)
            + (window_at_wide_head or grouped)
            + self.unaligned
        )

    @property
    def unaligned(self) -> bool:
        """Judged from head_dim alone, so that another layout of the same numbers gives the same bits."""
        return self.query.shape[3] % 8 != 0

    @property
    def precision(self) -> str:
        """The `input_precision` of every dot of every pass: passes must agree about a weight to its last bits."""
        return dot_precision(self.query.dtype, self.query.shape[3], self.query.device)

    def config(self, passname: str) -> Config:
        """The launch configuration of one pass over this call."""
        query = self.query
        return choose(
            passname, query.dtype, query.shape[3], self.max_k, query.device,
            extras=self.extras(passname), unaligned=self.unaligned, known=self.knows_lengths,
            precision=self.precision,
        )  # fmt: skip

    def _side(self, side: int) -> int | None:
        """A window side for the kernel: no farther than the longest sequence, so that positions stay in 32 bits."""
        return None if side == OPEN else min(side, max(self.max_q, self.max_k))

    def empty_like(self, like: Tensor) -> Tensor:
        """A result of this shape, held as [B,S,H,D]; zeros where packed, since rows may belong to no sequence."""
        out = heads_last(like)
        return out if self.cu_seqlens_q is None else out.zero_()

    def empty_lse2(self) -> Tensor:
        """[B,H,M] fp32; -inf where packed, since rows may belong to no sequence."""
        batch, heads, rows, _ = self.query.shape
        lse2 = self.query.new_empty((batch, heads, rows), dtype=torch.float32)
        return lse2 if self.cu_seqlens_q is None else lse2.fill_(-math.inf)

    def empty_spans(self) -> Tensor | None:
        """[B,3] int32 for what the forward finds in the padding mask; None where nothing is to be found."""
        if self.padding is None or self.spans is not None:
            return None
        return self.query.new_empty((self.batch, 3), dtype=torch.int32)

    def grid(self, rows: int, block: int, heads: int) -> tuple[int]:
        """One program per block of rows, sequence and head."""
        programs = -(-rows // block) * self.batch * heads
        if programs > MAX_PROGRAMS:
            raise ValueError(f"query and key need {programs} programs; a GPU launches at most {MAX_PROGRAMS}")
        return (programs,)

    def view(self, tensor: Tensor | None) -> View:
        """A [B,H,S,...] tensor for a kernel; a packed sequence is found by its rows, not by its batch index."""
        if tensor is None:
            return ABSENT
        strides = tensor.stride()
        return View(tensor, strides if self.cu_seqlens_q is None else (0, *strides[1:]))

    def arguments(self, tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
        """What a kernel takes beside its TILE: the inputs, and the launch's own tensors, by the names of its parameters.

        Those that end in `_ptr` are handed over as they are, the others as a View.
        """
        own = {name: x if name.endswith("_ptr") else self.view(x) for name, x in tensors.items()}
        return {"inputs": self.inputs, **own}

    @cached_property
    def numbers(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """spans, cu_seqlens_q, cu_seqlens_k and key_lengths, contiguous; kept, since `pointed` keeps no tensor alive."""
        return (
            _as_one_row(self.spans),
            _as_one_row(self.cu_seqlens_q),
            _as_one_row(self.cu_seqlens_k),
            _as_one_row(self.key_lengths),
        )

    @cached_property
    def pointed(self) -> Pointed:
        """The tensors that `inputs` points to, in its order."""
        spans, *others = self.numbers
        return Pointed.at(
            self.query, self.key, self.value, self.padding, spans, self.attn_mask, self.seed, *others
        )

    @cached_property
    def scalars(self) -> tuple[Any, ...]:
        """All else that decides what its launches are made of."""
        return (
            self.max_q, self.max_k, self.scale, self.dropout_p, self.left, self.right, self.skip_padded_queries,
            self.precision,
        )  # fmt: skip

    @cached_property
    def inputs(self) -> Inputs:
        """What every kernel reads, in the groups it takes; absent things are None, which compiles to nothing."""
        padding, attn_mask = ABSENT, ABSENT
        if self.padding is not None:
            padding = View(_as_bytes(self.padding), self.padding.stride())
        if self.attn_mask is not None:
            # Strides are 0 where the mask is broadcast.
            full = self.attn_mask.expand(*self.query.shape[:3], self.key.shape[2])
            attn_mask = View(_as_bytes(self.attn_mask), full.stride())
        spans, cu_q, cu_k, key_lengths = self.numbers
        longest, head_dim = max(self.max_q, self.max_k), self.query.shape[3]
        together = heads_together(longest, head_dim, self.query.element_size())
        sizes = Sizes(
            self.batch, self.heads, self.max_q, self.max_k, cu_q, cu_k, key_lengths, together
        )  # fmt: skip
        return Inputs(
            q=self.view(self.query),
            k=self.view(self.key),
            v=self.view(self.value),
            padding=padding,
            spans_ptr=spans,
            attn_mask=attn_mask,
            dropout=Dropout(self.seed, self.dropout_p),
            window=Window(self._side(self.left), self._side(self.right)),
            sizes=sizes,
            scale=self.scale,
            scale2=self.scale * LOG2E,
        )

    def options(self, config: Config, *others: Tensor) -> dict[str, Any]:
        """What a kernel is compiled for. `others` are the launch's further [B,H,S,D] tensors, which are read as rows too."""
        settle_cache_keys()
        head_dim = self.query.shape[3]
        tile = Tile(
            HEAD_DIM=head_dim,
            BLOCK_D=padded_head_dim(head_dim),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            GROUP=self.heads // self.kv_heads if self.kv_heads else 1,
            SKIP_QUERIES=self.skip_padded_queries and self.has_padding,
            ONE_LOOP=config.one_loop and (self.padding is not None or self.knows_lengths),
            SCAN_BLOCK=spans.SCANNED.value * 32 * config.num_warps,
            PRECISION=self.precision,
            ALIGN=row_alignment(self.query, self.key, self.value, *others),
        )
        options: dict[str, Any] = {
            "TILE": tile,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }
        if limits_registers(config, self.query.device):
            options["maxnreg"] = config.max_registers
        return options


ABSENT = View(None, (0, 0, 0, 0))


def _as_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool mask as bytes, which is what a kernel can load; anything else as it is."""
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


def _as_one_row(lengths: Tensor | None) -> Tensor | None:
    """Contiguous: kernels read such numbers one after the other, but a saved-tensor hook may hand the backward any layout."""
    return None if lengths is None else lengths.contiguous()


def heads_together(rows: int, head_dim: int, itemsize: int) -> int:
    """How many heads to launch side by side, so that the two tensors that their programs share stay in the L2.

    A power of two of at least 16, which Triton compiles for once; of long sequences 16 heads share more than the L2 holds.
    """
    shared = 2 * max(rows, 1) * head_dim * itemsize
    return 1 << (max(16, L2_BYTES // shared).bit_length() - 1)


def dot_precision(dtype: torch.dtype, head_dim: int, device: torch.device) -> str:
    """How fp32 is multiplied, by what torch.backends.cuda.matmul.fp32_precision says when a pass is launched.

    "none", which is torch's default: as exact as fp32 by the error rule, by three TF32 products where matrix units are
    fast and were checked (`has_tf32x3`), else IEEE. "ieee": IEEE products. That is also what `allow_tf32 = False` and
    `torch.set_float32_matmul_precision("highest")` ask for. "tf32": one TF32 product, a thousand times less exact.
    """
    if dtype != torch.float32:
        return "ieee"  # 16-bit operands have no other
    asked = torch.backends.cuda.matmul.fp32_precision
    if asked == "none":
        return "tf32x3" if has_tf32x3(head_dim, device) else "ieee"
    return "tf32" if asked == "tf32" else "ieee"


def row_alignment(*tensors: Tensor) -> int:
    """8 if every row of every head starts at a multiple of 8 elements, as wide loads need; else 1.

    Triton finds out about multiples of 16 by itself, which misses the rows of a head_dim of 8.
    """
    return 8 if all(are_multiples_of_8(t.stride()) for t in tensors) else 1


@lru_cache(maxsize=4096)
def are_multiples_of_8(strides: tuple[int, ...]) -> bool:
    """Whether all but the last are; kept, since every launch asks this of each of its tensors."""
    return all(stride % 8 == 0 for stride in strides[:-1])


def heads_last(like: Tensor) -> Tensor:
    """An empty tensor of this [B,H,S,D] shape held in memory as [B,S,H,D], so that merging heads is free."""
    _, heads, rows, head_dim = like.shape
    # No transposed view: what an autograd.Function returns as a view may not be changed in place.
    strides = (rows * heads * head_dim, head_dim, heads * head_dim, 1)
    return like.new_empty_strided(like.shape, strides)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launch on the tensor's GPU, whichever is current; free where it is already."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)
