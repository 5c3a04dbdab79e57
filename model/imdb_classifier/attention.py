"""The registry: which attention a name on the command line or in a call stands for, and what `auto` picks.

All of them share one mask, the tokenizer's `attention_mask` (1 = token); its single inversion to padfree's
`key_padding_mask` (True = padding) is in `padfree.integrations.transformers`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch

# Where each is; imported when asked for, so that the names alone cost nothing.
_FUNCTIONS = {
    "padfree": ("padfree.integrations.transformers", "attention_forward"),
    "sdpa": ("transformers.integrations.sdpa_attention", "sdpa_attention_forward"),
    "eager": ("imdb_classifier.layers", "eager_attention_forward"),
}
ATTENTION_NAMES = ("auto", *_FUNCTIONS)


def get_attention(name: str) -> Callable[..., Any]:
    """The function behind a name, in transformers' form: (module, query, key, value, attention_mask, ...).

    Raises:
        ValueError: an unknown name, or "auto", which `choose_attention` resolves.
    """
    if name not in _FUNCTIONS:
        raise ValueError(f"attention must be one of {', '.join(_FUNCTIONS)}, got {name!r}")
    module, function = _FUNCTIONS[name]
    return cast(Callable[..., Any], getattr(import_module(module), function))


def choose_attention(name: str, device: torch.device | str, dtype: torch.dtype) -> tuple[str, str]:
    """Resolve a name for this device and dtype, and make the answer known to transformers.

    Args:
        name: one of `ATTENTION_NAMES`. "auto" takes padfree on a GPU that can run it, else sdpa: on a CPU, also under
            TRITON_INTERPRET=1, as in `padfree.attention`.
        device, dtype: where, and in which precision, attention will be computed.

    Returns:
        (name, reason): what to pass as `attn_implementation`, and one line saying why it was picked.

    Raises:
        ValueError: an unknown name.
        RuntimeError: "padfree" was asked for and cannot run here; the message says why in one line.
    """
    import torch

    import padfree
    from padfree.integrations.transformers import register

    if name not in ATTENTION_NAMES:
        raise ValueError(f"attention must be one of {', '.join(ATTENTION_NAMES)}, got {name!r}")
    if name not in ("auto", "padfree"):
        return name, "asked for"
    device = torch.device(device)
    obstacle = padfree.why_not(torch.empty(0, dtype=dtype, device=device))
    if name == "padfree":
        if obstacle is not None:
            raise RuntimeError(f"attention 'padfree' cannot run here ({obstacle}); auto, sdpa and eager can")
        register()
        return name, "asked for"
    if device.type == "cpu":
        return "sdpa", "auto: on a CPU PyTorch's SDPA; the fused kernel is for a GPU"
    if obstacle is not None:
        return "sdpa", f"auto: padfree cannot run: {obstacle}"
    register()
    return "padfree", f"auto: the fused kernel runs on {torch.cuda.get_device_name(device)}"
