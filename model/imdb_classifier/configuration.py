"""The classifier's configuration, and the notebook's two named ones."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

LABELS = {0: "NEGATIVE", 1: "POSITIVE"}
LAYOUTS = ("auto", "packed", "padded")


class TextClassifierConfig(PreTrainedConfig):
    """Sizes of a `TextClassifier`; the defaults are the notebook's.

    Raises:
        ValueError: a size that no model can have; the message names the field, the rule and what came.
    """

    model_type = "imdb-text-classifier"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "dff",
        "max_position_embeddings": "max_length",
    }

    vocab_size: int = 30522
    d_model: int = 32
    n_layers: int = 2
    n_heads: int = 4
    dff: int = 32
    # Width of the embedding; where it differs from d_model the first layer projects its residual.
    input_dim: int | None = None
    # On both residual branches; the notebook drops no attention weights.
    dropout_rate: float = 0.1
    # In tokens: the positions end here, a longer text is refused.
    max_length: int = 400
    pad_token_id: int | None = 0
    # The head reads row 0 alone, so the last layer needs no other: same logits, same gradients, less work.
    cls_only_last_layer: bool = True
    # "packed": every layer computes real tokens alone, reviews end to end in one row; needs the attention padfree, and a
    # collator that packs, or else the host waits for the GPU once a batch. Wins by the share of padding: batches of like
    # lengths are 98 % full, batches in order of arrival 64 %. "padded": rows of one length [B, S], whose shapes repeat.
    # "auto": packed where the attention is padfree and the collator packs.
    layout: str = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        # Two labels, so that pipelines name the class; one logit stands behind both (see TextClassifier).
        if self.id2label is None and kwargs.get("num_labels", 2) == 2:
            self.id2label = dict(LABELS)
            self.label2id = {label: index for index, label in LABELS.items()}
        super().__post_init__(**kwargs)
        if self.input_dim is None:
            self.input_dim = self.d_model
        for field in ("vocab_size", "d_model", "n_layers", "n_heads", "dff", "input_dim", "max_length"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model must be divisible by n_heads = {self.n_heads}, got {self.d_model}")
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate must lie in [0, 1), got {self.dropout_rate}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        if self.num_labels not in (1, 2):
            raise ValueError(f"num_labels must be 2 (or 1 for the bare logit), got {self.num_labels}")


PRESETS: dict[str, dict[str, Any]] = {
    "notebook": {"d_model": 32, "n_layers": 2, "n_heads": 4, "dff": 32},
    "notebook-large": {"d_model": 128, "n_layers": 5, "n_heads": 4, "dff": 256, "input_dim": 32},
}
