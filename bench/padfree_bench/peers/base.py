"""What a peer is: one implementation of padded attention behind one small signature."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from padfree_bench.measuring.inputs import Inputs

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
Change = Callable[[Tensor], Tensor]


class Refused(Exception):
    """This peer cannot run this case; the text says why and becomes the row."""


def same(tensor: Tensor) -> Tensor:
    return tensor


def swap(tensor: Tensor) -> Tensor:
    """[B, H, S, D] as [B, S, H, D], or back; the memory stays."""
    return tensor.transpose(1, 2)


@dataclass
class Prepared:
    """One peer, ready to be timed on one case.

    forward() computes the output in the peer's own layout; backward differentiates it by `leaves` for `d_out`.
    `output` and `grads` bring the results to [B, H, S, D] for the check and are never timed.
    `ran` names what really computes it, as far as it is known before a profile.
    """

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    d_out: Tensor
    ran: str
    output: Change = same
    grads: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = tuple

    def answer(self, training: bool) -> Iterator[tuple[str, Tensor]]:
        """Run once: (name, [B, H, S, D]) of the output, then of the three gradients when training."""
        result = self.forward()
        yield "out", self.output(result.detach())
        if training:
            grads = self.grads(torch.autograd.grad(result, self.leaves, self.d_out))
            yield from zip(("d_query", "d_key", "d_value"), grads, strict=True)


@dataclass(frozen=True)
class Peer:
    """name as in tables; `note` says what the time includes; `upper_bound` marks a wrong answer kept for scale."""

    name: str
    prepare: Callable[[Inputs, bool], Prepared]
    note: str
    upper_bound: bool = False
    slow_to_compile: bool = False


def leaves_of(*tensors: Tensor, training: bool) -> tuple[Tensor, ...]:
    """Detached inputs, which require a gradient when the case trains."""
    return tuple(tensor.detach().requires_grad_(training) for tensor in tensors)


def padded(
    inputs: Inputs, training: bool, run: Run, ran: str, there: Change = same, back: Change = same
) -> Prepared:
    """A peer that takes and returns [B, H, S, D], or what `there` makes of it before the clock starts and `back` undoes."""
    leaves = leaves_of(*map(there, (inputs.query, inputs.key, inputs.value)), training=training)

    def grads(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(map(back, parts))

    return Prepared(lambda: run(*leaves), leaves, there(inputs.d_out), ran, back, grads)


def packed(inputs: Inputs, training: bool, run: Callable[..., Tensor], ran: str) -> Prepared:
    """A peer that takes and returns [T, H, D], packed before the clock starts.

    run(query, key, value, cu_seqlens, max_seqlen), the last two for queries and keys alike.
    """
    where = (inputs.cu_seqlens(), inputs.case.seq)
    return padded(inputs, training, lambda *qkv: run(*qkv, *where), ran, inputs.pack, inputs.unpack)


def packing(inputs: Inputs, training: bool, run: Callable[..., Tensor], ran: str) -> Prepared:
    """A packed peer, of the same `run`, that starts and ends padded: offsets, gather and scatter are inside the clock."""

    def whole(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keep = ~inputs.padding
        cu_seqlens = torch.nn.functional.pad(torch.cumsum(keep.sum(1), 0, dtype=torch.int32), (1, 0))
        where = torch.nonzero(keep.flatten()).flatten()
        rows = (tensor.transpose(1, 2).flatten(0, 1).index_select(0, where) for tensor in (query, key, value))
        out = run(*rows, cu_seqlens, inputs.case.seq)
        batch, seq = inputs.padding.shape
        spread = out.new_zeros(batch * seq, *out.shape[1:]).index_copy(0, where, out)
        return spread.view(batch, seq, *out.shape[1:]).transpose(1, 2)

    return padded(inputs, training, whole, ran)


def compiled(function: Callable[..., Any], donate: bool = False, **options: Any) -> Callable[..., Any]:
    """torch.compile for fixed shapes, compiled anew for every case; `donate` where no graph is gone back through twice."""
    import torch._dynamo
    import torch._functorch.config

    # Beyond its limit of 8 shapes torch would run eager code in silence.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 2**16
    # The backward alone is timed with retain_graph, which donated buffers forbid.
    torch._functorch.config.donated_buffer = donate
    return torch.compile(function, dynamic=False, **options)


def needs(module: str) -> Any:
    """The module; refuses with its name where it is not installed."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - a broken wheel fails in many ways; each is a reason for the row
        first_line = (str(error).splitlines() or [""])[0]
        raise Refused(f"{module} is not usable here: {type(error).__name__}: {first_line}") from None


def needs_cuda(inputs: Inputs, what: str, module: str, half_only: bool = True) -> Any:
    """The module of `what`; refuses a CPU, fp32 where it takes 16 bits only, and where it is not installed."""
    if inputs.device.type != "cuda":
        raise Refused(f"{what} runs on CUDA only, this is {inputs.device.type}")
    if half_only and inputs.query.dtype not in (torch.float16, torch.bfloat16):
        raise Refused(f"{what} takes fp16 and bf16 only, this is {inputs.case.dtype}")
    return needs(module)
