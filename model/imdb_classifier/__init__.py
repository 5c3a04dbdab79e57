"""imdb_classifier: the course notebook's Transformer for IMDB reviews, with its attention chosen by name.

Names are loaded when first used, so that a command's `--help` does not wait for torch and transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imdb_classifier.attention import ATTENTION_NAMES, choose_attention, get_attention
    from imdb_classifier.configuration import PRESETS, TextClassifierConfig
    from imdb_classifier.modeling import (
        MultiHeadAttention,
        SelfAttention,
        TextClassifier,
        Transformer,
        TransformerLayer,
        positional_encoding,
    )

_HOME = {
    "ATTENTION_NAMES": "attention",
    "choose_attention": "attention",
    "get_attention": "attention",
    "PRESETS": "configuration",
    "TextClassifierConfig": "configuration",
    "MultiHeadAttention": "modeling",
    "SelfAttention": "modeling",
    "TextClassifier": "modeling",
    "Transformer": "modeling",
    "TransformerLayer": "modeling",
    "positional_encoding": "modeling",
}

__all__ = [
    "ATTENTION_NAMES",
    "PRESETS",
    "MultiHeadAttention",
    "SelfAttention",
    "TextClassifier",
    "TextClassifierConfig",
    "Transformer",
    "TransformerLayer",
    "choose_attention",
    "get_attention",
    "positional_encoding",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
