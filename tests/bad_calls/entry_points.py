"""The entry points of the library, each with a call that is right."""

from collections.abc import Callable
from typing import Any

import torch

import padfree

B, H, S, D = 2, 4, 6, 8
TOKENS = 9


def padded() -> dict[str, Any]:
    return {name: torch.zeros(B, H, S, D) for name in ("query", "key", "value")}


def packed() -> dict[str, Any]:
    ends = torch.tensor([0, 4, TOKENS], dtype=torch.int32)
    tensors = {name: torch.zeros(TOKENS, H, D) for name in ("query", "key", "value")}
    return tensors | {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": 5, "max_seqlen_k": 5}


def fused() -> dict[str, Any]:
    return {"qkv": torch.zeros(B, S, 3, H, D)}


def fused_packed() -> dict[str, Any]:
    ends = torch.tensor([0, 4, TOKENS], dtype=torch.int32)
    return {"qkv": torch.zeros(TOKENS, 3, H, D), "cu_seqlens": ends, "max_seqlen": 5}


def weights() -> dict[str, Any]:
    return {"query": torch.zeros(B, H, S, D), "key": torch.zeros(B, H, S, D), "lse": torch.zeros(B, H, S)}


ENTRY_POINTS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "attention": (padfree.attention, padded),
    "attention_varlen": (padfree.attention_varlen, packed),
    "attention_qkvpacked": (padfree.attention_qkvpacked, fused),
    "attention_qkvpacked_varlen": (padfree.attention_qkvpacked, fused_packed),
    "attention_weights": (padfree.attention_weights, weights),
}

# (entry_point, what is wrong, arguments replaced, exception, argument named, what came)
BadCall = tuple[str, str, dict[str, Any], type[Exception], str, str]

# (what is wrong, argument, its value, exception, what came)
Wrong = tuple[str, str, Any, type[Exception], str]


def one_wrong(entry_point: str, rows: list[Wrong]) -> list[BadCall]:
    """Calls in which one argument alone is wrong, and is the one named."""
    return [(entry_point, what, {name: value}, error, name, came) for what, name, value, error, came in rows]
