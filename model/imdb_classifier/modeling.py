"""The notebook's review classifier as a transformers model.

B reviews, S tokens, E = d_model; T tokens of B packed reviews. This file and those that it imports import no attention, so
that they can be exported with a checkpoint.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import can_return_tuple

from .configuration import TextClassifierConfig
from .layers import Transformer, first_rows, positional_encoding
from .packing import Packed, pack, serves_packed


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

    @property
    def packs(self) -> bool:
        """Whether a collator shall pack the reviews of a batch for this model (`config.layout`)."""
        layout = self.config.layout
        return layout == "packed" or (layout == "auto" and serves_packed(self.config._attn_implementation))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_k: int | None = None,
    ) -> SequenceClassifierOutput:
        """Classify reviews, padded or packed end to end.

        Args:
            input_ids: int64 [B, S], S up to `config.max_length`; packed [1, T].
            attention_mask: [B, S], **1 = token, 0 = padding** (transformers' sign); from `config.pad_token_id`
                when None. None where packed.
            labels: [B], 0 = negative, 1 = positive.
            token_type_ids: ignored; BERT tokenizers add them.
            position_ids: int64 [1, T], each token's place in its review; with packed reviews only.
            cu_seq_lens_q: int32 [B + 1], the boundaries of packed reviews (see `Packed`); `max_length_q` is the
                longest's length or more.
            cu_seq_lens_k, max_length_k: ignored; a collator that packs hands out the same again under these names.

        Returns:
            loss: the mean binary cross entropy of z, when labels are given.
            logits: [B, 2] = [-z/2, z/2], whose softmax is (1 - sigmoid(z), sigmoid(z)), so that argmax, `id2label`
                and pipelines are right; [B, 1] = z where `config.num_labels` is 1.

        Raises:
            ValueError: input_ids is not [B, S], S is 0, or S exceeds `config.max_length`; packed reviews came
                without their places or their longest length, or for an attention that would let them see each other.
        """
        self._check_ids(input_ids)
        packed = None
        if cu_seq_lens_q is not None:
            if attention_mask is not None:
                raise ValueError("packed reviews have no padding, got an attention_mask beside cu_seq_lens_q")
            packed = self._packed(input_ids, position_ids, cu_seq_lens_q, max_length_q)
        else:
            self._check_length(input_ids.shape[1], "input_ids holds {} tokens a review")
            if attention_mask is None and self.config.pad_token_id is not None:
                attention_mask = input_ids != self.config.pad_token_id
            if self.config.layout == "packed":
                self._check_packed()
                input_ids, position_ids, packed = pack(input_ids, attention_mask)
        x = self._embed(input_ids, None if packed is None else position_ids)
        mask = self._mask(x, attention_mask) if packed is None else packed
        x = self.layers(x, mask, first_row_only=self.config.cls_only_last_layer)
        if not self.config.cls_only_last_layer:
            x = first_rows(x, mask)
        x = x.flatten(0, 1)
        # In fp32 under autocast too, as the embedding: a review's answer is this one number.
        with torch.autocast(x.device.type, enabled=False):
            z = self.classification(x.to(self.classification.weight.dtype))

        loss = None
        if labels is not None:
            # In fp32 whatever the model's precision: a half-precision exp and log would round the loss.
            loss = F.binary_cross_entropy_with_logits(z.flatten().float(), labels.flatten().float())
        logits = z if self.config.num_labels == 1 else torch.cat([-z / 2, z / 2], dim=-1)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _check_ids(self, input_ids: Tensor) -> None:
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must have shape [B, S], got {list(input_ids.shape)}")
        if input_ids.shape[1] == 0:
            raise ValueError(f"input_ids must hold a token of each review, got shape {list(input_ids.shape)}")

    def _check_length(self, length: int, found: str) -> None:
        if length > self.config.max_length:
            raise ValueError(
                f"{found.format(length)}, the model has {self.config.max_length} positions; "
                f"tokenize with truncation=True, max_length={self.config.max_length}"
            )

    def _check_packed(self) -> None:
        if not serves_packed(name := self.config._attn_implementation):
            raise ValueError(f"attention {name!r} does not keep packed reviews apart; padfree does")

    def _packed(
        self, input_ids: Tensor, position_ids: Tensor | None, cu_seq_lens: Tensor, longest: int | None
    ) -> Packed:
        self._check_packed()
        if position_ids is None or longest is None or input_ids.shape[0] != 1:
            came = ", ".join(
                f"{name} {'absent' if value is None else 'given'}"
                for name, value in (("position_ids", position_ids), ("max_length_q", longest))
            )
            raise ValueError(
                "packed reviews are input_ids [1, T] with position_ids and max_length_q, got input_ids "
                f"{list(input_ids.shape)}, {came}"
            )
        self._check_length(longest, "max_length_q is {}")
        return Packed(cu_seq_lens, longest)

    def _embed(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """Tokens and places: [B, S, input_dim], in fp32 under autocast too."""
        width = cast(int, self.config.input_dim)
        if position_ids is None:
            places = self.pos_encoding[:, : input_ids.shape[1]]
        else:
            places = F.embedding(position_ids, self.pos_encoding[0])
        return self.embedding(input_ids) * width**0.5 + places

    def _mask(self, x: Tensor, attention_mask: Tensor | None) -> Any:
        """The mask in the form that the attention wants."""
        asks_for_bool = self.config._attn_implementation in ("sdpa", "eager")
        if asks_for_bool and attention_mask is not None and attention_mask.ndim == 2:
            # Every row sees the same keys, so one row is enough; transformers would write out [B,1,S,S], and wait for
            # the GPU to look for padding.
            return attention_mask.bool()[:, None, None, :]
        return create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask)

    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initial values, as in the notebook, where transformers would draw from normal(0, 0.02)."""
        if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, TextClassifier):
            init.copy_(module.pos_encoding, positional_encoding(*module.pos_encoding.shape[1:]))


AutoConfig.register(TextClassifierConfig.model_type, TextClassifierConfig, exist_ok=True)
AutoModelForSequenceClassification.register(TextClassifierConfig, TextClassifier, exist_ok=True)
