"""Wrong tensors: query, key and value, and the masks."""

from typing import Any

import numpy as np
import torch

from bad_calls.entry_points import ENTRY_POINTS, TOKENS, B, BadCall, D, H, S


def tensors(entry_point: str) -> list[BadCall]:
    """Wrong query, key and value."""
    shape = (B, H, S, D) if entry_point == "attention" else (TOKENS, H, D)
    sizes = list(shape)
    wide = [*shape[:-1], 2 * D]
    rows: list[tuple[str, dict[str, Any], type[Exception], str, str]] = [
        ("a query that is a list", {"query": [[0.0]]}, TypeError, "query", "list"),
        ("a query that is None", {"query": None}, TypeError, "query", "NoneType"),
        ("a query that is a numpy array", {"query": np.zeros(shape)}, TypeError, "query", "ndarray"),
        (
            "a query of a dimension too few",
            {"query": torch.zeros(shape[1:])},
            ValueError,
            "query",
            str(sizes[1:]),
        ),
        (
            "a query of a dimension too many",
            {"query": torch.zeros(1, *shape)},
            ValueError,
            "query",
            str([1, *shape]),
        ),
        (
            "an integer query",
            {"query": torch.zeros(shape, dtype=torch.int64)},
            TypeError,
            "query",
            "torch.int64",
        ),
        ("a bool query", {"query": torch.zeros(shape, dtype=torch.bool)}, TypeError, "query", "torch.bool"),
        (
            "a complex query",
            {"query": torch.zeros(shape, dtype=torch.complex64)},
            TypeError,
            "query",
            "torch.complex64",
        ),
        ("a sparse query", {"query": torch.zeros(shape).to_sparse()}, TypeError, "query", "torch.sparse_coo"),
        ("a key of another dtype", {"key": torch.zeros(shape).half()}, TypeError, "key", "torch.float16"),
        (
            "a value of another dtype",
            {"value": torch.zeros(shape).bfloat16()},
            TypeError,
            "value",
            "torch.bfloat16",
        ),
        ("a key that is a float", {"key": 1.0}, TypeError, "key", "float"),
        ("a value that is None", {"value": None}, TypeError, "value", "NoneType"),
        ("a key on another device", {"key": torch.zeros(shape, device="meta")}, ValueError, "key", "meta"),
        (
            "a value on another device",
            {"value": torch.zeros(shape, device="meta")},
            ValueError,
            "value",
            "meta",
        ),
        ("a value with another head_dim", {"value": torch.zeros(wide)}, ValueError, "value", str(wide)),
        (
            "keys with another head_dim",
            {"key": torch.zeros(wide), "value": torch.zeros(wide)},
            ValueError,
            "key",
            str(2 * D),
        ),
    ]
    heads_at = 1
    odd = [*shape]
    odd[heads_at] = 3
    rows += [
        (
            "heads that do not divide",
            {"key": torch.zeros(odd), "value": torch.zeros(odd)},
            ValueError,
            "key",
            "3",
        ),
        (
            "a head_dim of 0",
            {n: torch.zeros(*shape[:-1], 0) for n in ("query", "key", "value")},
            ValueError,
            "query",
            "0",
        ),
        (
            "a head_dim above 256",
            {n: torch.zeros(*shape[:-1], 257) for n in ("query", "key", "value")},
            ValueError,
            "query",
            "257",
        ),
    ]
    return [(entry_point, *row) for row in rows]


def padding_masks(entry_point: str) -> list[BadCall]:
    """key_padding_mask in all the forms in which other libraries read it wrongly or silently."""
    good = torch.zeros(B, S, dtype=torch.bool)
    rows: list[tuple[str, dict[str, Any], type[Exception], str, str]] = [
        (
            f"a {dtype} key_padding_mask",
            {"key_padding_mask": good.to(dtype)},
            TypeError,
            "key_padding_mask",
            str(dtype),
        )
        for dtype in (torch.uint8, torch.int64, torch.float32, torch.float16)
    ]
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
    rows += [
        (
            f"a key_padding_mask of shape {list(shape)}",
            {"key_padding_mask": torch.zeros(shape, dtype=torch.bool)},
            ValueError,
            "key_padding_mask",
            str(list(shape)),
        )
        for shape in shapes
    ]
    rows += [
        (
            "a key_padding_mask that is a list",
            {"key_padding_mask": [[False]]},
            TypeError,
            "key_padding_mask",
            "list",
        ),
        (
            "a key_padding_mask on another device",
            {"key_padding_mask": good.to("meta")},
            ValueError,
            "key_padding_mask",
            "meta",
        ),
    ]
    return [(entry_point, *row) for row in rows]


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
    return [
        ("attention", f"an attn_mask {what}", {"attn_mask": mask}, e, "attn_mask", got)
        for what, mask, e, got in cases
    ]


def layouts(entry_point: str) -> list[BadCall]:
    """Every tensor argument of the entry point as a nested and as a sparse tensor."""
    arguments = {name: x for name, x in ENTRY_POINTS[entry_point][1]().items() if isinstance(x, torch.Tensor)}
    if entry_point in ("attention", "attention_qkvpacked"):
        arguments["key_padding_mask"] = torch.zeros(B, S, dtype=torch.bool)
    if entry_point == "attention":
        arguments["attn_mask"] = torch.zeros(B, H, S, S)
    if entry_point == "attention_weights":
        arguments["rows"] = torch.zeros(1, dtype=torch.int64)
    rows: list[BadCall] = []
    for name, tensor in arguments.items():
        for layout in (torch.strided, torch.jagged):
            nested = torch.nested.as_nested_tensor([tensor, tensor], layout=layout)
            rows.append(
                (
                    entry_point,
                    f"a nested {name} of layout {layout}",
                    {name: nested},
                    TypeError,
                    name,
                    "nested",
                )
            )
        sparse = tensor.to_sparse()
        rows.append(
            (entry_point, f"a sparse {name} of any argument", {name: sparse}, TypeError, name, "sparse_coo")
        )
    return rows
