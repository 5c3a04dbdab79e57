"""imdb_classifier: the course notebook's Transformer for IMDB reviews, with its attention chosen by name.

To be read in the order of its imports: configuration, layers, modeling and attention; data/, from files to batches;
checkpoints/, what a run leaves on the disk; training/, the run itself, and `Classifier`, what it is good for;
commands/, the programs.

Names are loaded when first used, so that a command's `--help` does not wait for torch and transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imdb_classifier.attention import ATTENTION_NAMES, choose_attention, get_attention
    from imdb_classifier.configuration import PRESETS, TextClassifierConfig
    from imdb_classifier.layers import (
        MultiHeadAttention,
        SelfAttention,
        Transformer,
        TransformerLayer,
        positional_encoding,
    )
    from imdb_classifier.modeling import TextClassifier
    from imdb_classifier.training.classifier import Classifier, Prediction

__all__ = [
    "ATTENTION_NAMES",
    "PRESETS",
    "Classifier",
    "MultiHeadAttention",
    "Prediction",
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
    if name in __all__:
        for home in ("attention", "configuration", "layers", "modeling", "training.classifier"):
            if hasattr(module := import_module(f"{__name__}.{home}"), name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
