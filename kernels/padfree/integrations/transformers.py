"""padfree as an attention implementation of transformers, under the name "padfree".

>>> from padfree.integrations.transformers import enable
>>> enable(model)  # or: register(), then AutoModel.from_pretrained(..., attn_implementation="padfree")

transformers calls two functions: `attention_mask_for` once per forward, for the mask that the layers will get, and
`attention_forward` in every layer. Registering the second alone would drop the padding without a word. Layers that the
kernel cannot serve run transformers' own sdpa, or eager where sdpa would ignore an option: each such call is counted
with its reason and warned about once, or raises in strict mode. `counts` tells which variant ran.
"""

import functools
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        "padfree.integrations.transformers needs transformers: pip install 'transformers>=5.17,<6'",
        name="transformers",
    ) from None
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, eager_mask, sdpa_mask

import padfree
from padfree._arguments import Packing, computed_dtype
from padfree._checks import MAX_HEAD_DIM
from padfree.integrations import _masks, _models
from padfree.integrations._by_name import NAME, STRICT_NAME, watch_models
from padfree.integrations._counts import Counts, count, counts, fall_back, reset_counts

__all__ = [
    "NAME", "STRICT_NAME", "Counts", "attention_forward", "attention_mask_for", "counts", "enable", "register",
    "reset_counts", "to_key_padding_mask",
]  # fmt: skip

KNOWN_ARGUMENTS = _models.INERT_ARGUMENTS | {*_masks.PACKED_ARGUMENTS, "seq_idx"}


def register(impl: Literal["triton", "reference"] = "triton") -> None:
    """Make "padfree" and "padfree_strict" known as `attn_implementation` in this process.

    From then on every model that takes one of the names is looked at when it is built or switched: one without a layer
    that asks for it is counted as a fallback, or raises ValueError under "padfree_strict". An encoder refuses
    `position_ids` that restart without `cu_seq_lens_q`: its packed sequences would see each other.

    Args:
        impl: "triton" runs the kernel wherever it can, on a CPU under TRITON_INTERPRET=1 too, since the name asks for
            it, and transformers' sdpa where it cannot. "reference" runs `padfree.reference` through the same adapter
            on any device, for tests; it is counted apart from the kernel.

    Raises:
        ValueError: another impl.
    """
    if impl not in ("triton", "reference"):
        raise ValueError(f"impl must be 'triton' or 'reference', got {impl!r}")
    for name, strict in ((NAME, False), (STRICT_NAME, True)):
        AttentionInterface.register(name, functools.partial(attention_forward, impl=impl, strict=strict))
        AttentionMaskInterface.register(name, functools.partial(attention_mask_for, strict=strict))
    watch_models()


def enable(model: PreTrainedModel, strict: bool = False) -> PreTrainedModel:
    """Switch a model's attention to padfree and return the model.

    Args:
        strict: raise where a layer cannot run the kernel, instead of falling back to sdpa.

    Raises:
        TypeError: model is no transformers model.

    Warns (raises ValueError with `strict`) when no layer will use it: some classes accept any name and ignore it.
    `counts` has it as a fallback.
    """
    # Wrappers that hand the attributes of their model on (PEFT, torch.compile) pass.
    if not (isinstance(model, nn.Module) and hasattr(model, "set_attn_implementation")):
        got = f"{type(model).__name__}{_model_inside(model)}"
        raise TypeError(f"model must be a transformers PreTrainedModel, got {got}")
    name = STRICT_NAME if strict else NAME
    if name not in AttentionInterface():
        register()
    model.set_attn_implementation(name)
    return model


def _model_inside(model: Any) -> str:
    parts = model.named_modules() if isinstance(model, nn.Module) else ()
    for path, part in parts:
        if isinstance(part, PreTrainedModel):
            steps = (f"[{step}]" if step.isdigit() else f".{step}" for step in path.split("."))
            return f"; pass the {type(part).__name__} inside, model{''.join(steps)}"
    return ""


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

    Plain padding stays the tokenizer's [B, N] mask, as a view, so that the host waits for nothing and no [B, 1, M, N]
    mask is built; but only in models written for such masks, since others reshape or add to what they are given.
    Causal, packed and other masks become sdpa's, always written out: a layer that is told nothing sees everything.
    Classes that ignore the name, do not support sdpa or are not known get eager's.
    """
    kwargs |= {"attention_mask": attention_mask, "mask_function": mask_function, "config": config}
    kwargs |= {"q_offset": q_offset, "kv_offset": kv_offset}
    if _models.computes_its_own_attention(type(config)):
        fall_back(f"{type(config).__name__}'s model computes its own attention", strict)
        return eager_mask(**kwargs)
    written_out = kwargs.get("allow_is_bidirectional_skip") is False
    plain = mask_function is bidirectional_mask_function and not written_out
    plain = plain and _models.takes_plain_masks(type(config)) or _masks.is_window_of_layer(config, kwargs)
    if plain and isinstance(q_offset, int) and q_offset == 0 and kv_offset == 0:
        return _masks.for_one_forward(attention_mask)
    build = sdpa_mask if _models.reads_bool_masks(type(config)) else eager_mask
    return build(**kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def to_key_padding_mask(attention_mask: Tensor) -> Tensor:
    """[B, N], 1 or True = token, to padfree's bool [B, N], True = padding: the one place where the sign turns."""
    return attention_mask == 0


class _Call(NamedTuple):
    """One call of `attention_forward`, as its steps read it."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    position_bias: Tensor | None
    dropout: float
    scaling: Any
    output_attentions: bool
    causal: bool
    window: tuple[int, int] | None
    packing: Packing | None
    unknown: tuple[str, ...]


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
    impl: Literal["triton", "reference"] = "triton",
    strict: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query [B,H,M,D], key and value [B,Hkv,N,D] -> out [B,M,H,D], weights.

    Args:
        attention_mask: [B, N] or [B, 1, 1, N], 1 or True = token; float [B, 1, 1, N], added to the scores; or None.
            Anything else falls back.
        position_bias: added to the scores, differentiable (T5).
        skip_padded_queries: rows at padded positions come out 0 and are not computed. Encoders pass it on:
            `model(**batch, skip_padded_queries=True)`. Models with a decoder compute every row, because the mask of
            their cross-attention is not that of its queries.
        output_attentions: also return the weights [B,H,M,N], recomputed, before dropout.
        kwargs: cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k say where the sequences of a packed row
            lie (B = 1), and each attends to itself, here and where it falls back. What is not known to leave the
            result as it is falls back.

    Raises:
        ValueError: sequences are packed and their boundaries did not come.
        RuntimeError: with `strict`, when the kernel cannot serve the call, and without where transformers cannot
            either; the message says why.
    """
    tensors = query, key, value, attention_mask, position_bias
    causal = _is_causal(module, is_causal, attention_mask)
    window = _masks.window_of(module, attention_mask, sliding_window)
    packing = _masks.packing_of(query, key, kwargs)
    given = [name for name, value in kwargs.items() if value is not None and value is not False]
    unknown = tuple(name for name in given if name not in KNOWN_ARGUMENTS)
    call = _Call(module, *tensors, dropout, scaling, output_attentions, causal, window, packing, unknown)
    reason = _why_fall_back(call) or (padfree.why_not(query) if impl == "triton" else None)
    if reason is not None:
        fall_back(reason, strict)
        return _attend_by_transformers(call, kwargs | {"is_causal": is_causal})
    count("fused" if impl == "triton" else "reference")
    return _attend_by_padfree(call, skip_padded_queries, impl)


def _is_causal(module: nn.Module, is_causal: bool | None, attention_mask: Tensor | None) -> bool:
    """As transformers' sdpa reads it: a layer that says nothing is causal, except where a mask tells what it sees."""
    said = getattr(module, "is_causal", None) if is_causal is None else is_causal
    return (attention_mask is None or _models.has_decoder(module)) if said is None else bool(said)


def _why_fall_back(call: _Call) -> str | None:
    """Why `padfree.attention` cannot compute this call on any device, or None where it can."""
    query, key, value, mask, bias = call.query, call.key, call.value, call.mask, call.position_bias
    if call.causal:
        return "the layer is causal"
    if call.unknown:
        return f"{call.unknown[0]} was given"
    if mask is not None:
        if mask.ndim == 4 and mask.shape != (query.shape[0], 1, 1, key.shape[2]):
            why = "causal, windowed, the caller's own or its model's"
            return f"the mask is written out as [B, 1, M, N]: {why}"
        if mask.ndim not in (2, 4):
            return f"the mask has {mask.ndim} dimensions, not [B, N]"
        if mask.ndim == 2 and mask.shape != (query.shape[0], key.shape[2]):
            return "the mask has another batch size or length than the keys"
    if len({computed_dtype(x) for x in (query, key, value)}) > 1:
        return "query, key and value differ in dtype"
    if not query.shape[-1] == key.shape[-1] == value.shape[-1] <= MAX_HEAD_DIM:
        return f"query, key and value do not share one head_dim of at most {MAX_HEAD_DIM}"
    if bias is not None and bias.ndim != 4:
        return f"position_bias has {bias.ndim} dimensions"
    if isinstance(call.scaling, Tensor):
        return "scaling is a tensor"
    if call.packing is not None and (mask is not None or bias is not None):
        return "packed sequences came with a mask or a position bias"
    biased = bias is not None or (mask is not None and mask.ndim == 4 and mask.is_floating_point())
    if call.output_attentions and (call.window or call.packing or biased):
        return "attention weights of a layer with a window, a bias or packed sequences were asked for"
    return None


def _attend_by_transformers(call: _Call, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """transformers' own sdpa, or the model's eager attention where sdpa would ignore one of the arguments."""
    module, query, key, value = call[:4]
    if any(name in _models.CHOSEN_KEYS for name in call.unknown):
        name = type(module).__name__
        raise RuntimeError(f"{name} hides keys in a way only its model's eager and sdpa honour")
    mask = _masks.sdpa_mask_of(call.mask, call.window, call.packing, call.causal, query, key)
    kwargs |= {"attention_mask": mask, "scaling": call.scaling}
    if call.position_bias is not None:
        kwargs["position_bias"] = call.position_bias
    if _models.needs_eager(type(module), call.unknown):
        kwargs = _masks.additive(kwargs, query)
        return _models.own_eager(module)(module, query, key, value, dropout=call.dropout, **kwargs)
    out, _ = sdpa_attention_forward(module, query, key, value, dropout=call.dropout, **kwargs)
    # A second call would write to a paged cache again.
    if not call.output_attentions or kwargs.get("cache") is not None:
        return out, None
    # On the unit matrix as values the output is the weights; without them the model's list skips the layer.
    unit = torch.eye(key.shape[2], dtype=value.dtype, device=value.device).expand(*key.shape[:3], -1)
    return out, sdpa_attention_forward(module, query, key, unit, **kwargs)[0].transpose(1, 2)


def _attend_by_padfree(
    call: _Call, skip_padded_queries: bool, impl: Literal["triton", "reference"]
) -> tuple[Tensor, Tensor | None]:
    query, key, value, scale = call.query, call.key, call.value, call.scaling
    options: dict[str, Any] = {"dropout_p": call.dropout, "scale": scale, "window": call.window, "impl": impl}
    if call.packing is not None:
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        packed: Any = padfree.attention_varlen(query, key, value, *call.packing, **options)
        return packed[None], None
    (padding, spans), bias = _padding_and_bias(call.mask, call.position_bias, query.dtype)
    skip = skip_padded_queries and not _models.has_decoder(call.module) and query.shape[2] == key.shape[2]
    options |= {"attn_mask": bias, "skip_padded_queries": skip, "return_lse": True}
    out, lse = padfree.attention(query, key, value, padding, key_spans=spans, **options)
    weights = None
    if call.output_attentions:
        weights = padfree.attention_weights(query, key, lse, padding, scale=scale).to(out.dtype)
    return out.transpose(1, 2), weights


def _padding_and_bias(
    mask: Tensor | None, position_bias: Tensor | None, dtype: torch.dtype
) -> tuple[tuple[Tensor | None, Tensor | None], Tensor | None]:
    """The mask as (padding, its spans) where it is padding, else as what is added to the scores."""
    if mask is None:
        return (None, None), position_bias
    if mask.ndim == 2:
        return _masks.known_padding(mask, to_key_padding_mask), position_bias
    if not mask.is_floating_point():
        return (to_key_padding_mask(mask[:, 0, 0]), None), position_bias
    mask = mask.to(dtype)
    return (None, None), mask if position_bias is None else position_bias + mask
