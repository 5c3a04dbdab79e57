"""The table of wrong calls: every entry point of the library, and what can be wrong with each of its arguments."""

from bad_calls.entry_points import ENTRY_POINTS, BadCall
from bad_calls.options import of_attention, of_attention_qkvpacked, of_attention_weights, options, sequences
from bad_calls.tensors import attn_masks, layouts, numbers, padding_masks, tensors

__all__ = ["BAD_CALLS", "ENTRY_POINTS", "BadCall"]

BAD_CALLS = [
    *tensors("attention"),
    *tensors("attention_varlen"),
    *options("attention"),
    *options("attention_varlen"),
    *options("attention_qkvpacked"),
    *padding_masks("attention"),
    *padding_masks("attention_qkvpacked"),
    *padding_masks("attention_weights"),
    *numbers("attention", "key_lengths", (2,)),
    *numbers("attention", "key_spans", (2, 3)),
    *numbers("attention_qkvpacked", "key_lengths", (2,)),
    *numbers("attention_weights", "key_lengths", (2,)),
    *attn_masks(),
    *sequences("attention_varlen", "cu_seqlens_q", "max_seqlen_q"),
    *sequences("attention_varlen", "cu_seqlens_k", "max_seqlen_k"),
    *sequences("attention_qkvpacked_varlen", "cu_seqlens", "max_seqlen"),
    *of_attention(),
    *of_attention_qkvpacked(),
    *of_attention_weights(),
    *(row for entry_point in ENTRY_POINTS for row in layouts(entry_point)),
]
