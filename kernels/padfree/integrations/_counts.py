"""Who computed attention: counted by reason, warned about once, and an error in strict mode."""

import warnings
from collections import Counter
from dataclasses import dataclass, field

import torch


@dataclass
class Counts:
    """Attention calls since `reset_counts`, by who computed them. A compiled graph counts once, when it is traced.

    A model that takes our name and never asks for it counts one fallback when it is built or switched.
    """

    fused: int = 0
    reference: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)

    @property
    def fallback(self) -> int:
        return self.fallbacks.total()


_counts = Counts()


def counts() -> Counts:
    """How many calls the kernel served, how many the reference, and how many fell back, by reason."""
    return Counts(_counts.fused, _counts.reference, Counter(_counts.fallbacks))


def reset_counts() -> None:
    """Start counting anew."""
    _counts.fused = _counts.reference = 0
    _counts.fallbacks.clear()


def fall_back(reason: str, strict: bool) -> None:
    """Count a call that transformers' own attention serves.

    Raises:
        RuntimeError: with `strict`.
    """
    if strict:
        raise RuntimeError(f"padfree cannot serve this call and strict forbids sdpa: {reason}")
    count("fallback", reason)


# Dynamo would otherwise guard on the count it writes, and compile anew at every call.
@torch.compiler.assume_constant_result
def count(who: str, reason: str = "") -> None:
    """One more call computed by "fused", "reference" or "fallback"."""
    if who == "fused":
        _counts.fused += 1
    elif who == "reference":
        _counts.reference += 1
    else:
        if reason not in _counts.fallbacks:
            warnings.warn(f"padfree falls back to transformers' attention: {reason}", stacklevel=3)
        _counts.fallbacks[reason] += 1
