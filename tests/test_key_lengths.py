"""Lengths that the caller knows, spans that are found once, and one loop for all tiles: other ways to the same bits."""

from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

import padfree
from drawn import normal
from known_bugs import KERNEL, assert_same_bits
from padfree._triton import call as calls_module
from padfree._triton import configs, launch, operators
from padfree._triton.call import Call
from padfree.testing import PADDING_PATTERNS, Inputs, Results, make_inputs, run
from test_properties import calls

HALF = torch.float16
PASSES = ("forward", "query_gradient", "key_gradient")


def lengths_of(mask: Tensor) -> Tensor:
    return (~mask).sum(1, dtype=torch.int32)


def without_mask(inputs: Inputs) -> tuple[Inputs, Tensor]:
    """The same call with its right padding told by lengths."""
    assert inputs.key_padding_mask is not None
    return replace(inputs, key_padding_mask=None), lengths_of(inputs.key_padding_mask)


@given(calls(("right",), batch=2))
def test_lengths_give_the_bits_of_the_equal_mask(call: tuple[Inputs, dict[str, Any]]) -> None:
    inputs, options = call
    told, lengths = without_mask(inputs)
    assert_same_bits(
        run(partial(KERNEL, key_lengths=lengths), told, **options), run(KERNEL, inputs, **options)
    )


@given(calls(("right",), batch=2, self_attention=True))
def test_lengths_skip_the_queries_that_the_mask_skips(call: tuple[Inputs, dict[str, Any]]) -> None:
    inputs, options = call
    options |= {"skip_padded_queries": True}
    told, lengths = without_mask(inputs)
    assert_same_bits(
        run(partial(KERNEL, key_lengths=lengths), told, **options), run(KERNEL, inputs, **options)
    )


@pytest.mark.parametrize("impl", ("triton", "reference", "auto"))
@pytest.mark.parametrize("queries", (1, 40))
def test_lengths_beyond_the_keys_count_as_all_and_negative_ones_as_none(impl: str, queries: int) -> None:
    inputs = make_inputs(4, 2, queries, 40, 16, dtype=HALF)
    wrong = torch.tensor([-(2**31), -1, 41, 2**31 - 1], dtype=torch.int32)
    attend = partial(padfree.attention, impl=impl)
    got = run(partial(attend, key_lengths=wrong), inputs)
    wanted = run(partial(attend, key_lengths=wrong.clamp(0, 40)), inputs)
    assert_same_bits(got, wanted)
    assert (
        not got.out[:2].any()
        and bool((got.lse[:2] == -torch.inf).all())
        and bool(got.lse[2:].isfinite().all())
    )


def test_what_stands_beyond_a_length_is_inert_and_has_no_gradient() -> None:
    inputs = make_inputs(3, 2, 40, 40, 16, dtype=HALF)
    attend = partial(KERNEL, key_lengths=torch.tensor([0, 7, 33], dtype=torch.int32))
    hidden = (torch.arange(40) >= torch.tensor([0, 7, 33])[:, None])[:, None, :, None].expand_as(inputs.key)
    poisoned = replace(
        inputs,
        key=inputs.key.masked_fill(hidden, torch.nan),
        value=inputs.value.masked_fill(hidden, torch.inf),
    )
    got = run(attend, poisoned)
    assert_same_bits(got, run(attend, inputs))
    assert not got.dk[hidden].any() and not got.dv[hidden].any()


@pytest.mark.parametrize("kind", ("dropout", "bias", "bool"))
@pytest.mark.parametrize("queries", (1, 37))
@pytest.mark.parametrize("kv_heads", (1, 2))
def test_lengths_go_with_dropout_and_masks(kind: str, queries: int, kv_heads: int) -> None:
    inputs = make_inputs(2, 2, queries, 37, 16, kv_heads=kv_heads, padding="right")
    bias = normal(1, 2, 1, 37, seed=3)
    inputs = replace(inputs, attn_mask={"bias": bias, "bool": bias > 1}.get(kind))
    told, lengths = without_mask(inputs)
    results: list[Results] = []
    for attend, call in ((KERNEL, inputs), (partial(KERNEL, key_lengths=lengths), told)):
        torch.manual_seed(5)
        results.append(run(attend, call, dropout_p=0.3 if kind == "dropout" else 0.0))
    assert_same_bits(results[1], results[0])


def test_a_fused_buffer_takes_lengths() -> None:
    qkv = normal(3, 20, 3, 2, 16, seed=1, dtype=HALF).requires_grad_()
    lengths = torch.tensor([20, 3, 0], dtype=torch.int32)
    mask = torch.arange(20) >= lengths.cpu()[:, None]
    for impl in ("triton", "reference", "auto"):
        attend = partial(padfree.attention_qkvpacked, qkv, skip_padded_queries=True, impl=impl)
        known, masked = attend(key_lengths=lengths), attend(mask.to(qkv.device))
        assert torch.equal(known, masked), impl
        grads = [torch.autograd.grad(out.float().square().sum(), qkv)[0] for out in (known, masked)]
        assert torch.equal(*grads), impl


def test_weights_of_a_call_with_lengths_are_those_of_the_mask() -> None:
    inputs = make_inputs(2, 2, 9, 20, 16, padding="right")
    mask = inputs.key_padding_mask
    assert mask is not None
    lse = run(KERNEL, inputs).lse
    known = padfree.attention_weights(inputs.query, inputs.key, lse, key_lengths=lengths_of(mask))
    assert torch.equal(known, padfree.attention_weights(inputs.query, inputs.key, lse, mask))
    assert torch.allclose(known.sum(-1), torch.ones(2, 2, 9), atol=1e-5)


def test_compiled_as_one_graph_lengths_give_the_same_bits() -> None:
    inputs = make_inputs(2, 2, 20, 20, 16, dtype=HALF)
    attend = partial(KERNEL, inputs.query, inputs.key, inputs.value)
    compiled = torch.compile(lambda lengths: attend(key_lengths=lengths), fullgraph=True, backend="aot_eager")
    for lengths in ([20, 3], [1, 0]):
        told = torch.tensor(lengths, dtype=torch.int32)
        assert torch.equal(compiled(told), attend(key_lengths=told))


# Spans


def masks(length: int) -> Tensor:
    """One sequence of each pattern, of all and of one key, and each of the 2**6 patterns of a short one."""
    patterns = [make_inputs(2, 1, 1, length, 8, padding=name).key_padding_mask for name in PADDING_PATTERNS]
    drawn = [x for x in patterns if x is not None]
    short = torch.ones(64, length, dtype=torch.bool)
    short[:, 500:506] = torch.tensor([[bool(i >> bit & 1) for bit in range(6)] for i in range(64)])
    return torch.cat([*drawn, short])


def spans_by_hand(mask: Tensor) -> Tensor:
    rows = []
    for row in mask:
        shown = (~row).nonzero().flatten().tolist()
        first, stop = (shown[0], shown[-1] + 1) if shown else (0, 0)
        rows.append([first, stop, int(len(shown) < stop - first)])
    return torch.tensor(rows, dtype=torch.int32)


def test_the_forward_finds_the_spans_that_key_spans_finds(device: torch.device) -> None:
    """Over more than one block of the scan, patterns across its border included."""
    mask = masks(513).to(device)
    x = torch.zeros(len(mask), 1, 1, 8, dtype=HALF, device=device)
    key = x.expand(-1, -1, 513, -1)
    wanted = spans_by_hand(mask.cpu())
    assert torch.equal(padfree.key_spans(mask).cpu(), wanted)
    assert torch.equal(padfree.key_spans(mask[:, None, None]).cpu(), wanted)
    for query in (x, x.expand(-1, -1, 2, -1)):
        call = described(query, key, padding=mask)
        assert torch.equal(operators._forward(*arguments(call))[2].cpu(), wanted), query.shape


def described(query: Tensor, key: Tensor, **more: Any) -> Call:
    call = Call(query, key, key, *[None] * 7, query.shape[2], key.shape[2], 1.0, 0.0, -1, -1, False)  # type: ignore[arg-type]
    return replace(call, **more)


def arguments(call: Call) -> list[Any]:
    return [getattr(call, field.name) for field in fields(call)]


def test_spans_of_no_keys_are_empty() -> None:
    assert padfree.key_spans(torch.ones(2, 0, dtype=torch.bool)).tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize(
    "wrong",
    (torch.ones(2, 5, dtype=torch.uint8), torch.ones(2, 5), torch.ones(5, dtype=torch.bool),
     torch.ones(2, 4, 5, dtype=torch.bool), torch.ones(2, 1, 5, 5, dtype=torch.bool), [[True]], None),
    ids=lambda x: f"{x.dtype} {[*x.shape]}" if isinstance(x, Tensor) else type(x).__name__,
)  # fmt: skip
def test_what_is_no_padding_mask_has_no_spans(wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="key_padding_mask must"):
        padfree.key_spans(wrong)


@given(calls(batch=2))
def test_given_spans_give_the_bits_of_found_ones(call: tuple[Inputs, dict[str, Any]]) -> None:
    inputs, options = call
    mask = inputs.key_padding_mask
    spans = None if mask is None else padfree.key_spans(mask)
    assert_same_bits(run(partial(KERNEL, key_spans=spans), inputs, **options), run(KERNEL, inputs, **options))


def test_the_passes_believe_the_spans_and_read_nothing_that_is_not_there(device: torch.device) -> None:
    """Those of another mask leave keys out, in every pass; those beyond the tensors are cut."""
    inputs = make_inputs(2, 1, 40, 40, 16, dtype=HALF, device=device, padding="right")
    assert inputs.key_padding_mask is not None
    open_mask = torch.zeros_like(inputs.key_padding_mask)
    believed = replace(inputs, key_padding_mask=open_mask)
    told = torch.tensor([[0, 5, 0], [3, 20, 0]], dtype=torch.int32, device=device)
    got = run(partial(KERNEL, key_spans=told), believed)
    n = torch.arange(40, device=device)
    as_mask = (n < told[:, :1]) | (n >= told[:, 1:2])
    wanted = run(KERNEL, replace(inputs, key_padding_mask=as_mask))
    assert_same_bits(got._replace(dk=wanted.dk, dv=wanted.dv), wanted)
    beyond = torch.tensor([[-7, 2**31 - 1, 0]] * 2, dtype=torch.int32, device=device)
    assert_same_bits(run(partial(KERNEL, key_spans=beyond), believed), run(KERNEL, believed))
    # Behind the last key and back to front: nothing is visible, and a window's arithmetic must not overflow.
    for nowhere in ([2**31 - 1, 40, 0], [30, -(2**31), 1], [-(2**31), -1, 1]):
        spans = torch.tensor([nowhere] * 2, dtype=torch.int32, device=device)
        for skip in (False, True):
            options = {"window": (40, 40), "skip_padded_queries": skip}
            assert not run(partial(KERNEL, key_spans=spans), believed, **options).out.any(), nowhere


def test_the_backward_reads_what_the_forward_found(device: torch.device) -> None:
    inputs = make_inputs(2, 1, 40, 40, 16, dtype=HALF, device=device, padding="right")
    seen: list[Any] = []
    backward = operators.launch_backward

    def watched(call: Call, *rest: Any) -> None:
        seen.append(call.spans)
        backward(call, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "launch_backward", watched)
        run(KERNEL, inputs)
    assert inputs.key_padding_mask is not None
    assert torch.equal(seen[0], padfree.key_spans(inputs.key_padding_mask))


# One loop, and the order of programs


@pytest.mark.parametrize("passname", PASSES)
@pytest.mark.parametrize("padding", (*PADDING_PATTERNS, "lengths", "packed"))
@pytest.mark.parametrize("window", (None, (None, 0), (20, 9)), ids=str)
def test_one_loop_gives_the_bits_of_two(
    passname: str, padding: str, window: Any, device: torch.device
) -> None:
    pattern = "right" if padding in ("lengths", "packed") else padding
    inputs = make_inputs(2, 2, 70, 70, 16, dtype=HALF, device=device, padding=pattern, lse_gradient=True)
    attend: Any = KERNEL
    if padding == "lengths":
        inputs, lengths = without_mask(inputs)
        attend = partial(KERNEL, key_lengths=lengths)
    elif padding == "packed":
        inputs, attend = without_mask(inputs)[0], packed
    options = {"window": window, "skip_padded_queries": padding != "packed"}
    wanted = run(attend, inputs, **options)
    row = configs.row_for(passname, HALF, 16, 70, 0)
    assert not row.config.one_loop
    row_for, forced = configs.row_for, row._replace(config=row.config._replace(one_loop=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            configs, "row_for", lambda name, *key: forced if name == passname else row_for(name, *key)
        )
        patch.setattr(launch, "_kept", {})
        assert_same_bits(run(attend, inputs, **options), wanted)


def packed(
    query: Tensor, key: Tensor, value: Tensor, mask: None, *, attn_mask: None, return_lse: bool, window: Any,
    skip_padded_queries: bool,
) -> Any:  # fmt: skip
    """The same sequences as one packed row, each cut 9 rows before its end."""
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    batch, _, length, _ = query.shape
    ends = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device)
    out, lse = padfree.attention_varlen(
        *rows, ends, ends, length - 9, length - 9, window=window, return_lse=return_lse, impl="triton"
    )
    return out.unflatten(0, (batch, length)).transpose(1, 2), lse.unflatten(1, (batch, length)).transpose(
        0, 1
    )


@pytest.mark.parametrize("together", (16, 32, 1 << 20))
def test_the_order_of_programs_changes_no_bit(together: int, device: torch.device) -> None:
    """More heads than stand together, and a last group that is not full."""
    inputs = make_inputs(5, 7, 40, 40, 16, dtype=HALF, device=device, padding="right")
    wanted = run(KERNEL, inputs)
    bytes_a_head = 2 * 40 * 16 * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls_module, "L2_BYTES", together * bytes_a_head)
        patch.setattr(launch, "_kept", {})
        assert calls_module.heads_together(40, 16, 2) == together
        assert_same_bits(run(KERNEL, inputs), wanted)
