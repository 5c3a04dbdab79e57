"""padfree as an attention implementation of transformers, under the name "padfree".

>>> from padfree.integrations.transformers import enable
>>> enable(model)  # or: register(), then AutoModel.from_pretrained(..., attn_implementation="padfree")

transformers asks two functions: `attention_mask_for` once per forward (which mask will the layers get?) and
`attention_forward` in every layer. Registering the second alone would drop the padding without a word. Layers that
the kernel cannot serve run transformers' own sdpa, or eager where sdpa would ignore an option: each such call is
counted with its reason and warned about once, or raises in strict mode. `counts` tells which road ran.
"""

import functools
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, eager_mask, sdpa_mask

import padfree
from padfree._checks import MAX_HEAD_DIM
from padfree.integrations._models import (
    WINDOWED_MODEL_TYPES,
    asks_for_attention,
    computes_its_own_attention,
    has_decoder,
    own_eager,
    reads_bool_masks,
    takes_plain_masks,
)
from padfree.reference import in_window

NAME = "padfree"
STRICT_NAME = "padfree_strict"

# Options that sdpa takes without a word and does not apply.
SDPA_IGNORES = ("softcap", "s_aux")


@dataclass
class Counts:
    """Attention calls since `reset_counts`, by road. A compiled graph counts once, when it is traced."""

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


def register(impl: Literal["auto", "reference"] = "auto") -> None:
    """Make "padfree" and "padfree_strict" known as `attn_implementation` in this process.

    Args:
        impl: "auto" runs the kernel on a GPU, or on a CPU under TRITON_INTERPRET=1, and transformers' sdpa
            wherever the kernel cannot run. "reference" runs `padfree.reference` through the same adapter on
            any device, for tests; it is counted apart from the kernel.

    Raises:
        ValueError: another impl.
    """
    if impl not in ("auto", "reference"):
        raise ValueError(f"impl must be 'auto' or 'reference', got {impl!r}")
    for name, strict in ((NAME, False), (STRICT_NAME, True)):
        AttentionInterface.register(name, functools.partial(attention_forward, impl=impl, strict=strict))
        AttentionMaskInterface.register(name, functools.partial(attention_mask_for, strict=strict))


def enable(model: PreTrainedModel, strict: bool = False) -> PreTrainedModel:
    """Switch a model's attention to padfree and return the model.

    Args:
        strict: raise where a layer cannot run the kernel, instead of falling back to sdpa.

    Raises:
        TypeError: model is no transformers model.

    Warns (raises ValueError with `strict`) when no layer will use it: some classes accept any name and ignore it.
    """
    # Wrappers that hand the attributes of their model on (PEFT, torch.compile) pass.
    if not (isinstance(model, nn.Module) and hasattr(model, "set_attn_implementation")):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    name = STRICT_NAME if strict else NAME
    if name not in AttentionInterface():
        register()
    model.set_attn_implementation(name)
    if not any(asks_for_attention(module, name) for module in model.modules()):
        message = (
            f"{type(model).__name__} has no layer that takes its attention by name: padfree will not be used"
        )
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
    return model


def attention_mask_for(
    *,
    attention_mask: Tensor | None = None,
    mask_function: Any = bidirectional_mask_function,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    config: Any = None,
    strict: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask interface: the mask that `attention_forward` will get.

    Plain padding stays the tokenizer's [B, N] mask, untouched, so the host waits for nothing and no [B, 1, M, N]
    mask is built; but only in models written for such masks, since others reshape or add to what they are given.
    Causal, packed and other masks become sdpa's, always written out: a layer that is told nothing sees everything.
    Classes that ignore the name, or do not support sdpa, get eager's.
    """
    kwargs |= {"attention_mask": attention_mask, "mask_function": mask_function, "config": config}
    kwargs |= {"q_offset": q_offset, "kv_offset": kv_offset}
    if computes_its_own_attention(type(config)):
        _fall_back(f"{type(config).__name__}'s model computes its own attention", strict)
        return eager_mask(**kwargs)
    written_out = kwargs.get("allow_is_bidirectional_skip", True) is False
    plain = (
        mask_function is bidirectional_mask_function and not written_out and takes_plain_masks(type(config))
    )
    plain = plain or _is_window_of_layer(config, kwargs)
    if plain and isinstance(q_offset, int) and q_offset == 0 and kv_offset == 0:
        return attention_mask
    build = sdpa_mask if reads_bool_masks(type(config)) else eager_mask
    return build(**kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def to_key_padding_mask(attention_mask: Tensor) -> Tensor:
    """[B, N], 1 or True = token, to padfree's bool [B, N], True = padding: the one place where the sign turns."""
    return attention_mask == 0


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    skip_padded_queries: bool = False,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    *,
    impl: Literal["auto", "reference"] = "auto",
    strict: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query [B,H,M,D], key and value [B,Hkv,N,D] -> out [B,M,H,D], weights.

    Args:
        attention_mask: [B, N], 1 or True = token, or None; anything else falls back.
        position_bias: added to the scores, differentiable (T5).
        skip_padded_queries: rows at padded positions come out 0 and are not computed. Encoders pass it on:
            `model(**batch, skip_padded_queries=True)`. Models with a decoder compute every row, because the mask of
            their cross-attention is not that of its queries.
        output_attentions: also return the weights [B,H,M,N], recomputed, before dropout.

    Raises:
        RuntimeError: with `strict`, when the kernel cannot serve the call, and without where transformers cannot
            either; the message says why.
    """
    window = _window(module, attention_mask, sliding_window)
    tensors = (query, key, value, attention_mask, position_bias)
    reason = _why_layer_falls_back(module, is_causal, kwargs) or _why_tensors_fall_back(*tensors, scaling)
    if reason is None and output_attentions and (window is not None or position_bias is not None):
        reason = "attention weights of a layer with a window or a position bias were asked for"
    if reason is None and impl == "auto":
        reason = padfree.why_not(query)
    weights: Tensor | None = None
    if reason is not None:
        _fall_back(reason, strict)
        kwargs |= {"attention_mask": _sdpa_mask_of(attention_mask, window, query, key)}
        kwargs |= {"scaling": scaling, "is_causal": is_causal}
        if any(kwargs.get(name) is not None for name in SDPA_IGNORES):
            return own_eager(module)(module, query, key, value, dropout=dropout, **_additive(kwargs, query))
        kwargs |= {"position_bias": position_bias}
        out, _ = sdpa_attention_forward(module, query, key, value, dropout=dropout, **kwargs)
        # A second call would write to a paged cache again.
        if output_attentions and kwargs.get("cache") is None:
            # On the unit matrix as values the output is the weights; without them the model's list skips the layer.
            unit = torch.eye(key.shape[2], dtype=value.dtype, device=value.device).expand(*key.shape[:3], -1)
            weights = sdpa_attention_forward(module, query, key, unit, **kwargs)[0].transpose(1, 2)
        return out, weights

    _count("fused" if impl == "auto" else "reference")
    padding = None if attention_mask is None else to_key_padding_mask(attention_mask)
    out, lse = padfree.attention(
        query,
        key,
        value,
        padding,
        attn_mask=position_bias,
        dropout_p=dropout,
        scale=scaling,
        window=window,
        skip_padded_queries=skip_padded_queries
        and not has_decoder(module)
        and query.shape[2] == key.shape[2],
        return_lse=True,
        impl="triton" if impl == "auto" else "reference",
    )
    if output_attentions:
        weights = padfree.attention_weights(query, key, lse, padding, scale=scaling).to(query.dtype)
    return out.transpose(1, 2), weights


def _why_layer_falls_back(module: nn.Module, is_causal: bool | None, kwargs: dict[str, Any]) -> str | None:
    # transformers' own default for a layer that does not say.
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal:
        return "the layer is causal"
    for name in (*SDPA_IGNORES, "cache"):
        if kwargs.get(name) is not None:
            return f"{name} was given"
    return None


def _why_tensors_fall_back(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_bias: Tensor | None,
    scaling: Any,
) -> str | None:
    if attention_mask is not None and tuple(attention_mask.shape) != (query.shape[0], key.shape[2]):
        return f"the mask has {attention_mask.ndim} dimensions, or another length than the keys"
    if not query.dtype == key.dtype == value.dtype:
        return "query, key and value differ in dtype"
    if not query.shape[-1] == key.shape[-1] == value.shape[-1] <= MAX_HEAD_DIM:
        return f"query, key and value do not share one head_dim of at most {MAX_HEAD_DIM}"
    if position_bias is not None and position_bias.ndim != 4:
        return f"position_bias has {position_bias.ndim} dimensions"
    if isinstance(scaling, Tensor):
        return "scaling is a tensor"
    return None


def _window(
    module: nn.Module, attention_mask: Tensor | None, sliding_window: int | None
) -> tuple[int, int] | None:
    """The window that `attention_mask_for` left to this layer; None where the mask already holds it."""
    if sliding_window is None or (attention_mask is not None and attention_mask.ndim != 2):
        return None
    if getattr(getattr(module, "config", None), "model_type", None) not in WINDOWED_MODEL_TYPES:
        return None
    return sliding_window - 1, sliding_window - 1


def _is_window_of_layer(config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this mask is the bidirectional sliding window that the layer itself will tell us about."""
    if config is None or config.model_type not in WINDOWED_MODEL_TYPES or kwargs.get("local_size") is None:
        return False
    # A caller's own and/or mask function makes transformers turn to vmap.
    return not kwargs.get("use_vmap", False) and not kwargs.get("allow_is_causal_skip", True)


def _sdpa_mask_of(
    attention_mask: Tensor | None, window: tuple[int, int] | None, query: Tensor, key: Tensor
) -> Tensor | None:
    """The same visibility as SDPA reads it: bool [B,1,1,N] or [B,1,M,N], True = attend; other masks untouched."""
    if attention_mask is not None and attention_mask.ndim == 2:
        attention_mask = attention_mask.bool()[:, None, None, :]
    if window is None:
        return attention_mask
    inside = in_window(query.shape[2], key.shape[2], window, query.device)
    return inside if attention_mask is None else attention_mask & inside


def _additive(kwargs: dict[str, Any], query: Tensor) -> dict[str, Any]:
    """The same arguments with a bool mask as eager reads it: 0 to attend, the lowest number to hide."""
    mask = kwargs["attention_mask"]
    if mask is None or mask.dtype != torch.bool:
        return kwargs
    lowest = torch.full((), torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device)
    return kwargs | {"attention_mask": torch.where(mask, torch.zeros_like(lowest), lowest)}


def _fall_back(reason: str, strict: bool) -> None:
    if strict:
        raise RuntimeError(f"padfree cannot serve this call and strict forbids sdpa: {reason}")
    _count("fallback", reason)


# Dynamo would otherwise guard on the count it writes, and compile anew at every call.
@torch.compiler.assume_constant_result
def _count(road: str, reason: str = "") -> None:
    if road == "fused":
        _counts.fused += 1
    elif road == "reference":
        _counts.reference += 1
    else:
        if reason not in _counts.fallbacks:
            warnings.warn(f"padfree falls back to transformers' attention: {reason}", stacklevel=3)
        _counts.fallbacks[reason] += 1
