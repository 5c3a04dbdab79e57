"""What the adapter has to know about transformers' own models: which masks they hand on, and what they ignore."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Model types whose sliding-window layers hand us the window they mask by, counted as flash-attention counts:
# keys up to sliding_window - 1 away. Others keep the mask that transformers builds for them.
WINDOWED_MODEL_TYPES = ("modernbert",)
# Model types that hand their layers a [B, N] mask untouched although they do not claim flash-attention, by which the
# others are recognized.
PLAIN_MASK_MODEL_TYPES = (
    "t5", "mt5", "umt5", "pop2piano", "layoutlm", "splinter",
    "bridgetower_text_model", "clap_text_model", "siglip2_text_model",
)  # fmt: skip
# Options that sdpa takes without a word and does not apply.
SDPA_IGNORES = ("softcap", "s_aux")
# The keys that a sparse layer chose. Its model hides the others for eager and sdpa alone.
CHOSEN_KEYS = ("indices", "block_indices")
# What models hand on to every attention and no attention reads: it changes no result.
INERT_ARGUMENTS = frozenset({
    "cache_position", "deterministic", "labels", "num_items_in_batch", "output_hidden_states",
    "output_router_logits", "position_ids", "return_dict", "return_loss", "special_tokens_mask",
    "token_type_ids", "use_cache",
})  # fmt: skip


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
    # True where one class ignores it and where nothing is known: eager's mask is right for any reader.
    asks = (getattr(model, "_can_set_attn_implementation", None) for model in _models_of(config_class))
    answers = [ask is not None and ask() for ask in asks]
    return not (answers and all(answers))


@functools.cache
def _supports(config_class: type, attention: str) -> bool:
    return all(getattr(model, f"_supports_{attention}", False) for model in _models_of(config_class))


def _models_of(config_class: type) -> tuple[Any, ...]:
    """The model classes of a config class or of its nearest parent that has some: those listed, else those loaded."""
    for ancestor in config_class.__mro__:
        try:
            listed: Any = MODEL_MAPPING[ancestor]
            return listed if isinstance(listed, tuple) else (listed,)
        except (KeyError, ValueError, AttributeError):
            # Text and vision parts are not listed, and some entries of the list name no class.
            pass
        if loaded := [model for model in _subclasses(PreTrainedModel) if model.config_class is ancestor]:
            return tuple(loaded)
    return ()


def _subclasses(parent: Any) -> Iterator[Any]:
    for child in parent.__subclasses__():
        yield child
        yield from _subclasses(child)


@torch.compiler.assume_constant_result
def needs_eager(module_class: type, arguments: tuple[str, ...]) -> bool:
    """Whether one of these arguments changes the result of this layer's own eager attention and not that of sdpa."""
    return any(name in SDPA_IGNORES or name in _eager_alone_reads(module_class) for name in arguments)


@functools.cache
def _eager_alone_reads(module_class: type) -> frozenset[str]:
    eager = getattr(sys.modules.get(module_class.__module__), "eager_attention_forward", None)
    if eager is None:
        return frozenset()
    of_eager, of_sdpa = (inspect.signature(x).parameters for x in (eager, sdpa_attention_forward))
    return frozenset(of_eager) - frozenset(of_sdpa)


def asks_for_attention(module: nn.Module, name: str) -> bool:
    """Whether this layer looks its attention up by name, and the name is ours."""
    config = getattr(module, "config", None)
    if getattr(config, "_attn_implementation", None) != name:
        return False
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


def has_decoder(module: nn.Module) -> bool:
    """Whether this layer may be a decoder's, whose keys need not be its queries' positions."""
    owners, names = (module, getattr(module, "config", None)), ("is_decoder", "is_encoder_decoder")
    return any(getattr(owner, name, False) for owner in owners for name in names)


def own_eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The eager attention that stands beside this layer in its model's file."""
    layer, name = type(module), "eager_attention_forward"
    if (eager := getattr(sys.modules[layer.__module__], name, None)) is None:
        raise RuntimeError(f"neither padfree nor sdpa can serve {layer.__name__}, and it has no {name}")
    return eager
