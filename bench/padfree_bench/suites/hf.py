"""`python -m bench hf`: a transformers BERT, random weights, with each attention it knows."""

import functools
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from padfree_bench.measuring.cases import choose_dtypes
from padfree_bench.measuring.results import Result
from padfree_bench.peers import Refused
from padfree_bench.suites.models import EDGE, PAD, Batch, ModelCase, ModelPeer, choose_models, run_models

SIZES = {
    "bert-tiny": ModelCase(8, 2, 64, 256, "fp32", "imdb", "bert-tiny", ffn=512, layers=2),
    "bert-small": ModelCase(8, 8, 64, 400, "fp32", "imdb", "bert-small", ffn=2048, layers=4),
    "bert-base": ModelCase(64, 12, 64, 400, "bf16", "imdb", "bert-base", ffn=3072, layers=12),
}


def draw(case: ModelCase, attention: str) -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=case.width,
        num_attention_heads=case.heads,
        intermediate_size=case.ffn,
        num_hidden_layers=case.layers,
        max_position_embeddings=max(512, case.seq),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=PAD,
        # With transformers' 0.02 attention hardly moves the output, and no mask could be checked by it.
        initializer_range=case.width**-0.5,
    )
    torch.manual_seed(0)
    model = BertModel._from_config(config, attn_implementation=attention, add_pooling_layer=False)
    make_edge_loud(model.embeddings)
    return model


def make_edge_loud(embeddings: Any, gain: float = 4.0) -> None:
    """Tell PAD and EDGE from other tokens by column 0 alone and raise that column, so that a wrong mask shows in bf16.

    The LayerNorm after the embeddings would undo any scaling of the embeddings themselves.
    """
    with torch.no_grad():
        words = embeddings.word_embeddings.weight
        words[[PAD, EDGE]] = 0
        words[PAD, 0], words[EDGE, 0] = -gain, gain
        embeddings.LayerNorm.weight[0] = gain


def on_batch(model: Any, batch: Batch, dtype: torch.dtype) -> tuple[Callable[[], Tensor], str]:
    keep = batch.attention_mask[..., None].to(dtype)

    def forward() -> Tensor:
        # Rows at padding differ between implementations, and nobody reads them.
        return model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state * keep

    attention = model.config._attn_implementation
    return forward, count_fused(forward) if attention == "padfree" else f"attn_implementation={attention}"


def count_fused(forward: Callable[[], Tensor]) -> str:
    """What ran; refuses when the model did not really run the kernel in every layer."""
    from padfree.integrations.transformers import counts, reset_counts

    reset_counts()
    with torch.no_grad():
        forward()
    seen = counts()
    if seen.fallback or not seen.fused:
        raise Refused(f"padfree fell back in {seen.fallback} layers: {dict(seen.fallbacks)}")
    return f"padfree's Triton kernel in {seen.fused} layers"


bert = functools.partial(ModelPeer, draw=draw, on_batch=on_batch)
PEERS = [
    bert("padfree", "padfree", "registered attention and mask function"),
    bert("eager", "eager", "transformers' own"),
    bert("sdpa", "sdpa", "transformers' default: a [B,1,S,S] boolean mask"),
    bert("flash_attention_2", "flash_attention_2", "unpads in every layer"),
    bert("compile-sdpa", "sdpa", "torch.compile", compile_mode="default"),
]


def run(options: Namespace, command: list[str]) -> Result:
    """The hf suite: BERT-base on a GPU, smaller ones on a CPU."""
    gpu = torch.cuda.is_available()
    names = options.shapes or ("bert-tiny" if options.quick else "bert-base" if gpu else "bert-small")
    cases = choose_models(SIZES, names, choose_dtypes(options.dtypes, "bf16" if gpu else "fp32"))
    return run_models("hf", options, command, cases, PEERS)
