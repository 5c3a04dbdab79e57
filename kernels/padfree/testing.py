"""What a test of attention needs: inputs, padding patterns, the fp64 truth, an error rule without slack, a tile count.

The rule: truth is `reference` in fp64 on the already rounded inputs; `low` is `eager_attention`, plain torch in the
dtype under test. An attention passes where its error is at most `factor` times that of `low`, plus one unit in the
last place of the largest true value, for the maximum and for the mean over all elements.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from padfree._arguments import Window
from padfree._triton.tile_count import TileCount, visited_tiles
from padfree.reference import reference

__all__ = [
    "BACKWARD_FACTOR", "FORWARD_FACTOR", "PADDING_PATTERNS", "Errors", "Inputs", "Results", "TileCount",
    "assert_matches_reference", "assert_within_reference_error", "eager_attention", "make_inputs", "padding_mask",
    "run", "unit_in_last_place", "visible_pairs", "visited_tiles",
]  # fmt: skip

FORWARD_FACTOR = 1.5
BACKWARD_FACTOR = 2.0

PADDING_PATTERNS = (
    "none", "right", "left", "both_sides", "holes", "alternate", "first_tile", "one_key", "zero_keys", "all",
)  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """One attention call and its incoming gradients, in the shapes of `padfree.attention`; None where absent."""

    query: Tensor
    key: Tensor
    value: Tensor
    d_out: Tensor
    key_padding_mask: Tensor | None = None
    attn_mask: Tensor | None = None
    d_lse: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same call with every floating point tensor in `dtype`."""
        given = {name: tensor for name, tensor in vars(self).items() if tensor is not None}
        return replace(self, **{name: x.to(dtype) for name, x in given.items() if x.is_floating_point()})


class Results(NamedTuple):
    """out [B,H,M,D], lse [B,H,M] and the gradients, shaped as the inputs; d_attn_mask only for a float mask."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    d_attn_mask: Tensor | None = None


class Errors(NamedTuple):
    """|actual - truth|, |low - truth| and what was allowed, of one tensor: by maximum or by mean."""

    actual: float
    low: float
    budget: float


def make_inputs(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    *,
    kv_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    padding: str = "none",
    magnitude: float = 1.0,
    lse_gradient: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Inputs:
    """Normal random inputs, the same on every device: torch's default one where None is named.

    `magnitude` scales query and key, `padding` names a pattern.
    """
    device = torch.get_default_device() if device is None else device
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*shape: int, factor: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device="cpu") * factor).to(device, dtype)

    kv_shape = (batch, heads if kv_heads is None else kv_heads, keys, head_dim)
    mask = padding_mask(padding, batch, keys, generator=generator)
    return Inputs(
        query=normal(batch, heads, queries, head_dim, factor=magnitude),
        key=normal(*kv_shape, factor=magnitude),
        value=normal(*kv_shape),
        d_out=normal(batch, heads, queries, head_dim),
        key_padding_mask=None if mask is None else mask.to(device),
        d_lse=normal(batch, heads, queries).float() if lse_gradient else None,
    )


def padding_mask(pattern: str, batch: int, keys: int, *, generator: torch.Generator) -> Tensor | None:
    """bool [batch, keys], True = padding, in one of PADDING_PATTERNS; None for "none".

    "one_key" and "zero_keys" leave sequence 0 one visible key or none; "first_tile" hides the first half.
    """
    if pattern not in PADDING_PATTERNS:
        raise ValueError(f"padding must be one of {', '.join(PADDING_PATTERNS)}, got {pattern!r}")
    if pattern == "none":
        return None
    with torch.device(generator.device):
        n = torch.arange(keys)
        lengths = torch.randint(1, max(keys, 1) + 1, (batch, 1), generator=generator)
        mask = n >= lengths
        if pattern == "left":
            mask = mask.flip(1)
        elif pattern == "both_sides":
            mask |= n < lengths // 3
        elif pattern == "holes":
            mask = torch.rand(batch, keys, generator=generator) < 0.5
        elif pattern == "alternate":
            mask = ((n + torch.arange(batch)[:, None]) % 2).bool()
        elif pattern == "first_tile":
            mask[:] = n < (keys + 1) // 2
        elif pattern == "one_key":
            mask[0] = n != int(torch.randint(keys, (), generator=generator))
        elif pattern == "zero_keys":
            mask[0] = True
        elif pattern == "all":
            mask[:] = True
        return mask


def visible_pairs(
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    window: Window,
    skip_padded_queries: bool,
) -> Tensor:
    """bool [B, H, M, N], True where a query sees a key."""
    batch, heads, queries, keys = *query.shape[:3], key.shape[2]
    visible = torch.ones(batch, heads, queries, keys, dtype=torch.bool, device=query.device)
    if key_padding_mask is not None:
        padding = key_padding_mask.reshape(batch, keys)
        visible &= ~padding.view(batch, 1, 1, keys)
        if skip_padded_queries:
            visible &= ~padding.view(batch, 1, queries, 1)
    if attn_mask is not None:
        visible &= ~attn_mask if attn_mask.dtype == torch.bool else attn_mask != -math.inf
    if window is not None:
        behind = torch.arange(queries, device=query.device)[:, None] - torch.arange(keys, device=query.device)
        left, right = window
        if left is not None:
            visible &= behind <= left
        if right is not None:
            visible &= behind >= -right
    return visible


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    window: Window = None,
    skip_padded_queries: bool = False,
    return_lse: bool = False,
    dropout_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention written independently of the kernel, every step rounded to query's dtype; padding must be finite.

    The LSE is fp32 in every dtype, and so are the scores it comes from. On a GPU the matrix units sum the scores of fp16
    and bf16, as they do in any kernel; those of Hopper cut the sum off after every 8 products.
    """
    visible = visible_pairs(query, key, key_padding_mask, attn_mask, window, skip_padded_queries)
    live = visible.any(-1, keepdim=True)
    hidden = ~visible & live
    group = query.shape[1] // max(key.shape[1], 1)
    key, value = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    bias = None
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        bias = attn_mask.masked_fill(attn_mask == -math.inf, 0)

    def scores_in(dtype: torch.dtype) -> Tensor:
        scores = query.to(dtype) @ key.to(dtype).transpose(-2, -1)
        if query.is_cuda and dtype != query.dtype:
            # The product of the GPU's matrix units has no gradient, so only its value is taken.
            flat_query, flat_key = (x.detach().flatten(0, 1) for x in (query, key))
            product = torch.bmm(flat_query, flat_key.mT, out_dtype=torch.float32).view_as(scores)
            scores = scores + (product - scores.detach())
        scores = scores * scale
        return (scores if bias is None else scores + bias.to(dtype)).masked_fill(hidden, -math.inf)

    weights = torch.softmax(scores_in(query.dtype), dim=-1).masked_fill(~live, 0)
    if dropout_mask is not None:
        weights = weights.masked_fill(dropout_mask, 0) / (1 - dropout_p)
    out = weights @ value
    if not return_lse:
        return out
    lse = torch.logsumexp(scores_in(torch.promote_types(query.dtype, torch.float32)), dim=-1)
    return out, lse.masked_fill(~live[..., 0], -math.inf)


def run(attention: Callable[..., Any], inputs: Inputs, **options: Any) -> Results:
    """out, lse and all gradients of one call of `attention` on fresh leaves made of `inputs`."""
    leaves = [x.detach().requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
    attn_mask = inputs.attn_mask
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.detach().requires_grad_()
        leaves.append(attn_mask)
    options |= {"attn_mask": attn_mask, "return_lse": True}
    out, lse = attention(*leaves[:3], inputs.key_padding_mask, **options)
    outputs, gradients = [out], [inputs.d_out]
    if inputs.d_lse is not None:
        outputs.append(lse.masked_fill(lse == -math.inf, 0))
        gradients.append(inputs.d_lse.to(lse.dtype))
    grads = torch.autograd.grad(outputs, leaves, gradients)
    return Results(out.detach(), lse.detach(), *grads)


def assert_matches_reference(
    attention: Callable[..., Any],
    calls: Inputs | Sequence[Inputs],
    *,
    dropout_mask: Tensor | None = None,
    name: str = "",
    found: list[Errors] | None = None,
    **options: Any,
) -> list[Results]:
    """Assert that `attention` obeys the error rule, forward and backward, on calls alike but for their seed.

    Errors and budgets are taken over all `calls` together, so that a few small tensors do not make the budget
    a matter of luck. Rows and keys that see nothing are compared exactly. `found` takes the errors of each tensor.
    """
    calls = [calls] if isinstance(calls, Inputs) else calls
    oracle_options = options if dropout_mask is None else options | {"dropout_mask": dropout_mask}
    actual = [run(attention, inputs, **options) for inputs in calls]
    truth = [run(reference, inputs.to(torch.float64), **oracle_options) for inputs in calls]
    low = [run(eager_attention, inputs, **oracle_options) for inputs in calls]
    for inputs, got in zip(calls, actual, strict=True):
        _assert_unseen_is_zero(inputs, got, name, options)
    for field in Results._fields:
        columns = [[getattr(r, field) for r in results] for results in (actual, low, truth)]
        if columns[2][0] is None:
            continue
        if field == "lse":
            columns = [[x.masked_fill(x == -math.inf, 0) for x in column] for column in columns]
        factor = FORWARD_FACTOR if field in ("out", "lse") else BACKWARD_FACTOR
        errors = assert_within_reference_error(*columns, factor=factor, name=f"{name} {field}".strip())
        if found is not None:
            found += errors
    return actual


def assert_within_reference_error(
    actual: Tensor | Sequence[Tensor],
    low: Tensor | Sequence[Tensor],
    truth: Tensor | Sequence[Tensor],
    *,
    factor: float = FORWARD_FACTOR,
    name: str = "",
) -> tuple[Errors, Errors]:
    """Assert the error rule of this module and return the figures (by maximum, by mean).

    `actual` must have low's shape and dtype and be finite; several tensors are judged as one.

    Raises:
        AssertionError: with actual error, error of `low` and budget, where one of them is exceeded.
    """
    actual, low, truth = ([x] if isinstance(x, Tensor) else list(x) for x in (actual, low, truth))
    for got, rounded, true in zip(actual, low, truth, strict=True):
        if got.shape != true.shape or rounded.shape != true.shape:
            raise AssertionError(f"{name}: shape {list(got.shape)}, expected {list(true.shape)}")
        if got.dtype != rounded.dtype:
            raise AssertionError(f"{name}: dtype {got.dtype}, expected {rounded.dtype}")
        for what, tensor in (("actual", got), ("low", rounded), ("truth", true)):
            if not torch.isfinite(tensor).all():
                raise AssertionError(f"{name}: {what} holds NaN or Inf")
    got, rounded, true = (torch.cat([x.double().flatten() for x in given]) for given in (actual, low, truth))
    if not true.numel():
        return Errors(0, 0, 0), Errors(0, 0, 0)
    ulp = unit_in_last_place(true.abs().max().item(), actual[0].dtype)
    figures = []
    for by in ("max", "mean"):
        error, eager_error = (getattr((x - true).abs(), by)().item() for x in (got, rounded))
        budget = factor * eager_error + ulp
        if not error <= budget:
            raise AssertionError(
                f"{name}: {by} error {error:.3e} exceeds {budget:.3e} = "
                f"{factor} x {eager_error:.3e} of eager {actual[0].dtype} + one ulp {ulp:.3e}"
            )
        figures.append(Errors(error, eager_error, budget))
    return figures[0], figures[1]


def unit_in_last_place(magnitude: float, dtype: torch.dtype) -> float:
    """The distance between neighbours of `dtype` at this magnitude."""
    info = torch.finfo(dtype)
    return 2.0 ** math.floor(math.log2(max(magnitude, info.tiny))) * info.eps


def _assert_unseen_is_zero(inputs: Inputs, got: Results, name: str, options: dict[str, Any]) -> None:
    window, skip = options.get("window"), options.get("skip_padded_queries", False)
    visible = visible_pairs(inputs.query, inputs.key, inputs.key_padding_mask, inputs.attn_mask, window, skip)
    dead = ~visible.any(-1)
    if not torch.equal(got.lse == -math.inf, dead):
        raise AssertionError(f"{name} lse: -inf must stand exactly where a row sees no key")
    seen_by_any = visible.any(2).unflatten(1, (inputs.key.shape[1], -1)).any(2)
    for field, unseen in (("out", dead), ("dq", dead), ("dk", ~seen_by_any), ("dv", ~seen_by_any)):
        if getattr(got, field)[unseen].any():
            raise AssertionError(f"{name} {field}: must be exactly 0 where nothing is visible")
