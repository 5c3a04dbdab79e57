"""Wrong options, sequence ends, and what only one entry point can get wrong."""

import math
from typing import Any

import torch

from bad_calls.entry_points import TOKENS, B, BadCall, D, H, S


def options(entry_point: str) -> list[BadCall]:
    """Wrong options that every entry point shares."""
    rows: list[tuple[str, dict[str, Any], type[Exception], str, str]] = [
        ("dropout_p above 1", {"dropout_p": 1.5}, ValueError, "dropout_p", "1.5"),
        ("dropout_p of 1", {"dropout_p": 1.0}, ValueError, "dropout_p", "1.0"),
        ("a negative dropout_p", {"dropout_p": -0.1}, ValueError, "dropout_p", "-0.1"),
        ("a NaN dropout_p", {"dropout_p": math.nan}, ValueError, "dropout_p", "nan"),
        ("a dropout_p that is text", {"dropout_p": "0.1"}, TypeError, "dropout_p", "str"),
        ("a dropout_p that is a bool", {"dropout_p": True}, TypeError, "dropout_p", "bool"),
        ("an infinite scale", {"scale": math.inf}, ValueError, "scale", "inf"),
        ("a NaN scale", {"scale": math.nan}, ValueError, "scale", "nan"),
        ("a scale that is a tensor", {"scale": torch.ones(1)}, TypeError, "scale", "Tensor"),
        ("a scale that is text", {"scale": "1"}, TypeError, "scale", "str"),
        ("a window that is an int", {"window": 3}, TypeError, "window", "3"),
        ("a window of three sides", {"window": (1, 2, 3)}, TypeError, "window", "(1, 2, 3)"),
        ("a window of floats", {"window": (1.0, 2.0)}, TypeError, "window", "(1.0, 2.0)"),
        ("a window of bools", {"window": (True, False)}, TypeError, "window", "(True, False)"),
        ("a negative window", {"window": (-1, 0)}, ValueError, "window", "(-1, 0)"),
        ("an unknown impl", {"impl": "cuda"}, ValueError, "impl", "'cuda'"),
        ("an impl of None", {"impl": None}, ValueError, "impl", "None"),
        ("an integer return_lse", {"return_lse": 1}, TypeError, "return_lse", "int"),
    ]
    return [(entry_point, *row) for row in rows]


def sequences(entry_point: str, ends: str, length: str) -> list[BadCall]:
    """Wrong cu_seqlens and max_seqlen."""
    good = torch.tensor([0, 4, TOKENS], dtype=torch.int32)
    rows: list[tuple[str, dict[str, Any], type[Exception], str, str]] = [
        (f"an int64 {ends}", {ends: good.long()}, TypeError, ends, "torch.int64"),
        (f"a float {ends}", {ends: good.float()}, TypeError, ends, "torch.float32"),
        (f"a {ends} that is a list", {ends: [0, 4, TOKENS]}, TypeError, ends, "list"),
        (f"a 2-D {ends}", {ends: good[None]}, ValueError, ends, "[1, 3]"),
        (f"an empty {ends}", {ends: good[:0]}, ValueError, ends, "[0]"),
        (f"a strided {ends}", {ends: good.repeat_interleave(2)[::2]}, ValueError, ends, "2"),
        (f"a {ends} on another device", {ends: good.to("meta")}, ValueError, ends, "meta"),
        (f"a float {length}", {length: 5.0}, TypeError, length, "float"),
        (f"a bool {length}", {length: True}, TypeError, length, "bool"),
        (f"a negative {length}", {length: -1}, ValueError, length, "-1"),
    ]
    return [(entry_point, *row) for row in rows]


def singles() -> list[BadCall]:
    """What only one entry point can get wrong."""
    narrow = torch.zeros(B + 1, H, S, D)
    short = torch.zeros(B, H, S - 1, D)
    mask = torch.zeros(B, S, dtype=torch.bool)
    one_more = torch.tensor([0, 4, 5, TOKENS], dtype=torch.int32)
    return [
        (
            "attention",
            "another batch of keys",
            {"key": narrow, "value": narrow},
            ValueError,
            "key",
            str(B + 1),
        ),
        ("attention", "fewer values than keys", {"value": short}, ValueError, "value", str([B, H, S - 1, D])),
        (
            "attention",
            "an integer skip flag",
            {"skip_padded_queries": 1},
            TypeError,
            "skip_padded_queries",
            "int",
        ),
        (
            "attention",
            "skipped queries in cross-attention",
            {"query": short, "key_padding_mask": mask, "skip_padded_queries": True},
            ValueError,
            "skip_padded_queries",
            f"{S - 1} queries and {S} keys",
        ),
        (
            "attention_varlen",
            "more key sequences",
            {"cu_seqlens_k": one_more},
            ValueError,
            "cu_seqlens_k",
            "3",
        ),
        ("attention_qkvpacked", "a qkv list", {"qkv": [0.0]}, TypeError, "qkv", "list"),
        (
            "attention_qkvpacked",
            "two of three",
            {"qkv": torch.zeros(B, S, 2, H, D)},
            ValueError,
            "qkv",
            str([B, S, 2, H, D]),
        ),
        (
            "attention_qkvpacked",
            "a flat qkv",
            {"qkv": torch.zeros(B, S, 3 * D)},
            ValueError,
            "qkv",
            str([B, S, 3 * D]),
        ),
        (
            "attention_qkvpacked",
            "a packed qkv alone",
            {"qkv": torch.zeros(TOKENS, 3, H, D)},
            ValueError,
            "qkv",
            "None",
        ),
        ("attention_qkvpacked", "max_seqlen alone", {"max_seqlen": 5}, ValueError, "max_seqlen", "5"),
        (
            "attention_qkvpacked",
            "an integer qkv",
            {"qkv": torch.zeros(B, S, 3, H, D).long()},
            TypeError,
            "qkv",
            "int64",
        ),
        (
            "attention_qkvpacked_varlen",
            "a packed qkv with a padding mask",
            {"key_padding_mask": mask},
            ValueError,
            "key_padding_mask",
            "packed sequences",
        ),
        (
            "attention_qkvpacked_varlen",
            "cu_seqlens alone",
            {"max_seqlen": None},
            ValueError,
            "max_seqlen",
            "None",
        ),
        ("attention_weights", "an lse list", {"lse": [0.0]}, TypeError, "lse", "list"),
        ("attention_weights", "an lse of [B, H]", {"lse": torch.zeros(B, H)}, ValueError, "lse", str([B, H])),
        (
            "attention_weights",
            "an integer lse",
            {"lse": torch.zeros(B, H, S).long()},
            TypeError,
            "lse",
            "int64",
        ),
        (
            "attention_weights",
            "an lse on another device",
            {"lse": torch.zeros(B, H, S).to("meta")},
            ValueError,
            "lse",
            "meta",
        ),
        ("attention_weights", "rows as floats", {"rows": [0.5]}, TypeError, "rows", "[0.5]"),
        ("attention_weights", "rows as a number", {"rows": 0}, TypeError, "rows", "0"),
        (
            "attention_weights",
            "rows as bools",
            {"rows": torch.ones(S, dtype=torch.bool)},
            TypeError,
            "rows",
            "torch.bool",
        ),
        ("attention_weights", "an infinite scale", {"scale": math.inf}, ValueError, "scale", "inf"),
        (
            "attention_weights",
            "a key of another dtype",
            {"key": torch.zeros(B, H, S, D).half()},
            TypeError,
            "key",
            "float16",
        ),
        ("attention_weights", "another head_dim", {"key": torch.zeros(B, H, S, 3)}, ValueError, "key", "3"),
    ]
