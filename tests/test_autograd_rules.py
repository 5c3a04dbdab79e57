"""What PyTorch does around a call: autocast, torch.func's transforms, hooks on saved tensors."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev, jvp, vjp, vmap

import padfree
from drawn import chosen, normal
from padfree.testing import make_inputs

KERNEL = partial(padfree.attention, impl="triton")
SHAPE = (2, 2, 5, 8)


def three(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    return [normal(*shape, seed=seed + index) for index in range(3)]


def packed_call(impl: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    packed = (x[0].transpose(0, 1) for x in (query, key, value))
    return padfree.attention_varlen(*packed, cu, cu, 3, 3, impl=impl)


def fused_call(impl: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return padfree.attention_qkvpacked(torch.stack([query, key, value], 2), impl=impl)


def padded_call(impl: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    padding = torch.arange(key.shape[2]) >= 4
    return padfree.attention(query, key, value, padding.expand(query.shape[0], -1), impl=impl)


ENTRY_POINTS = {"attention": padded_call, "attention_varlen": packed_call, "attention_qkvpacked": fused_call}


# autocast


@pytest.mark.parametrize("impl", ["triton", "reference", "auto"])
@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_computes_in_its_dtype_as_for_sdpa(
    low: torch.dtype, entry_point: str, impl: str, device: torch.device
) -> None:
    leaves = [x.requires_grad_() for x in three()]
    # as projections and norms leave them under autocast: some cast, some not
    query, key, value = leaves[0], leaves[1].to(low), leaves[2].double().float()
    with torch.autocast(device.type, low):
        out = ENTRY_POINTS[entry_point](impl, query, key, value)
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    by_hand = [x.detach().to(low).requires_grad_() for x in leaves]
    wanted = ENTRY_POINTS[entry_point](impl, *by_hand)
    wanted_grads = torch.autograd.grad(wanted.float().square().sum(), by_hand)
    assert out.dtype == low and torch.equal(out, wanted)
    for one, other in zip(grads, wanted_grads, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other.float())


def test_autocast_leaves_fp64_and_casts_a_bias(device: torch.device) -> None:
    query, key, value = three()
    bias = normal(5, 5, seed=9)
    with torch.autocast(device.type, torch.bfloat16):
        assert (
            padfree.attention(*(x.double() for x in (query, key, value)), impl="reference").dtype
            == torch.float64
        )
        got = KERNEL(query, key, value, attn_mask=bias)
    low = [x.bfloat16() for x in (query, key, value, bias)]
    assert torch.equal(got, KERNEL(*low[:3], attn_mask=low[3]))


def test_without_autocast_mixed_dtypes_are_still_refused() -> None:
    query, key, value = three()
    with pytest.raises(TypeError, match="key must have query's dtype"):
        KERNEL(query, key.half(), value)


def test_autocast_compiles_into_one_graph(device: torch.device) -> None:
    query, key, value = three()

    def call(query: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.float16):
            return KERNEL(query, key, value)

    assert torch.equal(torch.compile(call, backend="eager", fullgraph=True)(query), call(query))


# torch.func


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: grad(lambda *x: f(*x).square().sum(), argnums=(0, 1, 2))(*x),
        lambda f, x: vjp(f, *x)[1](torch.ones_like(f(*x))),
        lambda f, x: jacrev(f, argnums=(0, 1, 2))(*x),
    ],
    ids=["grad", "vjp", "jacrev"],
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_reverse_mode_transforms_agree_with_the_reference(
    transform: Callable[..., tuple[Tensor, ...]], entry_point: str
) -> None:
    inputs = three(shape=(1, 1, 5, 4))
    got, wanted = (
        transform(partial(ENTRY_POINTS[entry_point], impl), inputs) for impl in ("triton", "reference")
    )
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_runs_sample_by_sample() -> None:
    inputs = [torch.stack([x, 2 * x, -x]) for x in three()]
    got = vmap(partial(padded_call, "triton"))(*inputs)
    wanted = torch.stack([padded_call("triton", *sample) for sample in zip(*inputs, strict=True)])
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_what_the_kernel_cannot_derive_is_refused_in_our_words(entry_point: str) -> None:
    inputs = three()
    call = partial(ENTRY_POINTS[entry_point], "triton")

    def loss(*x: Tensor) -> Tensor:
        return call(*x).square().sum()

    with pytest.raises(RuntimeError, match="differentiable once; .* use impl='reference'"):
        grad(lambda *x: grad(loss)(*x).sum())(*inputs)
    for forward_mode in (lambda: jvp(call, tuple(inputs), tuple(inputs)), lambda: hessian(loss)(*inputs)):
        with pytest.raises(RuntimeError, match="no forward-mode derivative .* use impl='reference'"):
            forward_mode()


def test_forward_ad_outside_of_func_is_refused_too() -> None:
    query, key, value = three()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, torch.ones_like(query))
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            KERNEL(dual, key, value)


# saved tensors


def laid_out_anew(x: Tensor) -> Tensor:
    """The same numbers in memory that is reversed by axes and holds every second place only."""
    if x.ndim == 0:
        return x
    spread = torch.stack([x, x], -1).movedim(-1, 0).permute(*range(x.ndim, 0, -1), 0).contiguous()
    return spread.permute(x.ndim, *range(x.ndim - 1, -1, -1))[0]


SAVED = {
    "padded": {"queries": 7, "keys": 9},
    "one query": {"queries": 1, "keys": 9},
    "grouped": {"queries": 7, "keys": 9, "kv_heads": 1},
}


@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("case", SAVED)
def test_saved_tensors_may_come_back_in_any_layout(case: str, mask: torch.dtype | None) -> None:
    sizes = {"batch": 3, "heads": 2, "head_dim": 8} | SAVED[case]
    inputs = make_inputs(**sizes, padding="holes")
    attn_mask = None
    if mask is not None:
        attn_mask = normal(3, 2, sizes["queries"], 9, seed=4)
        attn_mask = attn_mask.requires_grad_() if mask == torch.float32 else attn_mask > 1
    assert_same_gradients_after_repacking(
        lambda *leaves: KERNEL(*leaves, inputs.key_padding_mask, attn_mask=attn_mask, return_lse=True),
        [inputs.query, inputs.key, inputs.value, *([attn_mask] if mask == torch.float32 else [])],
        keep=3,
    )


@pytest.mark.parametrize("window", [None, (1, 2)], ids=str)
def test_saved_tensors_of_packed_calls_may_come_back_in_any_layout(window: Any) -> None:
    cu = torch.tensor([0, 3, 3, 8, 12], dtype=torch.int32)
    packed = {"dropout_p": 0.3, "window": window, "return_lse": True, "impl": "triton"}
    assert_same_gradients_after_repacking(
        lambda q, k, v: padfree.attention_varlen(q, k, v, cu, cu, 5, 5, **packed), three(shape=(12, 2, 8))
    )
    assert_same_gradients_after_repacking(
        lambda qkv: padfree.attention_qkvpacked(qkv, cu_seqlens=cu, max_seqlen=5, **packed),
        [normal(12, 3, 2, 8, seed=1)],
    )
    padding = chosen(3, 6, share=0.3, seed=2)
    assert_same_gradients_after_repacking(
        lambda qkv: padfree.attention_qkvpacked(qkv, padding, **packed), [normal(3, 6, 3, 2, 8, seed=1)]
    )


def assert_same_gradients_after_repacking(
    call: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor], keep: int | None = None
) -> None:
    """Gradients are equal bit for bit with and without the hook; the call takes the first `keep` inputs."""
    found = []
    for unpack in (lambda x: x, laid_out_anew):
        leaves = [
            x.detach().requires_grad_() if keep is None or i < keep else x for i, x in enumerate(inputs)
        ]
        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
            out, lse = call(*leaves[:keep])
        outputs = [out, lse.masked_fill(lse == -torch.inf, 0)]
        found.append(torch.autograd.grad(outputs, leaves, [normal(*x.shape, seed=7) for x in outputs]))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_laid_out_anew_changes_strides_and_no_number() -> None:
    for shape in ((4,), (2, 3), (2, 3, 4), (2, 3, 4, 5)):
        x = normal(*shape, seed=0)
        assert torch.equal(laid_out_anew(x), x) and laid_out_anew(x).stride() != x.stride()
