"""padfree as an attention implementation of transformers, under the name "padfree".

>>> from padfree.integrations.transformers import enable
>>> enable(model)  # or: register(), then AutoModel.from_pretrained(..., attn_implementation="padfree")

transformers asks two functions: `attention_mask_for` once per forward (which mask will the layers get?) and
`attention_forward` in every layer. Registering the second alone would drop the padding without a word. Layers that
the kernel cannot serve run transformers' own sdpa, or eager where sdpa would ignore an option: each such call is
counted with its reason and warned about once, or raises in strict mode. `counts` tells which variant ran.
"""

import functools
from typing import Any, Literal

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
from padfree._checks import MAX_HEAD_DIM
from padfree.integrations._by_name import NAME, STRICT_NAME, watch_models
from padfree.integrations._counts import Counts, count, counts, fall_back, reset_counts
from padfree.integrations._masks import additive, is_window_of_layer, sdpa_mask_of, window_of
from padfree.integrations._models import (
    CHOSEN_KEYS,
    INERT_ARGUMENTS,
    computes_its_own_attention,
    has_decoder,
    needs_eager,
    own_eager,
    reads_bool_masks,
    takes_plain_masks,
)
from padfree.integrations._packed import (
    PACKED_ARGUMENTS,
    attend_packed,
    packing_of,
)
from padfree.reference import computed_dtype

__all__ = [
    "NAME",
    "STRICT_NAME",
    "Counts",
    "attention_forward",
    "attention_mask_for",
    "counts",
    "enable",
    "register",
    "reset_counts",
    "to_key_padding_mask",
]

KNOWN_ARGUMENTS = INERT_ARGUMENTS | {*PACKED_ARGUMENTS, "seq_idx"}


def register(impl: Literal["triton", "reference"] = "triton") -> None:
    """Make "padfree" and "padfree_strict" known as `attn_implementation` in this process.

    From then on every model that takes one of the names is looked at when it is built or switched: one without a
    layer that asks for it is counted as a fallback, or raises ValueError under "padfree_strict". An encoder refuses
    `position_ids` that restart without `cu_seq_lens_q`: its packed sequences would see each other.

    Args:
        impl: "triton" runs the kernel wherever it can, on a CPU under TRITON_INTERPRET=1 too, since the name asks
            for it, and transformers' sdpa where it cannot. "reference" runs `padfree.reference` through the same adapter on
            any device, for tests; it is counted apart from the kernel.

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
        raise TypeError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__}{_model_inside(model)}"
        )
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

    Plain padding stays the tokenizer's [B, N] mask, untouched, so the host waits for nothing and no [B, 1, M, N]
    mask is built; but only in models written for such masks, since others reshape or add to what they are given.
    Causal, packed and other masks become sdpa's, always written out: a layer that is told nothing sees everything.
    Classes that ignore the name, do not support sdpa or are not known get eager's.
    """
    kwargs |= {"attention_mask": attention_mask, "mask_function": mask_function, "config": config}
    kwargs |= {"q_offset": q_offset, "kv_offset": kv_offset}
    if computes_its_own_attention(type(config)):
        fall_back(f"{type(config).__name__}'s model computes its own attention", strict)
        return eager_mask(**kwargs)
    written_out = kwargs.get("allow_is_bidirectional_skip", True) is False
    plain = (
        mask_function is bidirectional_mask_function and not written_out and takes_plain_masks(type(config))
    )
    plain = plain or is_window_of_layer(config, kwargs)
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
    window = window_of(module, attention_mask, sliding_window)
    packing = packing_of(query, key, kwargs)
    causal = _is_causal(module, is_causal, attention_mask)
    unknown = tuple(
        name
        for name, given in kwargs.items()
        if given is not None and given is not False and name not in KNOWN_ARGUMENTS
    )
    tensors = (query, key, value, attention_mask, position_bias)
    reason = "the layer is causal" if causal else f"{unknown[0]} was given" if unknown else None
    reason = reason or _why_tensors_fall_back(*tensors, scaling)
    padding, bias = (None, None) if reason else _padding_and_bias(attention_mask, position_bias, query.dtype)
    if reason is None and packing is not None and (padding is not None or bias is not None):
        reason = "packed sequences came with a mask or a position bias"
    if reason is None and output_attentions and (window or packing or bias is not None):
        reason = "attention weights of a layer with a window, a bias or packed sequences were asked for"
    if reason is None and impl == "triton":
        reason = padfree.why_not(query)
    weights: Tensor | None = None
    if reason is not None:
        fall_back(reason, strict)
        if any(name in CHOSEN_KEYS for name in unknown):
            raise RuntimeError(
                f"{type(module).__name__} hides keys in a way only its model's eager and sdpa honour"
            )
        kwargs |= {"attention_mask": sdpa_mask_of(attention_mask, window, packing, causal, query, key)}
        kwargs |= {"scaling": scaling, "is_causal": is_causal}
        if position_bias is not None:
            kwargs["position_bias"] = position_bias
        if needs_eager(type(module), unknown):
            return own_eager(module)(module, query, key, value, dropout=dropout, **additive(kwargs, query))
        out, _ = sdpa_attention_forward(module, query, key, value, dropout=dropout, **kwargs)
        # A second call would write to a paged cache again.
        if output_attentions and kwargs.get("cache") is None:
            # On the unit matrix as values the output is the weights; without them the model's list skips the layer.
            unit = torch.eye(key.shape[2], dtype=value.dtype, device=value.device).expand(*key.shape[:3], -1)
            weights = sdpa_attention_forward(module, query, key, unit, **kwargs)[0].transpose(1, 2)
        return out, weights

    count("fused" if impl == "triton" else "reference")
    if packing is not None:
        return attend_packed(query, key, value, packing, dropout, scaling, window, impl), None
    out, lse = padfree.attention(
        query,
        key,
        value,
        padding,
        attn_mask=bias,
        dropout_p=dropout,
        scale=scaling,
        window=window,
        skip_padded_queries=skip_padded_queries
        and not has_decoder(module)
        and query.shape[2] == key.shape[2],
        return_lse=True,
        impl=impl,
    )
    if output_attentions:
        weights = padfree.attention_weights(query, key, lse, padding, scale=scaling).to(out.dtype)
    return out.transpose(1, 2), weights


def _is_causal(module: nn.Module, is_causal: bool | None, attention_mask: Tensor | None) -> bool:
    """As transformers' sdpa reads it: a layer that says nothing is causal, except where a mask tells what it sees."""
    said = getattr(module, "is_causal", None) if is_causal is None else is_causal
    return (attention_mask is None or has_decoder(module)) if said is None else bool(said)


def _why_tensors_fall_back(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_bias: Tensor | None,
    scaling: Any,
) -> str | None:
    if attention_mask is not None:
        batch, length = query.shape[0], key.shape[2]
        if attention_mask.ndim == 4 and attention_mask.shape != (batch, 1, 1, length):
            return (
                "the mask is written out as [B, 1, M, N]: causal, windowed, the caller's own or its model's"
            )
        if attention_mask.ndim not in (2, 4):
            return f"the mask has {attention_mask.ndim} dimensions, not [B, N]"
        if attention_mask.ndim == 2 and attention_mask.shape != (batch, length):
            return "the mask has another batch size or length than the keys"
    if len({computed_dtype(x) for x in (query, key, value)}) > 1:
        return "query, key and value differ in dtype"
    if not query.shape[-1] == key.shape[-1] == value.shape[-1] <= MAX_HEAD_DIM:
        return f"query, key and value do not share one head_dim of at most {MAX_HEAD_DIM}"
    if position_bias is not None and position_bias.ndim != 4:
        return f"position_bias has {position_bias.ndim} dimensions"
    if isinstance(scaling, Tensor):
        return "scaling is a tensor"
    return None


def _padding_and_bias(
    attention_mask: Tensor | None, position_bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The mask as padding where it is one, else as what is added to the scores."""
    if attention_mask is None:
        return None, position_bias
    if attention_mask.ndim == 2:
        return to_key_padding_mask(attention_mask), position_bias
    if not attention_mask.is_floating_point():
        return to_key_padding_mask(attention_mask[:, 0, 0]), position_bias
    mask = attention_mask.to(dtype)
    return None, mask if position_bias is None else position_bias + mask
