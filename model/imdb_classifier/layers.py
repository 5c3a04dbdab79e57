"""The notebook's layers, with their attention chosen by name.

B reviews, S tokens, E = d_model, H heads, D = E / H. Every attention implementation that transformers knows by
name runs here ("eager", "sdpa", "flex_attention", "padfree" once registered) through one switch, the model's
`attn_implementation`.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .packing import Packed


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


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU, where drawing is slow, from 16 random bits a number: a third of the time (NOTES.md).

    p is met to 2^-16 there, and what is kept is scaled by what was met.
    """

    def forward(self, x: Tensor) -> Tensor:
        dropped = round(self.p * 2**16)
        if not self.training or x.device.type != "cpu" or dropped in (0, 2**16):
            return super().forward(x)
        # A draw of 64 bits is four numbers.
        draws = -(-x.numel() // 4)
        bits = torch.randint(-(2**63), 2**63 - 1, (draws,), device=x.device).view(torch.int16)
        keep = bits[: x.numel()].view(x.shape) >= dropped - 2**15
        return torch.where(keep, x, 0) * (2**16 / (2**16 - dropped))


def linear_together(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """What each linear layer makes of x, by one matrix product where all of them are plain `nn.Linear`."""
    if not all(map(_is_plain, layers)):
        return tuple(layer(x) for layer in layers)
    linear = cast(tuple[nn.Linear, ...], layers)
    weight = torch.cat([layer.weight for layer in linear])
    bias = torch.cat([layer.bias for layer in linear])
    return F.linear(x, weight, bias).split([layer.out_features for layer in linear], dim=-1)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is its weight and bias alone: no adapter, no quantised weight, nothing hooked to its call."""
    if type(layer) is not nn.Linear or layer.bias is None or type(layer.weight) not in (nn.Parameter, Tensor):
        return False
    hooks = (
        layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks
    )
    # accelerate, for one, puts a forward of its own into a layer that it moves.
    return not hooks and "forward" not in layer.__dict__


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

        `attention_mask` has the form the implementation wants, as `create_bidirectional_mask` makes it. Where it is a
        `Packed`, x is [1,T,input_dim], reviews end to end, and out [1,T,E], or [1,B,E].
        """
        if first_row_only:
            query = self.wq(first_rows(x, attention_mask))
            key, value = linear_together(x, self.wk, self.wv)
        else:
            query, key, value = linear_together(x, self.wq, self.wk, self.wv)
        # Padded rows are hidden keys in every layer and the head reads row 0: nobody misses them.
        told: dict[str, Any] = {"skip_padded_queries": not first_row_only}
        if isinstance(attention_mask, Packed):
            key, value = attention_mask.keys(key), attention_mask.keys(value)
            told = attention_mask.arguments(first_row_only)
            attention_mask = None
        name = getattr(self.config, "_attn_implementation", None) or "eager"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        query, key, value = (self._split_heads(each) for each in (query, key, value))
        scaling = self.depth**-0.5
        out, _ = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=scaling, **told)
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
        self.dropout = Dropout(dropout_rate)
        self.shortcut = nn.Identity() if input_dim == d_model else nn.Linear(input_dim, d_model)

    def forward(self, x: Tensor, attention_mask: Any = None, *, first_row_only: bool = False) -> Tensor:
        """[B,S,input_dim] -> [B,S,E], or its row 0, [B,1,E]; packed [1,T,input_dim] -> [1,T,E], or [1,B,E]."""
        residual = self.shortcut(first_rows(x, attention_mask) if first_row_only else x)
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
        """[B,S,input_dim] -> [B,S,E]; with `first_row_only` the last layer computes row 0 alone, [B,1,E].

        Packed, [1,T,input_dim] -> [1,T,E] or [1,B,E].
        """
        *body, last = self
        for layer in body:
            x = layer(x, attention_mask)
        if first_row_only:
            attention_mask = _first_row(attention_mask)
        return last(x, attention_mask, first_row_only=first_row_only)


def first_rows(x: Tensor, attention_mask: Any) -> Tensor:
    """Row 0 of each review: [B,S,E] -> [B,1,E], packed [1,T,E] -> [1,B,E]."""
    return attention_mask.first_rows(x) if isinstance(attention_mask, Packed) else x[:, :1]


def _first_row(attention_mask: Any) -> Any:
    """The mask of query row 0, in the form the layers got: none, [B,N], [B,1,S,N], a BlockMask or a Packed."""
    if isinstance(attention_mask, BlockMask):
        batch, _, _, keys = attention_mask.shape
        device = attention_mask.kv_num_blocks.device
        return create_block_mask(attention_mask.mask_mod, batch, None, 1, keys, device=device)
    if attention_mask is None or isinstance(attention_mask, Packed) or attention_mask.ndim == 2:
        return attention_mask
    return attention_mask[:, :, :1]
