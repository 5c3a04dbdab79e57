"""The tensors of one case, in the padded and the packed form, and their exact answer in fp64."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from padfree_bench.cases import DTYPES, Case

# Scores of one chunk of the fp64 truth, in elements: 2 GiB a temporary on a GPU, 64 MiB on a CPU.
CHUNK_ELEMENTS = {"cuda": 2**28, "cpu": 2**23}


@dataclass
class Inputs:
    """query, key, value, d_out [B, H, S, D] as views of [B, S, H, D] memory, which is what a model hands over.

    `padding` [B, S] is True at padding; d_out is 0 there, since no loss reads a padded row, so that every
    peer has the same right gradients whether or not it computes those rows. Padded inputs hold finite noise.
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

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(DTYPES[case.dtype]).transpose(1, 2)

    query, key, value = draw(), draw(), draw()
    d_out = draw().masked_fill_(padding[:, None, :, None], 0)
    return Inputs(case, query, key, value, d_out, padding, lengths)


@dataclass
class Truth:
    """out, d_query, d_key, d_value [B, H, S, D] in fp64; only rows of real tokens mean something."""

    out: Tensor
    d_query: Tensor
    d_key: Tensor
    d_value: Tensor


def compute_truth(inputs: Inputs) -> Truth:
    """Attention and its gradients in fp64 on the rounded inputs, a few rows at a time so that any length fits.

    P = softmax(QKᵀ/sqrt(D)), O = PV, dS = P * (dO Vᵀ - rowsum(dO * O)), dQ = dS K, dK = dSᵀ Q, dV = Pᵀ dO.
    """
    query, key, value, d_out = (
        tensor.double() for tensor in (inputs.query, inputs.key, inputs.value, inputs.d_out)
    )
    scale = 1 / math.sqrt(query.shape[-1])
    truth = Truth(*(torch.zeros_like(query) for _ in range(4)))
    for batch, length in enumerate(inputs.case.sequence_lengths().tolist()):
        rows = max(1, CHUNK_ELEMENTS[inputs.device.type] // (query.shape[1] * length))
        keys, values = key[batch, :, :length], value[batch, :, :length]
        for start in range(0, length, rows):
            chunk = (batch, slice(None), slice(start, min(start + rows, length)))
            probs = torch.softmax(scale * (query[chunk] @ keys.mT), dim=-1)
            truth.out[chunk] = probs @ values
            delta = (d_out[chunk] * truth.out[chunk]).sum(-1, keepdim=True)
            d_scores = probs * (d_out[chunk] @ values.mT - delta)
            truth.d_query[chunk] = scale * (d_scores @ keys)
            truth.d_key[batch, :, :length] += scale * (d_scores.mT @ query[chunk])
            truth.d_value[batch, :, :length] += probs.mT @ d_out[chunk]
    return truth
