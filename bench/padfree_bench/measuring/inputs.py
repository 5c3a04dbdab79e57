"""The tensors of one case, in the padded and the packed form, and their exact answer in fp64."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from padfree_bench.measuring.cases import DTYPES, Case

# Scores of one chunk of the fp64 truth, in elements: 2 GiB a temporary on a GPU, 64 MiB on a CPU.
CHUNK_ELEMENTS = {"cuda": 2**28, "cpu": 2**23}


@dataclass
class Inputs:
    """query, key, value, d_out [B, H, S, D] as views of [B, S, H, D] memory, which is what a model hands over.

    `padding` [B, S] is True at padding; d_out is 0 there, since no loss reads a padded row, so that every
    peer has the same right gradients whether or not it computes those rows. Padded inputs hold finite noise.
    The values on both sides of the mask's edge are so large that one key too many or too few there shows at any
    length, where rounding would hide it among thousands.
    """

    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    d_out: Tensor
    padding: Tensor
    lengths: Tensor

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def keep(self) -> Tensor:
        """[B, S] bool, True at real tokens."""
        return ~self.padding

    @property
    def tokens(self) -> int:
        return int(self.case.sequence_lengths().sum())

    @property
    def pairs(self) -> int:
        """Visible (query, key) pairs of one head: the useful part of the score matrices."""
        return int((self.case.sequence_lengths() ** 2).sum())

    def cu_seqlens(self) -> Tensor:
        """[B + 1] int32 offsets of the packed sequences."""
        ends = torch.cumsum(self.lengths, 0, dtype=torch.int32)
        return torch.nn.functional.pad(ends, (1, 0))

    def pack(self, padded: Tensor) -> Tensor:
        """[B, H, S, D] -> [T, H, D] with the padded rows left out."""
        return padded.transpose(1, 2)[self.keep]

    def unpack(self, packed: Tensor) -> Tensor:
        """[T, H, D] -> [B, H, S, D] with zeros at padding."""
        batch, seq = self.padding.shape
        padded = packed.new_zeros(batch, seq, *packed.shape[1:])
        padded[self.keep] = packed
        return padded.transpose(1, 2)


def make_inputs(case: Case, device: torch.device | str, seed: int = 0) -> Inputs:
    """Draw the tensors of a case, the same for the same seed and device."""
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    lengths = torch.as_tensor(case.sequence_lengths(), device=device)
    padding = torch.arange(case.seq, device=device) >= lengths[:, None]
    shape = (case.batch, case.seq, case.heads, case.head_dim)

    def draw(factor: Tensor | float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=device) * factor
        return drawn.to(DTYPES[case.dtype]).transpose(1, 2)

    query, key, value = draw(), draw(), draw(_loudness(padding, lengths))
    d_out = draw().masked_fill_(padding[:, None, :, None], 0)
    return Inputs(case, query, key, value, d_out, padding, lengths)


def _loudness(padding: Tensor, lengths: Tensor) -> Tensor:
    """[B, S, 1, 1] factors: a mean over n values is 1/sqrt(n) large, and sqrt(n)/4 times 1/n is a quarter of that."""
    loud = (lengths.float().sqrt() / 4).clamp_min(1)[:, None]
    last = torch.arange(padding.shape[1], device=padding.device) == lengths[:, None] - 1
    return torch.where(padding | last, loud, 1.0)[..., None, None]


@dataclass
class Answer:
    """out, d_query, d_key, d_value [B, H, S, D]; only rows of real tokens mean something."""

    out: Tensor
    d_query: Tensor
    d_key: Tensor
    d_value: Tensor


def plain_attention(inputs: Inputs, dtype: torch.dtype) -> Answer:
    """Attention and its gradients in `dtype` on the rounded inputs, a few rows at a time so that any length fits.

    P = softmax(QKᵀ/sqrt(D)), O = PV, dS = P * (dO Vᵀ - rowsum(dO * O)), dQ = dS K, dK = dSᵀ Q, dV = Pᵀ dO.
    """
    given = (inputs.query, inputs.key, inputs.value, inputs.d_out)
    query, key, value, d_out = (tensor.to(dtype) for tensor in given)
    scale = 1 / math.sqrt(query.shape[-1])
    # Sums over the chunks in fp32 at least: a tensor core has it so within one product.
    sums = torch.promote_types(dtype, torch.float32)
    answer = Answer(*(torch.zeros_like(query, dtype=sums) for _ in range(4)))
    for batch, length in enumerate(inputs.case.sequence_lengths().tolist()):
        rows = max(1, CHUNK_ELEMENTS[inputs.device.type] // (query.shape[1] * length))
        keys, values = key[batch, :, :length], value[batch, :, :length]
        for start in range(0, length, rows):
            chunk = (batch, slice(None), slice(start, min(start + rows, length)))
            probs = torch.softmax(scale * (query[chunk] @ keys.mT), dim=-1)
            out = probs @ values
            answer.out[chunk] = out
            delta = (d_out[chunk] * out).sum(-1, keepdim=True)
            d_scores = probs * (d_out[chunk] @ values.mT - delta)
            answer.d_query[chunk] = scale * (d_scores @ keys)
            answer.d_key[batch, :, :length] += scale * (d_scores.mT @ query[chunk])
            answer.d_value[batch, :, :length] += probs.mT @ d_out[chunk]
    return answer
