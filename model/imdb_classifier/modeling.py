"""The notebook's review classifier as a transformers model.

B reviews, S tokens, E = d_model, H heads, D = E / H. Every attention implementation that transformers knows by
name runs here ("eager", "sdpa", "flex_attention", "padfree" once registered) through one switch, the model's
`attn_implementation`; this file imports none of them, so that it can be exported with a checkpoint.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration import TextClassifierConfig


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(query @ keyᵀ / √D) @ value, the reference: query [B,H,M,D], key and value [B,H,N,D].

    `attention_mask` broadcasts to [B,H,M,N]: bool, True = attend, or float, added, with the dtype's lowest
    number meaning hidden. Returns ([B,M,H,D], weights [B,H,M,N]); a row with nothing to attend to is 0.

    Hidden keys are selected away rather than lowered by the notebook's -1e9: that number overflows fp16, lets a
    NaN in padding through, and turns a review that is all padding into an average over its padding.
    """
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is None:
        weights = scores.softmax(dim=-1)
    else:
        if attention_mask.dtype == torch.bool:
            hidden = ~attention_mask
        else:
            hidden = attention_mask <= torch.finfo(attention_mask.dtype).min
            scores = scores + attention_mask.masked_fill(hidden, 0)
        # The second selection clears the NaN that softmax leaves in a row without keys.
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1).masked_fill(hidden, 0)
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def positional_encoding(position: int, d_model: int) -> Tensor:
    """[1, position, d_model] fp32: sin(pos / 10000^(2i/d_model)) at column 2i, the cosine at 2i + 1."""
    column = torch.arange(d_model)
    rates = 10000.0 ** (-(column // 2 * 2).double() / d_model)
    angles = torch.arange(position).double()[:, None] * rates
    return torch.where(column % 2 == 0, angles.sin(), angles.cos()).float()[None]


class MultiHeadAttention(nn.Module):
    """H heads of softmax(QKᵀ/√D)V between four linear layers; no dropout on the weights, as in the notebook.

    `config` names the implementation (`config._attn_implementation`); without one it is the eager reference.
    """

    is_causal = False

    def __init__(
        self, input_dim: int, d_model: int, n_heads: int, config: PreTrainedConfig | None = None
    ) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"d_model must be divisible by n_heads = {n_heads}, got {d_model}")
        self.config = config
        self.depth = d_model // n_heads
        self.wq = nn.Linear(input_dim, d_model)
        self.wk = nn.Linear(input_dim, d_model)
        self.wv = nn.Linear(input_dim, d_model)
        self.dense = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, attention_mask: Any = None, *, first_row_only: bool = False) -> Tensor:
        """[B,S,input_dim] -> [B,S,E], or [B,1,E] with `first_row_only`: row 0 asks, all rows answer.

        `attention_mask` has the form the implementation wants, as `create_bidirectional_mask` makes it.
        """
        query = self._split_heads(self.wq(x[:, :1] if first_row_only else x))
        key = self._split_heads(self.wk(x))
        value = self._split_heads(self.wv(x))
        name = getattr(self.config, "_attn_implementation", None) or "eager"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        # Padded rows are hidden keys in every layer and the head reads row 0: nobody misses them.
        skip = {"skip_padded_queries": not first_row_only}
        scaling = self.depth**-0.5
        out, _ = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=scaling, **skip)
        return self.dense(out.flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        """[B,S,E] -> [B,H,S,D], a view."""
        return x.unflatten(-1, (-1, self.depth)).transpose(1, 2)


class SelfAttention(MultiHeadAttention):
    """The notebook's first attention: one head as wide as the model."""

    def __init__(self, input_dim: int, d_model: int, config: PreTrainedConfig | None = None) -> None:
        super().__init__(input_dim, d_model, 1, config)


class TransformerLayer(nn.Module):
    """Post-norm layer: x1 = LN(dropout(attention(x)) + x), out = LN(dropout(ffn(x1)) + x1).

    Where input_dim differs from d_model, a linear `shortcut` takes the residual x to d_model.
    """

    def __init__(
        self,
        input_dim: int,
        d_model: int,
        dff: int,
        n_heads: int,
        dropout_rate: float = 0.1,
        config: PreTrainedConfig | None = None,
    ) -> None:
        super().__init__()
        self.mha = MultiHeadAttention(input_dim, d_model, n_heads, config)
        self.ffn = nn.Sequential(nn.Linear(d_model, dff), nn.ReLU(), nn.Linear(dff, d_model))
        self.layernorm1 = nn.LayerNorm(d_model)
        self.layernorm2 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout_rate)
        self.shortcut = nn.Identity() if input_dim == d_model else nn.Linear(input_dim, d_model)

    def forward(self, x: Tensor, attention_mask: Any = None, *, first_row_only: bool = False) -> Tensor:
        """[B,S,input_dim] -> [B,S,E], or its row 0, [B,1,E]."""
        residual = self.shortcut(x[:, :1] if first_row_only else x)
        attended = self.mha(x, attention_mask, first_row_only=first_row_only)
        x1 = self.layernorm1(self.dropout(attended) + residual)
        return self.layernorm2(self.dropout(self.ffn(x1)) + x1)


class Transformer(nn.ModuleList):
    """`n_layers` layers in a row. A ModuleList, so that a state dict reads `layers.0.mha.wq.weight`, as the notebook's."""

    def __init__(
        self,
        input_dim: int,
        d_model: int,
        dff: int,
        n_heads: int,
        n_layers: int,
        dropout_rate: float = 0.1,
        config: PreTrainedConfig | None = None,
    ) -> None:
        widths = [input_dim] + [d_model] * (n_layers - 1)
        sizes = d_model, dff, n_heads, dropout_rate, config
        super().__init__(TransformerLayer(width, *sizes) for width in widths)

    def forward(self, x: Tensor, attention_mask: Any = None, *, first_row_only: bool = False) -> Tensor:
        """[B,S,input_dim] -> [B,S,E]; with `first_row_only` the last layer computes row 0 alone, [B,1,E]."""
        *body, last = self
        for layer in body:
            x = layer(x, attention_mask)
        if first_row_only:
            attention_mask = _first_row(attention_mask)
        return last(x, attention_mask, first_row_only=first_row_only)


class TextClassifier(PreTrainedModel):
    """Embedding · √width + sinusoidal positions, a Transformer, one linear layer from row 0 to one logit z.

    Reviews are padded on the right: row 0 must be a token, since it is what the head reads.
    """

    config_class = TextClassifierConfig
    base_model_prefix = "text_classifier"
    _input_embed_layer = "embedding"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Without it Trainer multiplies this mean loss by the accumulation steps and the number of processes.
    accepts_loss_kwargs = False

    pos_encoding: Tensor  # [1, max_length, input_dim]

    def __init__(self, config: TextClassifierConfig) -> None:
        super().__init__(config)
        width = cast(int, config.input_dim)
        self.embedding = nn.Embedding(config.vocab_size, width)
        self.register_buffer("pos_encoding", positional_encoding(config.max_length, width))
        self.layers = Transformer(
            width, config.d_model, config.dff, config.n_heads, config.n_layers, config.dropout_rate, config
        )
        self.classification = nn.Linear(config.d_model, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Classify reviews.

        Args:
            input_ids: int64 [B, S], S up to `config.max_length`.
            attention_mask: [B, S], **1 = token, 0 = padding** (transformers' sign); from `config.pad_token_id`
                when None.
            labels: [B], 0 = negative, 1 = positive.
            token_type_ids: ignored; BERT tokenizers add them.

        Returns:
            loss: the mean binary cross entropy of z, when labels are given.
            logits: [B, 2] = [-z/2, z/2], whose softmax is (1 - sigmoid(z), sigmoid(z)), so that argmax, `id2label`
                and pipelines are right; [B, 1] = z where `config.num_labels` is 1.

        Raises:
            ValueError: input_ids is not [B, S], S is 0, or S exceeds `config.max_length`.
        """
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must have shape [B, S], got {list(input_ids.shape)}")
        length = input_ids.shape[1]
        if length == 0:
            raise ValueError(f"input_ids must hold a token of each review, got shape {list(input_ids.shape)}")
        if length > self.config.max_length:
            raise ValueError(
                f"input_ids holds {length} tokens a review, the model has {self.config.max_length} positions; "
                f"tokenize with truncation=True, max_length={self.config.max_length}"
            )
        if attention_mask is None and self.config.pad_token_id is not None:
            attention_mask = input_ids != self.config.pad_token_id

        width = cast(int, self.config.input_dim)
        x = self.embedding(input_ids) * width**0.5 + self.pos_encoding[:, :length]
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask)
        x = self.layers(x, mask, first_row_only=self.config.cls_only_last_layer)
        z = self.classification(x[:, 0])

        loss = None
        if labels is not None:
            # In fp32 whatever the model's precision: a half-precision exp and log would round the loss.
            loss = F.binary_cross_entropy_with_logits(z.flatten().float(), labels.flatten().float())
        logits = z if self.config.num_labels == 1 else torch.cat([-z / 2, z / 2], dim=-1)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initial values, as in the notebook, where transformers would draw from normal(0, 0.02)."""
        if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, TextClassifier):
            init.copy_(module.pos_encoding, positional_encoding(*module.pos_encoding.shape[1:]))


def _first_row(attention_mask: Any) -> Any:
    """The mask of query row 0, in the form the implementation got: none, [B,N], [B,1,S,N] or a BlockMask."""
    if isinstance(attention_mask, BlockMask):
        batch, _, _, keys = attention_mask.shape
        device = attention_mask.kv_num_blocks.device
        return create_block_mask(attention_mask.mask_mod, batch, None, 1, keys, device=device)
    if attention_mask is None or attention_mask.ndim == 2:
        return attention_mask
    return attention_mask[:, :, :1]


AutoConfig.register(TextClassifierConfig.model_type, TextClassifierConfig, exist_ok=True)
AutoModelForSequenceClassification.register(TextClassifierConfig, TextClassifier, exist_ok=True)
