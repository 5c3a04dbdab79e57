"""Wrong options, sequence ends, and what only one entry point can get wrong."""

import math

import torch

from bad_calls.entry_points import TOKENS, B, BadCall, D, H, S, Wrong, one_wrong


def options(entry_point: str) -> list[BadCall]:
    """Wrong options that every entry point shares."""
    rows: list[Wrong] = [
        ("dropout_p above 1", "dropout_p", 1.5, ValueError, "1.5"),
        ("dropout_p of 1", "dropout_p", 1.0, ValueError, "1.0"),
        ("a negative dropout_p", "dropout_p", -0.1, ValueError, "-0.1"),
        ("a NaN dropout_p", "dropout_p", math.nan, ValueError, "nan"),
        ("a dropout_p that is text", "dropout_p", "0.1", TypeError, "str"),
        ("a dropout_p that is a bool", "dropout_p", True, TypeError, "bool"),
        ("an infinite scale", "scale", math.inf, ValueError, "inf"),
        ("a NaN scale", "scale", math.nan, ValueError, "nan"),
        ("a scale that is a tensor", "scale", torch.ones(1), TypeError, "Tensor"),
        ("a scale that is text", "scale", "1", TypeError, "str"),
        ("a window that is an int", "window", 3, TypeError, "3"),
        ("a window of three sides", "window", (1, 2, 3), TypeError, "(1, 2, 3)"),
        ("a window of floats", "window", (1.0, 2.0), TypeError, "(1.0, 2.0)"),
        ("a window of bools", "window", (True, False), TypeError, "(True, False)"),
        ("a negative window", "window", (-1, 0), ValueError, "(-1, 0)"),
        ("an unknown impl", "impl", "cuda", ValueError, "'cuda'"),
        ("an impl of None", "impl", None, ValueError, "None"),
        ("an integer return_lse", "return_lse", 1, TypeError, "int"),
    ]
    return one_wrong(entry_point, rows)


def sequences(entry_point: str, ends: str, length: str) -> list[BadCall]:
    """Wrong cu_seqlens and max_seqlen."""
    good = torch.tensor([0, 4, TOKENS], dtype=torch.int32)
    rows: list[Wrong] = [
        (f"an int64 {ends}", ends, good.long(), TypeError, "torch.int64"),
        (f"a float {ends}", ends, good.float(), TypeError, "torch.float32"),
        (f"a {ends} that is a list", ends, [0, 4, TOKENS], TypeError, "list"),
        (f"a 2-D {ends}", ends, good[None], ValueError, "[1, 3]"),
        (f"an empty {ends}", ends, good[:0], ValueError, "[0]"),
        (f"a strided {ends}", ends, good.repeat_interleave(2)[::2], ValueError, "2"),
        (f"a {ends} on another device", ends, good.to("meta"), ValueError, "meta"),
        (f"a float {length}", length, 5.0, TypeError, "float"),
        (f"a bool {length}", length, True, TypeError, "bool"),
        (f"a negative {length}", length, -1, ValueError, "-1"),
    ]
    return one_wrong(entry_point, rows)


def of_attention() -> list[BadCall]:
    """What only attention and attention_varlen can get wrong: keys, values and queries that do not belong together."""
    more, short = torch.zeros(B + 1, H, S, D), torch.zeros(B, H, S - 1, D)
    ends = torch.tensor([0, 4, 5, TOKENS], dtype=torch.int32)
    crossed = {
        "query": short,
        "key_padding_mask": torch.zeros(B, S, dtype=torch.bool),
        "skip_padded_queries": True,
    }
    skipped, came = "skip_padded_queries", f"{S - 1} queries and {S} keys"
    rows: list[Wrong] = [
        ("fewer values than keys", "value", short, ValueError, str([B, H, S - 1, D])),
        ("an integer skip flag", skipped, 1, TypeError, "int"),
    ]
    return [
        ("attention", "another batch of keys", {"key": more, "value": more}, ValueError, "key", str(B + 1)),
        *one_wrong("attention", rows),
        ("attention", "skipped queries in cross-attention", crossed, ValueError, skipped, came),
        ("attention_varlen", "more key sequences", {"cu_seqlens_k": ends}, ValueError, "cu_seqlens_k", "3"),
    ]


def of_attention_qkvpacked() -> list[BadCall]:
    """What only attention_qkvpacked can get wrong, padded and packed."""
    two, flat = [B, S, 2, H, D], [B, S, 3 * D]
    mask = torch.zeros(B, S, dtype=torch.bool)
    padded: list[Wrong] = [
        ("a qkv list", "qkv", [0.0], TypeError, "list"),
        ("two of three", "qkv", torch.zeros(two), ValueError, str(two)),
        ("a flat qkv", "qkv", torch.zeros(flat), ValueError, str(flat)),
        ("a packed qkv alone", "qkv", torch.zeros(TOKENS, 3, H, D), ValueError, "None"),
        ("max_seqlen alone", "max_seqlen", 5, ValueError, "5"),
        ("an integer qkv", "qkv", torch.zeros(B, S, 3, H, D).long(), TypeError, "int64"),
    ]
    packed: list[Wrong] = [
        ("a packed qkv with a padding mask", "key_padding_mask", mask, ValueError, "packed sequences"),
        ("cu_seqlens alone", "max_seqlen", None, ValueError, "None"),
    ]
    return one_wrong("attention_qkvpacked", padded) + one_wrong("attention_qkvpacked_varlen", packed)


def of_attention_weights() -> list[BadCall]:
    """What only attention_weights can get wrong."""
    lse, key = torch.zeros(B, H, S), torch.zeros(B, H, S, D)
    rows: list[Wrong] = [
        ("an lse list", "lse", [0.0], TypeError, "list"),
        ("an lse of [B, H]", "lse", torch.zeros(B, H), ValueError, str([B, H])),
        ("an integer lse", "lse", lse.long(), TypeError, "int64"),
        ("an lse on another device", "lse", lse.to("meta"), ValueError, "meta"),
        ("rows as floats", "rows", [0.5], TypeError, "[0.5]"),
        ("rows as a number", "rows", 0, TypeError, "0"),
        ("rows as bools", "rows", torch.ones(S, dtype=torch.bool), TypeError, "torch.bool"),
        ("an infinite scale", "scale", math.inf, ValueError, "inf"),
        ("a key of another dtype", "key", key.half(), TypeError, "float16"),
        ("another head_dim", "key", torch.zeros(B, H, S, 3), ValueError, "3"),
    ]
    return one_wrong("attention_weights", rows)
