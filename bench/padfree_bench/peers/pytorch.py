"""What PyTorch itself offers: the plain formula, nn.MultiheadAttention, SDPA, varlen_attn, nested tensors, FlexAttention."""

import logging
import math
import warnings
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from padfree_bench.measuring.inputs import Inputs
from padfree_bench.peers.base import Peer, Prepared, Refused, compiled, needs_cuda, packed, packing, padded

# torch remarks on its own prototype and its own deprecated call, which the reader of a benchmark cannot mend.
warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors", category=UserWarning)
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
# One compiled function a process, compiled anew for every shape.
compiled_once = cache(compiled)
GPU_ONLY = {SDPBackend.EFFICIENT_ATTENTION: "efficient", SDPBackend.CUDNN_ATTENTION: "cudnn"}


def notebook_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """softmax(query @ keyᵀ / sqrt(D) + mask * -1e9) @ value with mask [B, 1, 1, S], True = padding."""
    scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
    scores = scores + (mask * -1e9).to(scores.dtype)
    return torch.matmul(torch.softmax(scores, dim=-1), value)


def eager(inputs: Inputs, training: bool) -> Prepared:
    """The course notebook's attention, as it is written there."""
    mask = inputs.padding[:, None, None, :]
    ran = "two matmuls and a softmax"
    return padded(inputs, training, lambda q, k, v: notebook_attention(q, k, v, mask), ran)


def compile_eager(inputs: Inputs, training: bool) -> Prepared:
    """What the compiler makes of the plain formula."""
    mask, run = inputs.padding[:, None, None, :], compiled_once(notebook_attention)
    return padded(inputs, training, lambda q, k, v: run(q, k, v, mask), "inductor, default mode")


def multihead_attention(inputs: Inputs, training: bool) -> Prepared:
    """With identity projections, so that it computes the same function."""
    case, width = inputs.case, inputs.case.heads * inputs.case.head_dim
    identity = torch.eye(width)
    module = nn.MultiheadAttention(width, case.heads, bias=False, batch_first=True)
    with torch.no_grad():
        module.in_proj_weight.copy_(identity.repeat(3, 1))
        module.out_proj.weight.copy_(identity)
    module.requires_grad_(training)
    module.to(inputs.device, inputs.query.dtype).train(training)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = (tensor.transpose(1, 2).flatten(2) for tensor in (query, key, value))
        out, _ = module(*rows, key_padding_mask=inputs.padding, need_weights=False)
        return out.unflatten(2, (case.heads, case.head_dim)).transpose(1, 2)

    return padded(inputs, training, run, "nn.MultiheadAttention, need_weights=False")


def sdpa(
    inputs: Inputs, training: bool, backend: SDPBackend | None = None, with_mask: bool = True
) -> Prepared:
    """One backend, or the one that torch's dispatcher picks for this call."""
    mask = inputs.keep[:, None, None, :] if with_mask else None
    if inputs.device.type == "cpu" and backend in GPU_ONLY:
        raise Refused(f"torch has no {GPU_ONLY[backend]} backend on a CPU")

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask)

    if backend is None:
        prepared = padded(inputs, training, plain, "")
        # The leaves and not the inputs: the choice depends on whether a gradient is wanted.
        query, key, value = prepared.leaves
        chosen = SDPBackend(torch._fused_sdp_choice(query, key, value, mask))
        prepared.ran = f"SDPBackend.{chosen.name}"
        return prepared

    def restricted(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return plain(query, key, value)

    return padded(inputs, training, restricted, f"SDPBackend.{backend.name}")


def varlen(inputs: Inputs, training: bool, pack: bool = False) -> Prepared:
    """FlashAttention-2, packed before the clock starts or inside it."""
    attend = needs_cuda(inputs, "varlen_attn", "torch.nn.attention.varlen").varlen_attn

    def run(query: Tensor, key: Tensor, value: Tensor, cu: Tensor, longest: int) -> Tensor:
        return cast(Tensor, attend(query, key, value, cu, cu, longest, longest))

    if pack:
        return packing(inputs, training, run, "nonzero, gather, varlen_attn, scatter")
    return packed(inputs, training, run, "varlen_attn")


def nested(inputs: Inputs, training: bool) -> Prepared:
    """SDPA on a jagged NestedTensor, nested before the clock starts."""
    # One tensor of offsets for all: autograd refuses a gradient whose jagged dimension is not the output's own.
    offsets, lengths = inputs.cu_seqlens().to(torch.int64), inputs.case.sequence_lengths()
    bounds: dict[str, Any] = {"min_seqlen": int(lengths.min()), "max_seqlen": int(lengths.max())}

    def nest(tensor: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(inputs.pack(tensor), offsets, **bounds)

    def run(*leaves: Tensor) -> Tensor:
        query, key, value = (leaf.transpose(1, 2) for leaf in leaves)
        return scaled_dot_product_attention(query, key, value).transpose(1, 2)

    def back(jagged: Tensor) -> Tensor:
        return inputs.unpack(jagged.values())

    return padded(inputs, training, run, "SDPA on torch.jagged", nest, back)


def flex(inputs: Inputs, training: bool, count_mask: bool) -> Prepared:
    """FlexAttention with a block mask of the padding, built before the clock starts or inside it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case, lengths = inputs.case, inputs.lengths
    if inputs.device.type != "cuda" and training:
        raise Refused("FlexAttention has no backward on a CPU")
    if inputs.device.type == "cuda" and case.head_dim < 16:
        raise Refused("FlexAttention does not implement head_dim below 16")
    attend, create = compiled_once(flex_attention), compiled_once(create_block_mask)

    def real(batch: Tensor, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
        return (col < lengths[batch]) & (row < lengths[batch])

    def block_mask():  # type: ignore[no-untyped-def]
        return create(real, case.batch, None, case.seq, case.seq, device=inputs.device)

    ready = None if count_mask else block_mask()

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, block_mask=block_mask() if ready is None else ready)

    return padded(inputs, training, run, "flex_attention under torch.compile, padded rows masked too")


def _sdpa(name: str, note: str, backend: SDPBackend | None = None, with_mask: bool = True) -> Peer:
    prepare = partial(sdpa, backend=backend, with_mask=with_mask)
    return Peer(name, prepare, note, upper_bound=not with_mask)


def _flex(name: str, note: str, count_mask: bool) -> Peer:
    return Peer(name, partial(flex, count_mask=count_mask), note, slow_to_compile=True)


MASK = "boolean mask [B,1,1,S]"
UPPER = "no mask: wrong answer where there is padding, an upper bound"
PEERS = [
    Peer("eager", eager, "the notebook's attention"),
    Peer("nn.MultiheadAttention", multihead_attention, "its four projections are inside the time"),
    _sdpa("sdpa", f"{MASK}, torch's own choice of backend"),
    _sdpa("sdpa-math", MASK, SDPBackend.MATH),
    _sdpa("sdpa-efficient", MASK, SDPBackend.EFFICIENT_ATTENTION),
    _sdpa("sdpa-cudnn", MASK, SDPBackend.CUDNN_ATTENTION),
    _sdpa("sdpa-flash-nomask", UPPER, SDPBackend.FLASH_ATTENTION, with_mask=False),
    _sdpa("sdpa-cudnn-nomask", UPPER, SDPBackend.CUDNN_ATTENTION, with_mask=False),
    Peer("varlen_attn", varlen, "ready-packed input and output"),
    Peer("varlen_attn+pack", partial(varlen, pack=True), "offsets, packing and unpacking inside the time"),
    Peer("nested", nested, "jagged NestedTensor ready, lengths known to the host"),
    _flex("flex", "block mask ready", count_mask=False),
    _flex("flex+mask", "block mask built in the call", count_mask=True),
]
COMPILED = Peer("compile-eager", compile_eager, "torch.compile of eager", slow_to_compile=True)
