"""Wrong tensors: query, key and value, and the masks."""

from typing import Any

import numpy as np
import torch

from bad_calls.entry_points import ENTRY_POINTS, TOKENS, B, BadCall, D, H, S, Wrong, one_wrong


def tensors(entry_point: str) -> list[BadCall]:
    """Wrong query, key and value."""
    shape = (B, H, S, D) if entry_point == "attention" else (TOKENS, H, D)
    good, wide = torch.zeros(shape), [*shape[:-1], 2 * D]
    rows: list[Wrong] = [
        ("a query that is a list", "query", [[0.0]], TypeError, "list"),
        ("a query that is None", "query", None, TypeError, "NoneType"),
        ("a query that is a numpy array", "query", np.zeros(shape), TypeError, "ndarray"),
        ("a query of a dimension too few", "query", good[0], ValueError, str([*shape[1:]])),
        ("a query of a dimension too many", "query", good[None], ValueError, str([1, *shape])),
        ("an integer query", "query", good.long(), TypeError, "torch.int64"),
        ("a bool query", "query", good.bool(), TypeError, "torch.bool"),
        ("a complex query", "query", good.to(torch.complex64), TypeError, "torch.complex64"),
        ("a sparse query", "query", good.to_sparse(), TypeError, "torch.sparse_coo"),
        ("a key of another dtype", "key", good.half(), TypeError, "torch.float16"),
        ("a value of another dtype", "value", good.bfloat16(), TypeError, "torch.bfloat16"),
        ("a key that is a float", "key", 1.0, TypeError, "float"),
        ("a value that is None", "value", None, TypeError, "NoneType"),
        ("a key on another device", "key", good.to("meta"), ValueError, "meta"),
        ("a value on another device", "value", good.to("meta"), ValueError, "meta"),
        ("a value with another head_dim", "value", torch.zeros(wide), ValueError, str(wide)),
    ]
    return one_wrong(entry_point, rows) + sizes(entry_point, shape)


def sizes(entry_point: str, shape: tuple[int, ...]) -> list[BadCall]:
    """Several tensors of one wrong size together."""
    keys, all_three = ("key", "value"), ("query", "key", "value")
    heads = [*shape]
    heads[1] = 3
    rows: list[tuple[str, tuple[str, ...], list[int], str]] = [
        ("keys with another head_dim", keys, [*shape[:-1], 2 * D], str(2 * D)),
        ("heads that do not divide", keys, heads, "3"),
        ("a head_dim of 0", all_three, [*shape[:-1], 0], "0"),
        ("a head_dim above 256", all_three, [*shape[:-1], 257], "257"),
    ]
    return [
        (entry_point, what, {name: torch.zeros(size) for name in names}, ValueError, names[0], came)
        for what, names, size, came in rows
    ]


def padding_masks(entry_point: str) -> list[BadCall]:
    """key_padding_mask in all the forms in which other libraries read it wrongly or silently."""
    good = torch.zeros(B, S, dtype=torch.bool)
    dtypes = (torch.uint8, torch.int64, torch.float32, torch.float16)
    shapes = [
        (S,),
        (B, S + 1),
        (B + 1, S),
        (1, S),
        (S, B),
        (B, H, S),
        (B, H, 1, S),
        (B, 1, S, S),
        (B, 1, 1, 1, S),
        (),
    ]
    cases: list[tuple[str, Any, type[Exception], str]] = [
        *((f"a {dtype} key_padding_mask", good.to(dtype), TypeError, str(dtype)) for dtype in dtypes),
        *((f"a key_padding_mask of shape {[*x]}", good.new_zeros(x), ValueError, str([*x])) for x in shapes),
        ("a key_padding_mask that is a list", [[False]], TypeError, "list"),
        ("a key_padding_mask on another device", good.to("meta"), ValueError, "meta"),
    ]
    rows = [(what, "key_padding_mask", value, error, came) for what, value, error, came in cases]
    return one_wrong(entry_point, rows)


def numbers(entry_point: str, name: str, shape: tuple[int, ...]) -> list[BadCall]:
    """key_lengths and key_spans, beside which key_spans wants the mask that key_lengths refuses."""
    good = torch.zeros(shape, dtype=torch.int32)
    shapes = [(*shape, 1), (shape[0] + 1, *shape[1:]), ()]
    cases: list[tuple[str, Any, type[Exception], str]] = [
        *(
            (f"a {dtype} {name}", good.to(dtype), TypeError, str(dtype))
            for dtype in (torch.int64, torch.bool)
        ),
        *((f"a {name} of shape {[*x]}", good.new_zeros(x), ValueError, str([*x])) for x in shapes),
        (f"a {name} that is a list", [0] * B, TypeError, "list"),
        (f"a {name} on another device", good.to("meta"), ValueError, "meta"),
    ]
    rows = one_wrong(entry_point, [(what, name, value, error, came) for what, value, error, came in cases])
    mask = {"key_padding_mask": torch.zeros(B, S, dtype=torch.bool)}
    if name == "key_spans":
        alone: BadCall = (entry_point, "key_spans without a mask", {name: good}, ValueError, name, "none")
        return [alone, *((*row[:2], row[2] | mask, *row[3:]) for row in rows)]  # type: ignore[list-item]
    both: BadCall = (
        entry_point,
        f"{name} beside a mask",
        {name: good} | mask,
        ValueError,
        name,
        "key_padding_mask",
    )
    return [both, *rows]


def attn_masks() -> list[BadCall]:
    full = torch.zeros(B, H, S, S)
    cases: list[tuple[str, Any, type[Exception], str]] = [
        ("that is a list", [[0.0]], TypeError, "list"),
        ("of int64", full.long(), TypeError, "torch.int64"),
        ("of uint8", full.byte(), TypeError, "torch.uint8"),
        ("of fp64 beside an fp32 query", full.double(), TypeError, "torch.float64"),
        ("on another device", full.to("meta"), ValueError, "meta"),
        ("with other keys", torch.zeros(S, S + 1), ValueError, str([S, S + 1])),
        ("with other rows", torch.zeros(S - 1, S), ValueError, str([S - 1, S])),
        ("with other heads", torch.zeros(H - 1, S, S), ValueError, str([H - 1, S, S])),
        ("with another batch", torch.zeros(B + 1, 1, S, S), ValueError, str([B + 1, 1, S, S])),
        ("of five dimensions", torch.zeros(1, B, H, S, S), ValueError, str([1, B, H, S, S])),
        ("of [B, S], a padding mask", torch.zeros(B, S, dtype=torch.bool), ValueError, str([B, S])),
    ]
    rows = [(f"an attn_mask {what}", "attn_mask", mask, error, came) for what, mask, error, came in cases]
    return one_wrong("attention", rows)


def layouts(entry_point: str) -> list[BadCall]:
    """Every tensor argument of the entry point as a nested and as a sparse tensor."""
    arguments = {name: x for name, x in ENTRY_POINTS[entry_point][1]().items() if isinstance(x, torch.Tensor)}
    if entry_point in ("attention", "attention_qkvpacked"):
        arguments["key_padding_mask"] = torch.zeros(B, S, dtype=torch.bool)
    if entry_point in ("attention", "attention_qkvpacked", "attention_weights"):
        arguments["key_lengths"] = torch.zeros(B, dtype=torch.int32)
    if entry_point == "attention":
        arguments["attn_mask"] = torch.zeros(B, H, S, S)
    if entry_point == "attention_weights":
        arguments["rows"] = torch.zeros(1, dtype=torch.int64)
    rows: list[Wrong] = []
    for name, tensor in arguments.items():
        for layout in (torch.strided, torch.jagged):
            nested = torch.nested.as_nested_tensor([tensor, tensor], layout=layout)
            rows.append((f"a nested {name} of layout {layout}", name, nested, TypeError, "nested"))
        rows.append((f"a sparse {name} of any argument", name, tensor.to_sparse(), TypeError, "sparse_coo"))
    return one_wrong(entry_point, rows)
