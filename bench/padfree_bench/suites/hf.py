"""`python -m bench hf`: a transformers BERT, random weights, with each attention it knows."""

import argparse
import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from padfree_bench.measuring.cases import choose_dtypes
from padfree_bench.measuring.machine import pick_device
from padfree_bench.measuring.results import Result
from padfree_bench.peers import base
from padfree_bench.peers.base import Refused, needs
from padfree_bench.suites.encoder import check_padfree, choose_modes
from padfree_bench.suites.models import (
    EDGE,
    PAD,
    Batch,
    Built,
    ModelCase,
    ModelPeer,
    choose_model_peers,
    run_model_case,
)
from padfree_bench.suites.session import Session

SIZES = {
    "bert-tiny": ModelCase("bert-tiny", 128, 2, 512, 2, 8, 256, "fp32"),
    "bert-small": ModelCase("bert-small", 512, 8, 2048, 4, 8, 400, "fp32"),
    "bert-base": ModelCase("bert-base", 768, 12, 3072, 12, 64, 400, "bf16"),
}


def build(case: ModelCase, batch: Batch, dtype: torch.dtype, attention: str, compiled: bool = False) -> Built:
    from transformers import BertConfig, BertModel

    device = batch.input_ids.device
    if attention == "padfree":
        check_padfree(device, dtype)
    if attention == "flash_attention_2":
        needs("flash_attn")
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
    # The fp64 truth and every other precision start from weights rounded to the same bf16 grid.
    model = model.to(torch.bfloat16).to(device=device, dtype=dtype)
    call = base.compiled(model) if compiled else model
    keep = batch.attention_mask[..., None].to(dtype)

    def forward() -> Tensor:
        # Rows at padding differ between implementations, and nobody reads them.
        return call(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state * keep

    built = Built(model, forward, model.embeddings.word_embeddings.weight, f"attn_implementation={attention}")
    if attention == "padfree":
        _count_fused(built)
    return built


def make_edge_loud(embeddings: Any, gain: float = 4.0) -> None:
    """Tell PAD and EDGE from other tokens by column 0 alone and raise that column, so that a wrong mask shows in bf16.

    The LayerNorm after the embeddings would undo any scaling of the embeddings themselves.
    """
    with torch.no_grad():
        words = embeddings.word_embeddings.weight
        words[[PAD, EDGE]] = 0
        words[PAD, 0], words[EDGE, 0] = -gain, gain
        embeddings.LayerNorm.weight[0] = gain


def _count_fused(built: Built) -> None:
    """Refuse when the model did not really run the kernel in every layer."""
    from padfree.integrations.transformers import counts, reset_counts

    reset_counts()
    with torch.no_grad():
        built.forward()
    seen = counts()
    if seen.fallback or not seen.fused:
        raise Refused(f"padfree fell back in {seen.fallback} layers: {dict(seen.fallbacks)}")
    built.ran = f"padfree's Triton kernel in {seen.fused} layers"


def _peer(name: str, attention: str, note: str = "", compiled: bool = False) -> ModelPeer:
    builder = functools.partial(build, attention=attention, compiled=compiled)
    return ModelPeer(name, builder, note, slow_to_compile=compiled)


REFERENCE = _peer("eager", "eager", "transformers' own")
PEERS = [
    _peer("padfree", "padfree", "registered attention and mask function"),
    REFERENCE,
    _peer("sdpa", "sdpa", "transformers' default: a [B,1,S,S] boolean mask"),
    _peer("flash_attention_2", "flash_attention_2", "unpads in every layer"),
    _peer("compile-sdpa", "sdpa", "torch.compile", compiled=True),
]


def run(options: argparse.Namespace, command: list[str]) -> Result:
    """The hf suite: BERT-base on a GPU, smaller ones on a CPU."""
    device = pick_device()
    default = (
        "bert-base"
        if device.type == "cuda" and not options.quick
        else "bert-tiny"
        if options.quick
        else "bert-small"
    )
    names = (options.shapes or default).split(",")
    for name in names:
        if name not in SIZES:
            raise ValueError(f"shape must be one of {', '.join(SIZES)}, got {name!r}")
    dtypes = choose_dtypes(options.dtypes, "bf16" if device.type == "cuda" else "fp32")
    cases = [replace(SIZES[name], dtype=dtype) for dtype in dtypes for name in names]
    peers = choose_model_peers(PEERS, options.peers, device)
    modes = choose_modes(options.directions)
    session = Session("hf", options, command, set(dtypes))
    todo = (
        (case.id, lambda case=case: run_model_case(session, case, peers, REFERENCE, modes))  # type: ignore[misc]
        for case in cases
    )
    return session.run(todo, len(modes))
