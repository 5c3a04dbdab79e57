"""The calls that are checked against fp64: every row of the table that an architecture uses, every feature and padding.

Truth and the eager result in the call's own dtype are computed on the same device, so nothing travels and no
interpreter runs. The rule is that of `padfree.testing`, over the draws of several seeds together.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from padfree import attention, attention_qkvpacked, attention_varlen, testing
from padfree._triton import configs
from padfree.testing import Inputs
from padfree_bench.measuring.precision import multiplying_by

HALF, FP16, FLOAT = torch.bfloat16, torch.float16, torch.float32
DTYPES = {"half": (HALF, FP16), "float": (FLOAT,), "tf32x3": (FLOAT,)}
SEEDS = (0, 1, 2, 3)
# The largest of few errors is luck: of 16 draws of one fp32 case the kernel's went from 3.6e-7 to 1.2e-6, eager's from
# 3.0e-7 to 8.4e-7 (NOTES.md, 2026-11-27). In half precision rounding the result outweighs that.
FLOAT_SEEDS = tuple(range(8))
Options = dict[str, Any]
SKIP: Options = {"skip_padded_queries": True}


@dataclass(frozen=True)
class Case:
    """One call: sizes, dtype, what is hidden, the form its tensors come in, and options of `padfree.attention`."""

    name: str
    queries: int
    keys: int
    head_dim: int
    dtype: torch.dtype = HALF
    padding: str = "right"
    batch: int = 2
    heads: int = 2
    kv_heads: int | None = None
    attn_mask: str = ""
    form: str = "padded"
    options: Options = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    # Of fp32: by default three TF32 products, where the kernels take them.
    precision: str = "tf32x3"

    @property
    def draws(self) -> tuple[int, ...]:
        """The seeds of its inputs."""
        return self.seeds or (FLOAT_SEEDS if self.dtype == FLOAT else SEEDS)

    def inputs(self, device: torch.device, seed: int) -> Inputs:
        sizes = (self.batch, self.heads, self.queries, self.keys)
        made = testing.make_inputs(
            *sizes, self.head_dim, kv_heads=self.kv_heads, dtype=self.dtype, padding=self.padding,
            lse_gradient=True, seed=seed, device=device,
        )  # fmt: skip
        if not self.attn_mask:
            return made
        drawn = torch.randn(sizes, generator=torch.Generator().manual_seed(seed))
        mask = drawn > 0.5 if self.attn_mask == "bool" else drawn.to(self.dtype)
        return replace(made, attn_mask=mask.to(device))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table_cases(arch: int) -> Iterator[Case]:
    """One case for every row that this architecture uses, at a length that the row serves."""
    for (passname, kind, head_dim), rows in configs.TABLE.items():
        limit, precision = 0, "ieee" if kind == "float" else "tf32x3"
        if kind == "tf32x3" and arch not in configs.TF32X3_ARCHS:
            continue
        for row in rows:
            if limit == configs.ANY or (row.arch and arch not in row.arch):
                continue  # another row serves all its calls, or it serves another architecture
            keys, limit = limit + 5 if limit else 100, row.max_length
            for dtype in DTYPES[kind]:
                product_of = f" by {precision}" if dtype == FLOAT else ""
                name = f"{passname} {name_of(dtype)}{product_of} {head_dim} {tuple(row.config)}"
                queries = 1 if passname == "single_query" else keys
                mask = "bias" if passname == "attn_mask_gradient" else ""
                yield Case(name, queries, keys, head_dim, dtype, attn_mask=mask, precision=precision)


def feature_cases() -> Iterator[Case]:
    """What selects code in the kernels, at the head_dims of the notebook, BERT and a wide head."""
    grouped: Options = {"heads": 4, "kv_heads": 2}
    for dim in (8, 64, 128):
        yield Case(f"window, D {dim}", 150, 150, dim, options={"window": (20, 10)})
        yield Case(f"causal, D {dim}", 150, 150, dim, options={"window": (None, 0)})
        yield Case(f"bool mask, D {dim}", 70, 90, dim, attn_mask="bool")
        yield Case(f"bias, D {dim}", 70, 90, dim, attn_mask="bias")
        yield Case(f"grouped heads, D {dim}", 70, 90, dim, **grouped)
        yield Case(f"packed, D {dim}", 150, 150, dim, form="packed", options=SKIP)
        yield Case(f"one qkv buffer, D {dim}", 150, 150, dim, form="qkv", options=SKIP)
    yield Case("everything", 70, 70, 64, attn_mask="bias", **grouped, options={"window": (30, 20)})
    yield Case("unit scale", 70, 70, 32, options={"scale": 1.0})
    yield Case("unit scale, fp32", 70, 70, 32, FLOAT, options={"scale": 1.0})
    yield Case("negative scale", 70, 70, 32, options={"scale": -0.5})
    yield Case("one token", 1, 1, 32, padding="none")
    yield Case("one query of grouped heads", 1, 300, 64, **grouped)
    yield Case("head_dim 13, fp32", 70, 70, 13, FLOAT)
    yield Case("head_dim 61", 70, 70, 61)
    yield Case("bias, fp32", 70, 70, 32, FLOAT, attn_mask="bias")
    for dim, precision in product((8, 64, 128), ("tf32x3", "ieee")):
        yield Case(f"fp32 by {precision}, D {dim}", 150, 150, dim, FLOAT, options=SKIP, precision=precision)
        yield Case(
            f"fp32 by {precision}, bias, D {dim}", 150, 150, dim, FLOAT, attn_mask="bias", precision=precision
        )
    # The shapes that the figures are about, large enough to fill the GPU.
    yield Case("BERT, B64 H12 D64 S400", 400, 400, 64, batch=64, heads=12, options=SKIP, seeds=(0,))
    yield Case("notebook, B64 H4 D8 S400", 400, 400, 8, batch=64, heads=4, options=SKIP, seeds=(0,))
    yield Case("BERT, fp32", 400, 400, 64, FLOAT, batch=64, heads=12, options=SKIP, seeds=(0,))
    yield Case("notebook, fp32", 400, 400, 8, FLOAT, batch=64, heads=4, options=SKIP, seeds=(0,))


def padding_cases() -> Iterator[Case]:
    """Every pattern of padding, with and without its rows skipped, longer than one tile."""
    for padding, (dtype, dim) in product(testing.PADDING_PATTERNS, ((HALF, 64), (HALF, 8), (FLOAT, 32))):
        for options in ({}, SKIP) if padding != "none" else ({},):
            name = f"padding {padding}{', skipped' if options else ''}, {name_of(dtype)} D {dim}"
            yield Case(name, 150, 150, dim, dtype, padding, options=options)


def dropout_cases() -> Iterator[Case]:
    for dim in (8, 64, 128):
        yield Case(f"dropout, D {dim}", 70, min(dim, 37), dim, FP16, options={"dropout_p": 0.3})
    yield Case("dropout, one query", 1, 37, 64, FP16, options={"dropout_p": 0.3})


def all_cases(arch: int) -> list[Case]:
    """The figures' own shapes and the features first, then the table row by row."""
    return [*feature_cases(), *padding_cases(), *dropout_cases(), *table_cases(arch)]


def touching_cases() -> list[Case]:
    """Few calls that run every kernel: for tools under which a launch takes seconds."""
    return [
        Case("general kernels", 70, 70, 64, padding="holes", options=SKIP),
        Case("gradient of a bias", 70, 70, 16, attn_mask="bias"),
        Case("packed", 70, 70, 64, form="packed", options=SKIP),
        Case("one query", 1, 70, 64),
    ]


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor, *, attn_mask: None = None,
    skip_padded_queries: bool = True, return_lse: bool = True, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attention` of a right-padded batch through `attention_varlen`: packed, computed, unpacked."""
    keep, longest = ~padding, query.shape[2]
    ends = torch.nn.functional.pad(keep.sum(1).cumsum(0, dtype=torch.int32), (1, 0))
    q, k, v = (tensor.transpose(1, 2)[keep] for tensor in (query, key, value))
    packed_out, packed_lse = attention_varlen(
        q, k, v, ends, ends, longest, longest, return_lse=True, **options
    )
    out = query.new_zeros(query.transpose(1, 2).shape).index_put((keep,), packed_out)
    lse = packed_lse.new_full(query.shape[:3], float("-inf")).transpose(1, 2).index_put((keep,), packed_lse.T)
    return out.transpose(1, 2), lse.transpose(1, 2)


def qkv_attention(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor, *, attn_mask: None = None, **options: Any
) -> Any:
    """`attention` through `attention_qkvpacked`, on a buffer made here."""
    buffer = torch.stack([tensor.transpose(1, 2) for tensor in (query, key, value)], dim=2)
    out, lse = attention_qkvpacked(buffer, padding, **options)
    return out.transpose(1, 2), lse


FORMS: dict[str, Callable[..., Any]] = {"padded": attention, "packed": packed_attention, "qkv": qkv_attention}


def call_of(case: Case, impl: str) -> Callable[..., Any]:
    """The case's form of attention; every call of it draws the same dropout."""

    def call(*tensors: Any, **options: Any) -> Any:
        torch.manual_seed(3)
        return FORMS[case.form](*tensors, **options, impl=impl)

    return call


def dropped_weights(case: Case, device: torch.device, call: Callable[..., Any]) -> Tensor:
    """[B, H, M, N] True where the call drops a weight: equal weights times an identity show each."""
    shape, like = (case.batch, case.heads), Options(device=device, dtype=case.dtype)
    query = torch.zeros(*shape, case.queries, case.head_dim, **like)
    key = torch.zeros(*shape, case.keys, case.head_dim, **like)
    value = torch.eye(case.keys, case.head_dim, **like).expand(*shape, -1, -1)
    return call(query, key, value, dropout_p=case.options["dropout_p"])[..., : case.keys] == 0


def check_case(case: Case, device: torch.device, impl: str) -> float:
    """The largest error over what the rule allows; AssertionError where it is more, or NaN in padding changes a bit."""
    call, errors, given = call_of(case, impl), list[testing.Errors](), dict(case.options)
    calls = [case.inputs(device, seed) for seed in case.draws]
    judged = call
    if "dropout_p" in case.options:
        dropped = given["dropout_mask"] = dropped_weights(case, device, call)
        share = float(dropped.float().mean())
        assert abs(share - given["dropout_p"]) < 0.1, f"drops {share:.2f} of the weights"
        judged = lambda *tensors, dropout_mask=None, **rest: call(*tensors, **rest)
    with multiplying_by(case.precision):
        results = testing.assert_matches_reference(judged, calls, name=case.name, found=errors, **given)
        if "dropout_p" not in case.options:
            check_padding(case, calls[0], results[0], call)
    return max((error.actual / error.budget for error in errors if error.budget), default=0.0)


def check_padding(case: Case, inputs: Inputs, clean: testing.Results, call: Callable[..., Any]) -> None:
    """NaN in all that is hidden must give the same bits."""
    mask = inputs.key_padding_mask
    if mask is None or not bool(mask.any()):
        return
    hidden = mask[:, None, :, None]
    unread = ("key", "value", *(("query", "d_out") if case.options.get("skip_padded_queries") else ()))
    dirty = {name: getattr(inputs, name).masked_fill(hidden, float("nan")) for name in unread}
    again = testing.run(call, replace(inputs, **dirty), **case.options)
    for name, expected, got in zip(clean._fields, clean, again, strict=True):
        same = expected is None or got is None or torch.equal(expected, got)
        assert same, f"{name} changes with NaN in padding"
