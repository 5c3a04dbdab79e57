"""The baseline: the course notebook's classifier, its step and its loop for accuracy, in its own arithmetic.

What ours does otherwise is left as the notebook has it: a product each for q, k and v, the scores written out and lowered
by 1e9 at padding, every row of every layer. Parameters have our classifier's names, so that one draw of weights serves both.
"""

from collections.abc import Iterable
from math import sqrt
from typing import Any, cast

import torch
from torch import Tensor, nn

from imdb_classifier.configuration import TextClassifierConfig
from imdb_classifier.layers import positional_encoding


class Attention(nn.Module):
    """softmax(QKᵀ / √D - 1e9 · padding) V, of H heads between four linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.depth = heads, width // heads
        self.wq, self.wk, self.wv, self.dense = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, is_padding: Tensor) -> Tensor:
        """x [B, S, E], is_padding [B, 1, 1, S] -> [B, S, E]."""
        query, key, value = (self._heads(linear(x)) for linear in (self.wq, self.wk, self.wv))
        scores = torch.matmul(query, key.transpose(-1, -2)) / sqrt(self.depth)
        scores += is_padding * -1e9
        out = torch.matmul(torch.softmax(scores, dim=-1), value)
        return self.dense(out.transpose(1, 2).contiguous().flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, self.depth).transpose(1, 2)


class Layer(nn.Module):
    """Post-norm, with dropout on both residual branches."""

    def __init__(self, width: int, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.mha = Attention(width, heads)
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.layernorm1, self.layernorm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, is_padding: Tensor) -> Tensor:
        x = self.layernorm1(self.dropout(self.mha(x, is_padding)) + x)
        return self.layernorm2(self.dropout(self.ffn(x)) + x)


class NotebookClassifier(nn.Module):
    """Token ids [B, S] -> one logit each, [B, 1]; padding is where `pad_token_id` stands."""

    def __init__(self, config: TextClassifierConfig) -> None:
        super().__init__()
        self.width, self.pad_token_id = config.d_model, cast(int, config.pad_token_id)
        self.embedding = nn.Embedding(config.vocab_size, self.width)
        positions = positional_encoding(config.max_length, self.width)
        self.pos_encoding = nn.Parameter(positions, requires_grad=False)
        sizes = (self.width, config.dff, config.n_heads, config.dropout_rate)
        self.layers = nn.ModuleList(Layer(*sizes) for _ in range(config.n_layers))
        self.classification = nn.Linear(self.width, 1)

    def forward(self, input_ids: Tensor) -> Tensor:
        is_padding = input_ids.eq(self.pad_token_id)[:, None, None]
        x = self.embedding(input_ids) * sqrt(self.width) + self.pos_encoding[:, : input_ids.shape[1]]
        for layer in self.layers:
            x = layer(x, is_padding)
        return self.classification(x[:, 0])


def like(source: Any) -> NotebookClassifier:
    """The notebook's model with the sizes and weights of a TextClassifier."""
    model = NotebookClassifier(source.config)
    model.load_state_dict(source.state_dict())
    return model


def accuracy(model: nn.Module, batches: Iterable[dict[str, Any]], device: torch.device) -> float:
    """The share of right answers, by a forward pass and a wait for its count a batch.

    The notebook calls it after each epoch, in eval mode under no_grad, and so must whoever calls it here.
    """
    right = seen = 0
    for batch in batches:
        input_ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)
        answers = (model(input_ids) > 0).long()[..., 0]
        seen += labels.shape[0]
        right += (answers == labels).sum().item()
    return right / seen
