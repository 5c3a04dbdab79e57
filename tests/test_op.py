"""The kernel as PyTorch sees it: operators, compile, export, autograd's rules, memory and launches."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import padfree
from padfree._triton import operators
from padfree._triton.autograd import KernelOptions, dropout_seed
from padfree._triton.operators import ops
from padfree.testing import make_inputs, run

kernel = partial(padfree.attention, impl="triton")


def leaves_of(inputs):
    return [x.clone().requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]


def op_arguments(case: str, device: torch.device) -> tuple[Any, ...]:
    """Arguments of the forward op; B > 1 and odd sizes, or strides are not really checked."""
    settings: dict[str, Any] = {"heads": 2, "queries": 7, "keys": 7, "head_dim": 8, "padding": "right"}
    settings |= {
        "one query": {"queries": 1},
        "more keys": {"keys": 19, "padding": "holes"},
        "no padding": {"padding": "none"},
        "fp16": {"dtype": torch.float16},
        "bf16": {"dtype": torch.bfloat16},
        "grouped": {"heads": 4, "kv_heads": 2},
        "odd head_dim": {"head_dim": 5},
    }.get(case, {})
    inputs = make_inputs(
        3,
        settings.pop("heads"),
        *(settings.pop(k) for k in ("queries", "keys", "head_dim")),
        device=device,
        **settings,
    )
    query, key, value = inputs.query, inputs.key, inputs.value
    if case == "transposed":
        query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value))
    if case == "expanded":
        key, value = key[:1].expand_as(key), value[:, :1].expand_as(value)
    attn_mask = None
    if case == "float mask":
        attn_mask = torch.randn(1, 2, 7, 7, device=device)
    if case == "bool mask":
        attn_mask = torch.rand(3, 1, 7, 7, device=device) < 0.3
    dropout_p = 0.3 if case == "dropout" else 0.0
    window = {"causal": (None, 0), "window": (2, 3)}.get(case)
    options = KernelOptions.of(query, None, dropout_p, window, case == "skipped queries")
    seed = dropout_seed(query, options)
    return (
        query, key, value, inputs.key_padding_mask, attn_mask, seed,
        None, None, None, None, query.shape[2], key.shape[2], *options,
    )  # fmt: skip


OP_CASES = (
    "plain", "one query", "more keys", "no padding", "fp16", "bf16", "grouped", "odd head_dim", "transposed",
    "expanded", "float mask", "bool mask", "dropout", "causal", "window", "skipped queries",
)  # fmt: skip


@pytest.mark.parametrize("case", OP_CASES)
def test_the_operators_pass_all_checks_of_opcheck(case, device):
    arguments = op_arguments(case, device)
    checked = torch.library.opcheck(ops.forward.default, arguments)
    assert set(checked.values()) == {"SUCCESS"} and len(checked) == 4
    out, lse2, _ = ops.forward(*arguments)
    saved = (out, lse2, torch.randn_like(out), torch.randn_like(lse2))
    checked = torch.library.opcheck(ops.backward.default, (*saved, *arguments, case == "float mask"))
    assert set(checked.values()) == {"SUCCESS"}


def test_the_operator_of_a_fused_buffer_passes_all_checks_of_opcheck(device):
    qkv = torch.randn(3, 7, 3, 2, 8, device=device)
    options = KernelOptions.of(qkv, None, 0.0, None, False)
    call = (*[None] * 7, 7, 7, *options)
    out, lse2, _ = ops.forward(*qkv.permute(2, 0, 3, 1, 4).unbind(0), *call)
    checked = torch.library.opcheck(
        ops.backward_qkvpacked.default, (out, lse2, torch.randn_like(out), None, qkv, *call)
    )
    assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.parametrize("variant", ("padded", "one query", "varlen", "qkvpacked"))
def test_compiled_as_one_graph_for_any_length_it_gives_the_same_bits(variant, device):
    def attend(x, padding, cu):
        if variant == "padded":
            q, k, v = x.unbind(0)
            return kernel(q, k, v, padding, window=(3, None), skip_padded_queries=True)
        if variant == "one query":
            q, k, v = x.unbind(0)
            return kernel(q[:, :, :1], k, v, padding)
        if variant == "varlen":
            q, k, v = (y[0].transpose(0, 1) for y in x.unbind(0))
            return padfree.attention_varlen(q, k, v, cu, cu, x.shape[3], x.shape[3], impl="triton")
        return padfree.attention_qkvpacked(x.permute(1, 3, 0, 2, 4), padding, impl="triton")

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 18, 35):
        x = torch.randn(3, 2, 2, length, 8, device=device, requires_grad=True)
        padding = torch.arange(length, device=device) >= torch.tensor([[length], [3]], device=device)
        cu = torch.tensor([0, 3, length], dtype=torch.int32, device=device)
        wanted, got = attend(x, padding, cu), compiled(x, padding, cu)
        assert torch.equal(got, wanted)
        d_out = torch.randn_like(wanted)
        assert torch.equal(torch.autograd.grad(got, x, d_out)[0], torch.autograd.grad(wanted, x, d_out)[0])


def test_an_exported_module_gives_the_same_bits(device):
    class Attend(torch.nn.Module):
        def forward(self, query, key, value, padding):
            return kernel(query, key, value, padding, window=(4, 0))

    inputs = make_inputs(2, 2, 7, 7, 8, device=device, padding="right")
    arguments = (inputs.query, inputs.key, inputs.value, inputs.key_padding_mask)
    exported = torch.export.export(Attend(), arguments)
    assert torch.equal(exported.module()(*arguments), Attend()(*arguments))
    assert "padfree.forward" in str(exported.graph)


@pytest.mark.parametrize("queries", (1, 5))
def test_a_second_derivative_is_refused_and_the_message_says_what_to_do(queries, device):
    leaves = leaves_of(make_inputs(1, 1, queries, 5, 4, device=device))
    with pytest.raises(RuntimeError, match="impl='reference'"):
        torch.autograd.grad(kernel(*leaves).sum(), leaves, create_graph=True)


@pytest.mark.parametrize("queries", (1, 9))
def test_a_retained_graph_gives_the_same_gradients_twice(queries, device):
    inputs = make_inputs(2, 2, queries, 9, 8, device=device, padding="right")
    leaves = leaves_of(inputs)
    out = kernel(*leaves, inputs.key_padding_mask)
    first = torch.autograd.grad(out, leaves, inputs.d_out, retain_graph=True)
    second = torch.autograd.grad(out, leaves, inputs.d_out)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, leaves, inputs.d_out)


@pytest.mark.parametrize("subset", range(1, 16))
def test_gradients_come_exactly_where_asked_and_do_not_depend_on_the_others(subset, device):
    inputs = make_inputs(2, 2, 7, 9, 8, device=device, padding="right")
    bias = torch.randn(2, 1, 7, 9, generator=torch.Generator().manual_seed(0)).to(device)

    def gradients(asked):
        leaves = [x.clone() for x in (inputs.query, inputs.key, inputs.value, bias)]
        for index in asked:
            leaves[index].requires_grad_()
        kernel(*leaves[:3], inputs.key_padding_mask, attn_mask=leaves[3]).backward(inputs.d_out)
        return [leaf.grad for leaf in leaves]

    asked = [index for index in range(4) if subset >> index & 1]
    every, some = gradients(range(4)), gradients(asked)
    for index in range(4):
        assert (some[index] is None) == (index not in asked)
        if index in asked:
            assert torch.equal(some[index], every[index])


def test_a_saved_tensor_changed_in_place_is_refused(device):
    inputs = make_inputs(1, 1, 5, 5, 4, device=device)
    leaves = leaves_of(inputs)
    query = leaves[0] * 1
    out = kernel(query, *leaves[1:])
    query.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class Block(torch.nn.Module):
    """A module with dropout in its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = torch.nn.Linear(16, 48)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        qkv = self.projection(hidden).unflatten(-1, (3, 2, 8))
        return padfree.attention_qkvpacked(
            qkv, dropout_p=0.4 if self.training else 0.0, impl="triton"
        ).flatten(-2)


def test_checkpointing_replays_the_same_dropout(device):
    torch.manual_seed(0)
    block, hidden = Block().to(device), torch.randn(2, 9, 16, device=device)
    gradients = []
    for attend in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        torch.manual_seed(1)
        block.zero_grad()
        attend(hidden).square().sum().backward()
        gradients.append(block.projection.weight.grad.clone())
    assert torch.equal(*gradients)


def test_a_copied_module_gives_the_same_bits(device):
    block, hidden = Block().to(device).eval(), torch.randn(2, 9, 16, device=device)
    assert torch.equal(copy.deepcopy(block)(hidden), block(hidden))


def test_dropout_follows_the_seed_of_torch(device):
    inputs = make_inputs(2, 2, 9, 9, 8, device=device)
    outs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        outs.append(kernel(inputs.query, inputs.key, inputs.value, dropout_p=0.5))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0][0, 0], outs[0][0, 1]) and not torch.equal(outs[0][0], outs[0][1])


class Allocations(TorchDispatchMode):
    """Bytes of every storage that an operation of the block brings into being."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage()._cdata for x in _tensors((args, kwargs or {}))}
        result = func(*args, **kwargs or {})
        for x in _tensors(result):
            if x.untyped_storage()._cdata not in known:
                self.storages[x.untyped_storage()._cdata] = x.untyped_storage()
        return result

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("queries", (1, 37))
@pytest.mark.parametrize("skip", (False, True))
def test_a_call_allocates_its_results_and_one_number_a_row_more(queries, skip, device):
    """out + LSE and what the mask holds forward; dq, dk, dv + delta backward: nothing of size [M, N], no fp32 copy of a gradient."""
    batch, heads, keys, head_dim = 2, 2, 37, 8
    inputs = make_inputs(
        batch, heads, queries, keys, head_dim, dtype=torch.float16, device=device, padding="right"
    )
    arguments = (inputs.query, inputs.key, inputs.value, inputs.key_padding_mask)
    rows = batch * heads * queries
    options = KernelOptions.of(inputs.query, None, 0.0, None, skip and queries == keys)
    call = (*arguments, *[None] * 6, queries, keys, *options)
    with Allocations() as forward:
        out, lse2, _ = operators._forward(*call)
    results = rows * head_dim * 2
    assert forward.bytes == results + rows * 4 + batch * 3 * 4
    with Allocations() as backward:
        operators._backward(out, lse2, inputs.d_out, None, *call, False)
    delta = 0 if queries == 1 else rows * 4
    assert backward.bytes == results + 2 * batch * heads * keys * head_dim * 2 + delta


@pytest.mark.parametrize("options", ({}, {"window": (None, 0)}, {"dropout_p": 0.1}), ids=str)
def test_a_call_is_one_launch_forward_and_two_backward(options, device, sanitizer_report):
    if sanitizer_report is None:
        pytest.skip("compiled kernels are counted by the profiler of the benchmark")
    inputs = make_inputs(2, 2, 37, 37, 64, device=device, padding="right")
    leaves = leaves_of(inputs)
    out = kernel(*leaves, inputs.key_padding_mask, **options)
    assert sanitizer_report.total["launches"] == 1
    out.backward(inputs.d_out)
    assert sanitizer_report.total["launches"] == 3


def test_one_query_is_one_launch_forward_and_one_backward(device, sanitizer_report):
    if sanitizer_report is None:
        pytest.skip("compiled kernels are counted by the profiler of the benchmark")
    inputs = make_inputs(2, 2, 1, 37, 64, device=device, padding="right")
    run(kernel, inputs)
    assert sanitizer_report.total["launches"] == 2


@pytest.mark.parametrize("padding", ("right", "zero_keys"))
def test_no_grad_and_inference_mode_give_the_same_bits(padding, device):
    inputs = make_inputs(2, 2, 7, 9, 8, device=device, padding=padding)
    leaves = leaves_of(inputs)
    wanted = kernel(*leaves, inputs.key_padding_mask)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = kernel(*leaves, inputs.key_padding_mask)
        assert torch.equal(got, wanted) and not got.requires_grad


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_made_without_gradients_gives_them_later(device):
    inputs = make_inputs(1, 1, 9, 9, 8, device=device)
    traced = torch.jit.trace(lambda q, k, v: kernel(q, k, v), (inputs.query, inputs.key, inputs.value))
    wanted = torch.autograd.grad(kernel(*(leaves := leaves_of(inputs))).sum(), leaves)
    got = torch.autograd.grad(traced(*(leaves := leaves_of(inputs))).sum(), leaves)
    for mine, its in zip(got, wanted, strict=True):
        assert torch.equal(mine, its)
