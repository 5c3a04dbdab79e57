"""What happens to a model that takes one of our names, be it by `enable` or by `attn_implementation=`.

Classes that compute their own attention accept any name and never look it up, so nothing of ours would ever be called:
neither to count nor to raise in strict mode. transformers offers no hook there, so `watch_models` wraps the two methods
that every model passes through, `post_init` when it is built and `set_attn_implementation` when it is switched. Models
under other names are not touched.
"""

import dis
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from padfree.integrations._counts import count
from padfree.integrations._models import asks_for_attention

NAME = "padfree"
STRICT_NAME = "padfree_strict"


def watch_models() -> None:
    """Look at every model that takes one of our names from now on. Once per process."""
    if hasattr(PreTrainedModel.post_init, "watched_by_padfree"):
        return
    built, switched = PreTrainedModel.post_init, PreTrainedModel.set_attn_implementation

    @functools.wraps(built)
    def post_init(self: PreTrainedModel) -> None:
        built(self)
        # It may be a part of another model: a backbone without attention is nobody's loss.
        if _is_ours(self) and _mixes_tokens(self):
            _look_at(self, self.config._attn_implementation)

    @functools.wraps(switched)
    def set_attn_implementation(
        self: PreTrainedModel, attn_implementation: Any, *args: Any, **kw: Any
    ) -> None:
        switched(self, attn_implementation, *args, **kw)
        for part in self.modules():
            if isinstance(part, PreTrainedModel) and (part is self or _mixes_tokens(part)):
                # A class that cannot be switched keeps its old name; a dict names each part's.
                by_part = isinstance(attn_implementation, dict)
                _look_at(part, part.config._attn_implementation if by_part else attn_implementation)

    post_init.watched_by_padfree = True  # type: ignore[attr-defined]
    PreTrainedModel.post_init = post_init  # type: ignore[method-assign]
    PreTrainedModel.set_attn_implementation = set_attn_implementation  # type: ignore[method-assign]


def _look_at(model: PreTrainedModel, name: str | None) -> None:
    if name not in (NAME, STRICT_NAME):
        return
    asking = [module for module in model.modules() if asks_for_attention(module, name)]
    if not asking:
        model_name = type(model).__name__
        reason = f"{model_name} has no layer that takes its attention by name: padfree will not be used"
        if name == STRICT_NAME:
            raise ValueError(reason)
        count("fallback", reason)
    # Decoders build their masks from the positions. A part's layers are looked at with the part.
    own = [layer for layer in asking if type(layer.config) is type(model.config)]
    encoders = [layer for layer in own if not getattr(layer, "is_causal", False)]
    if encoders or not asking:
        _hook(model, _refuse_restarts)
        if not (encoders and _keeps_apart(model, encoders)):
            _hook(model, _refuse_boundaries)


def _mixes_tokens(model: nn.Module) -> bool:
    modules = model.modules()
    return any(isinstance(x, nn.Embedding) or "Attention" in type(x).__name__ for x in modules)


def _keeps_apart(model: PreTrainedModel, layers: list[nn.Module]) -> bool:
    """Whether each sequence of a packed row gets positions of its own, and its boundaries reach the attention."""
    told = "position_ids" in inspect.signature(model.forward).parameters
    relative = any(hasattr(layer, "has_relative_attention_bias") for layer in layers)
    # MobileBERT's embeddings of a token look at its neighbours.
    neighbours = getattr(model.config, "trigram_input", False)
    classes: set[type] = {type(layer) for layer in layers}
    return (told or relative) and not neighbours and all(_hands_arguments_on(x) for x in classes)


@functools.cache
def _hands_arguments_on(layer_class: type) -> bool:
    # The one instruction that every call with **kwargs needs.
    code = inspect.unwrap(layer_class.forward).__code__  # type: ignore[attr-defined]
    return any(step.opname == "DICT_MERGE" for step in dis.get_instructions(code))


def _hook(model: PreTrainedModel, refuse: Callable[..., None]) -> None:
    if refuse not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(refuse, with_kwargs=True)


def _refuse_boundaries(model: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> None:
    """For models that would take no notice of them."""
    if kwargs.get("cu_seq_lens_q") is not None and _is_ours(model):
        raise ValueError(
            f"{type(model).__name__} cannot keep packed sequences apart: it takes no position_ids, drops their "
            "boundaries or computes its own attention; pad them instead"
        )


def _refuse_restarts(model: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> None:
    """Without their boundaries packed sequences would see each other, and the layers of an encoder cannot tell."""
    given = kwargs
    if len(args) > 1:
        given = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
    positions = given.get("position_ids")
    if positions is None or positions.ndim != 2 or not _is_ours(model):
        return
    # A mask comes with padding, whose positions may be anything.
    if any(given.get(name) is not None for name in ("cu_seq_lens_q", "attention_mask")):
        return
    message = (
        "position_ids restart within a row and cu_seq_lens_q did not come: the packed sequences would see each other; "
        "DataCollatorWithFlattening(return_flash_attn_kwargs=True) makes both"
    )
    onward = (positions.diff(dim=-1) > 0).all()
    if torch.compiler.is_compiling():
        # A graph cannot branch on values, but it can stop.
        torch._assert_async(onward, message)
    elif not onward:
        raise ValueError(message)


def _is_ours(model: PreTrainedModel) -> bool:
    return model.config._attn_implementation in (NAME, STRICT_NAME)
