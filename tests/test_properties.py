"""Bitwise properties over generated calls: what must not matter changes no bit of any result.

hypothesis draws the call (sizes, dtype, padding, window, magnitude, a seed); every test compares out, LSE and all
gradients with torch.equal. `make soak` runs the same properties over many more examples.
"""

import math
from dataclasses import replace
from functools import partial

import hypothesis.strategies as st
import torch
from hypothesis import given

import padfree
from known_bugs import assert_same_bits
from padfree.testing import PADDING_PATTERNS, Inputs, Results, make_inputs, run

kernel = partial(padfree.attention, impl="triton")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WINDOWS = (None, None, (None, 0), (3, 2), (0, None))
POISONS = (math.nan, math.inf, -math.inf, "largest")


@st.composite
def calls(
    draw,
    paddings: tuple[str, ...] = PADDING_PATTERNS,
    self_attention: bool = False,
    batch: int = 1,
    heads: int = 1,
):
    """(Inputs, options): one small call of any kind; lengths lie on both sides of a tile's edge.

    As few programs as the property needs: the sweep of test_backward.py is what walks batches and heads.
    """
    queries = draw(st.sampled_from((1, 2, 7, 16, 17, 33)))
    keys = queries if self_attention else draw(st.sampled_from((1, 3, 15, 16, 33)))
    inputs = make_inputs(
        batch,
        heads,
        queries,
        keys,
        draw(st.sampled_from((1, 8, 16, 24))),
        kv_heads=1,
        dtype=draw(st.sampled_from(DTYPES)),
        padding=draw(st.sampled_from(paddings)),
        magnitude=draw(st.sampled_from((0.0, 1e-3, 1.0, 30.0))),
        lse_gradient=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
        device=DEVICE,
    )
    return inputs, {
        "window": draw(st.sampled_from(WINDOWS)),
        "skip_padded_queries": self_attention and draw(st.booleans()),
    }


HIDDEN_PATTERNS = tuple(name for name in PADDING_PATTERNS if name != "none")


def poison_for(inputs: Inputs, poison: float | str) -> float:
    return torch.finfo(inputs.query.dtype).max if poison == "largest" else float(poison)


def expand_hidden(inputs: Inputs) -> torch.Tensor:
    return inputs.key_padding_mask[:, None, :, None].expand_as(inputs.key)


@given(calls(HIDDEN_PATTERNS), st.sampled_from(POISONS))
def test_what_stands_in_padded_keys_and_values_is_inert(call, poison):
    inputs, options = call
    poison = poison_for(inputs, poison)
    hidden = expand_hidden(inputs)
    poisoned = replace(
        inputs, key=inputs.key.masked_fill(hidden, poison), value=inputs.value.masked_fill(hidden, poison)
    )
    got, wanted = run(kernel, poisoned, **options), run(kernel, inputs, **options)
    assert_same_bits(got, wanted)
    assert not got.dk[hidden].any() and not got.dv[hidden].any()
    assert all(torch.isfinite(x).all() for x in (got.out, got.dq, got.dk, got.dv))


@given(calls(HIDDEN_PATTERNS, self_attention=True), st.sampled_from(POISONS))
def test_what_stands_in_rows_that_see_nothing_is_inert(call, poison):
    """Their queries and their incoming gradients: dead rows, and padded ones where those are skipped."""
    inputs, options = call
    poison = poison_for(inputs, poison)
    wanted = run(kernel, inputs, **options)
    dead = (wanted.lse == -math.inf)[..., None].expand_as(inputs.query)
    poisoned = replace(
        inputs, query=inputs.query.masked_fill(dead, poison), d_out=inputs.d_out.masked_fill(dead, poison)
    )
    got = run(kernel, poisoned, **options)
    assert_same_bits(got, wanted)
    assert not got.out[dead].any() and not got.dq[dead].any()


@given(calls(), st.sampled_from((1, 15, 50)), st.sampled_from(POISONS))
def test_more_padding_at_the_end_is_inert(call, extra, poison):
    inputs, options = call
    poison = poison_for(inputs, poison)
    batch, keys = inputs.query.shape[0], inputs.key.shape[2]
    padding = (
        torch.zeros(batch, keys, dtype=torch.bool)
        if inputs.key_padding_mask is None
        else inputs.key_padding_mask
    )
    tail = inputs.key.new_full((*inputs.key.shape[:2], extra, inputs.key.shape[3]), poison)
    longer = replace(
        inputs,
        key=torch.cat([inputs.key, tail], 2),
        value=torch.cat([inputs.value, tail], 2),
        key_padding_mask=torch.cat([padding, torch.ones_like(padding[:, :1]).expand(-1, extra)], 1),
    )
    got = run(kernel, longer, **options | {"skip_padded_queries": False})
    wanted = run(
        kernel, replace(inputs, key_padding_mask=padding), **options | {"skip_padded_queries": False}
    )
    assert not got.dk[:, :, keys:].any() and not got.dv[:, :, keys:].any()
    assert_same_bits(got._replace(dk=got.dk[:, :, :keys], dv=got.dv[:, :, :keys]), wanted)


def part_of(inputs: Inputs, rows: slice) -> Inputs:
    return Inputs(**{name: None if x is None else x[rows] for name, x in vars(inputs).items()})


@given(calls(batch=2))
def test_a_batch_split_in_two_gives_the_same_bits(call):
    inputs, options = call
    parts = [run(kernel, part_of(inputs, rows), **options)[:5] for rows in (slice(0, 1), slice(1, 2))]
    assert_same_bits(
        Results(*(torch.cat(pair) for pair in zip(*parts, strict=True))), run(kernel, inputs, **options)
    )


@given(calls(batch=2), st.sampled_from((0, 1)), st.sampled_from(POISONS))
def test_a_sequence_does_not_depend_on_its_neighbour(call, b, poison):
    """Not even on a neighbour full of NaN."""
    inputs, options = call
    poison = poison_for(inputs, poison)
    changed = replace(
        inputs, **{name: getattr(inputs, name).clone() for name in ("query", "key", "value", "d_out")}
    )
    for x in (changed.query, changed.key, changed.value, changed.d_out):
        x[1 - b] = poison
    got, wanted = run(kernel, changed, **options), run(kernel, inputs, **options)
    assert_same_bits(Results(*(x[b] for x in got[:5])), Results(*(x[b] for x in wanted[:5])))


@given(calls(HIDDEN_PATTERNS), st.sampled_from(((1, -1), (1, 1, -1))))
def test_every_form_of_the_padding_mask_gives_the_same_bits(call, form):
    inputs, options = call
    shaped = replace(inputs, key_padding_mask=inputs.key_padding_mask.unflatten(1, form))
    assert_same_bits(run(kernel, shaped, **options), run(kernel, inputs, **options))


@given(calls(("none",), self_attention=True))
def test_a_mask_that_hides_nothing_equals_no_mask(call):
    inputs, options = call
    shape = inputs.key.shape[0], inputs.key.shape[2]
    masked = replace(inputs, key_padding_mask=torch.zeros(shape, dtype=torch.bool, device=DEVICE))
    assert_same_bits(run(kernel, masked, **options), run(kernel, inputs, **options))


@given(calls(("right",)))
def test_padding_on_the_left_gives_the_output_of_padding_on_the_right(call):
    inputs, _ = call
    right, left = [], []
    for b, shown in enumerate((~inputs.key_padding_mask).sum(1).tolist()):
        shift = inputs.key.shape[2] - shown
        left.append(
            (
                inputs.key[b].roll(shift, 1),
                inputs.value[b].roll(shift, 1),
                inputs.key_padding_mask[b].roll(shift),
            )
        )
        right.append(shift)
    key, value, padding = (torch.stack(column) for column in zip(*left, strict=True))
    wanted = kernel(inputs.query, inputs.key, inputs.value, inputs.key_padding_mask, return_lse=True)
    got = kernel(inputs.query, key, value, padding, return_lse=True)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in other memory, with NaN wherever no element stands."""
    if layout == "heads last":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "columns first":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "every second column":
        return torch.stack([x, torch.full_like(x, math.nan)], -1).flatten(-2)[..., ::2]
    if layout == "slice":
        return torch.nn.functional.pad(x, (1, 2, 3, 1), value=math.nan)[..., 3:-1, 1:-2]
    return x.new_full((x.numel() + 5,), math.nan)[5:].copy_(x.flatten()).view(x.shape)  # offset


LAYOUTS = ("heads last", "columns first", "every second column", "slice", "offset")


@given(calls(batch=2), st.tuples(*[st.sampled_from(LAYOUTS)] * 4))
def test_layouts_of_inputs_and_incoming_gradient_change_no_bit(call, layouts):
    inputs, options = call
    names = ("query", "key", "value", "d_out")
    strided = {
        name: laid_out(getattr(inputs, name), layout) for name, layout in zip(names, layouts, strict=True)
    }
    if inputs.key_padding_mask is not None:
        strided["key_padding_mask"] = inputs.key_padding_mask.T.contiguous().T
    assert_same_bits(run(kernel, replace(inputs, **strided), **options), run(kernel, inputs, **options))


@given(calls(batch=2), st.sampled_from(("batch", "row", "column", "all")))
def test_expanded_inputs_and_gradients_equal_repeated_ones(call, along):
    """Stride 0, as `.sum()`, `.mean()` and a shared key make it."""
    inputs, options = call
    dims = {"batch": [0], "row": [2], "column": [3], "all": [0, 1, 2, 3]}[along]

    def expanded(x: torch.Tensor) -> torch.Tensor:
        for dim in dims:
            x = x.narrow(dim, 0, 1)
        return x

    views, copies = {}, {}
    for name in ("key", "value", "d_out"):
        x = getattr(inputs, name)
        views[name] = expanded(x).expand_as(x)
        copies[name] = views[name].contiguous()
    assert_same_bits(
        run(kernel, replace(inputs, **views), **options), run(kernel, replace(inputs, **copies), **options)
    )


@given(calls(heads=2))
def test_permuted_heads_give_permuted_results(call):
    inputs, options = call
    two = {
        name: torch.cat([x[:, :1], x[:, -1:].roll(1, 2) * 2], 1)
        for name, x in vars(inputs).items()
        if x is not None and x.ndim == 4
    }
    swapped = {name: x.flip(1) for name, x in two.items()}
    got = run(kernel, replace(inputs, d_lse=None, **swapped), **options)
    wanted = run(kernel, replace(inputs, d_lse=None, **two), **options)
    assert_same_bits(got, Results(*(x.flip(1) for x in wanted[:5])))


@given(calls(), st.data())
def test_a_float_mask_of_minus_infinity_hides_what_a_bool_mask_hides_in_every_form(call, data):
    """Not with the bool mask's bits: adding a bias spends the multiply-add that a bool mask leaves to the exponent."""
    inputs, options = call
    full = inputs.query.shape[:3] + inputs.key.shape[2:3]
    shape = data.draw(st.sampled_from((full, inputs.key.shape[2:3])))
    seed = data.draw(st.integers(0, 2**32 - 1))
    hidden = (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4).to(DEVICE)
    bias = torch.zeros(shape, dtype=inputs.query.dtype, device=DEVICE).masked_fill(hidden, -math.inf)
    got = run(kernel, replace(inputs, attn_mask=bias), **options)
    written_out = run(kernel, replace(inputs, attn_mask=bias.expand(full).contiguous()), **options)
    assert_same_bits(got._replace(d_attn_mask=None), written_out._replace(d_attn_mask=None))
    assert not got.d_attn_mask.masked_select(hidden).any()
    assert not written_out.d_attn_mask.masked_select(hidden).any()
    by_bool = run(kernel, replace(inputs, attn_mask=hidden), **options)
    assert torch.equal(got.lse == -math.inf, by_bool.lse == -math.inf)


@given(calls(HIDDEN_PATTERNS, self_attention=True, heads=2))
def test_a_rerun_in_another_program_order_gives_the_same_bits(call):
    """The sanitizer shuffles the programs of every launch anew."""
    inputs, options = call
    assert_same_bits(run(kernel, inputs, **options), run(kernel, inputs, **options))


@given(calls(HIDDEN_PATTERNS, self_attention=True))
def test_skipping_padded_queries_changes_no_other_row(call):
    inputs, options = call
    hidden = inputs.key_padding_mask[:, None, :, None].expand_as(inputs.query)
    silent = replace(inputs, d_out=inputs.d_out.masked_fill(hidden, 0), d_lse=None)
    every = run(kernel, silent, **options | {"skip_padded_queries": False})
    live = run(kernel, silent, **options | {"skip_padded_queries": True})
    assert torch.equal(live.out, every.out.masked_fill(hidden, 0))
    assert torch.equal(live.dq, every.dq.masked_fill(hidden, 0))


@given(calls())
def test_only_the_first_query_equals_the_first_row_of_all(call):
    """Another kernel may answer it, so it agrees within rounding: by the spread of the values and an ulp of fp32."""
    inputs, options = call
    options = options | {"skip_padded_queries": False}
    arguments = (inputs.key, inputs.value, inputs.key_padding_mask)
    out, lse = kernel(inputs.query, *arguments, return_lse=True, **options)
    first, first_lse = kernel(inputs.query[:, :, :1], *arguments, return_lse=True, **options)
    logits = (
        lse.masked_fill(lse == -math.inf, 0).abs().max().item() + inputs.query.float().abs().max().item() ** 2
    )
    precision = torch.finfo(inputs.query.dtype).eps
    torch.testing.assert_close(first_lse, lse[:, :, :1], rtol=0, atol=1e-6 * max(1.0, logits))
    torch.testing.assert_close(first, out[:, :, :1], rtol=0, atol=4 * precision + 4e-6 * max(1.0, logits))
