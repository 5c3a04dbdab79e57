"""What the adapter has to know about transformers' own models: which masks they hand on, and what they ignore."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING

# Model types whose sliding-window layers hand us the window they mask by, counted as flash-attention counts:
# keys up to sliding_window - 1 away. Others keep the mask that transformers builds for them.
WINDOWED_MODEL_TYPES = ("modernbert",)
# Model types that hand their layers a [B, N] mask untouched although they do not claim flash-attention, whose sign is it.
PLAIN_MASK_MODEL_TYPES = ("t5", "mt5", "umt5", "layoutlm")


@torch.compiler.assume_constant_result
def computes_its_own_attention(config_class: type) -> bool:
    """Whether the model class of this config ignores the attention name, and so wants eager's additive mask."""
    return _ignores_the_name(config_class)


@torch.compiler.assume_constant_result
def takes_plain_masks(config_class: Any) -> bool:
    """Whether the model of this config hands a [B, N] mask on to its layers as it is."""
    known = getattr(config_class, "model_type", None) in PLAIN_MASK_MODEL_TYPES
    return known or (_supports(config_class, "flash_attn") and _supports(config_class, "sdpa"))


@torch.compiler.assume_constant_result
def reads_bool_masks(config_class: type) -> bool:
    """Whether every layer of this config's model reads a bool mask, True = attend; some of the others add it."""
    return _supports(config_class, "sdpa")


@functools.cache
def _ignores_the_name(config_class: type) -> bool:
    try:
        return not _listed_model(config_class)._can_set_attn_implementation()
    except (KeyError, AttributeError):
        # Not a listed model, or a transformers without this private test: trust the name.
        return False


@functools.cache
def _supports(config_class: type, attention: str) -> bool:
    try:
        return bool(getattr(_listed_model(config_class), f"_supports_{attention}"))
    except (KeyError, AttributeError):
        return True


def _listed_model(config_class: type) -> Any:
    listed: Any = MODEL_MAPPING[config_class]
    return listed[0] if isinstance(listed, tuple) else listed


def asks_for_attention(module: nn.Module, name: str) -> bool:
    """Whether this layer looks its attention up by name, and the name is ours."""
    config = getattr(module, "config", None)
    if getattr(config, "_attn_implementation", None) != name:
        return False
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


def has_decoder(module: nn.Module) -> bool:
    """Whether this layer may be a decoder's, whose keys need not be its queries' positions."""
    owners = (module, getattr(module, "config", None))
    return any(
        getattr(owner, name, False) for owner in owners for name in ("is_decoder", "is_encoder_decoder")
    )


def own_eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The eager attention that stands beside this layer in its model's file."""
    name = "eager_attention_forward"
    if (eager := getattr(sys.modules[type(module).__module__], name, None)) is None:
        raise RuntimeError(
            f"neither padfree nor sdpa can serve {type(module).__name__}, and it has no {name}"
        )
    return eager
