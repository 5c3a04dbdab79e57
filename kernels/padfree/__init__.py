"""padfree: attention for padded batches that pays only for the real tokens.

`attention` takes a padded batch [B, H, S, D] with a `key_padding_mask` (True = padding), `attention_varlen`
and `attention_qkvpacked` take packed ones. On a GPU a fused Triton kernel computes them, forward and backward; on a
CPU the same calls run PyTorch's SDPA under the same contract, and `reference` where SDPA cannot compute them.
"""

from padfree._dispatch import why_not, why_not_device
from padfree.api import attention, attention_weights, key_spans
from padfree.packed import attention_qkvpacked, attention_varlen
from padfree.reference import reference, reference_varlen

__version__ = "0.1.0"

__all__ = [
    "attention",
    "attention_qkvpacked",
    "attention_varlen",
    "attention_weights",
    "key_spans",
    "reference",
    "reference_varlen",
    "why_not",
    "why_not_device",
]
