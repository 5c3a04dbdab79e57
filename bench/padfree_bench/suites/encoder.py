"""`python -m bench encoder`: the whole classifier, inference and a training pass, same weights everywhere."""

import argparse
import functools
from dataclasses import replace

import torch
from torch import Tensor, nn

from imdb_classifier.modeling import TextClassifier, TextClassifierConfig, TransformerLayer
from padfree_bench.measuring.cases import choose_dtypes
from padfree_bench.measuring.machine import pick_device
from padfree_bench.measuring.results import Result
from padfree_bench.peers.base import compiled
from padfree_bench.peers.padfree_peers import check_kernel
from padfree_bench.suites.models import (
    PAD,
    Batch,
    Built,
    ModelCase,
    ModelPeer,
    choose_model_peers,
    make_edge_loud,
    run_model_case,
)
from padfree_bench.suites.session import Session

SIZES = {
    "notebook": ModelCase("notebook", 32, 4, 32, 2, 64, 400, "fp32"),
    "d128": ModelCase("d128", 128, 8, 256, 2, 64, 400, "fp32"),
    "d768": ModelCase("d768", 768, 12, 3072, 2, 64, 400, "fp32"),
}


def make_classifier(
    case: ModelCase, attention: str, cls_only: bool, dtype: torch.dtype, device: torch.device
) -> TextClassifier:
    """The classifier with the same random weights for every attention; no dropout, so that answers compare."""
    config = TextClassifierConfig(
        d_model=case.width,
        n_heads=case.heads,
        dff=case.ffn,
        n_layers=case.layers,
        max_length=case.seq,
        dropout_rate=0.0,
        cls_only_last_layer=cls_only,
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    # The fp64 truth and every other precision start from weights rounded to the same bf16 grid.
    model = TextClassifier(config)
    make_edge_loud(model.embedding.weight)
    # transformers' wrapper hides nn.Module.to
    nn.Module.to(nn.Module.to(model, torch.bfloat16), device=device, dtype=dtype)
    return model


def check_padfree(device: torch.device, dtype: torch.dtype) -> None:
    """Make "padfree" known to transformers, or refuse with the reason."""
    check_kernel(torch.empty(0, dtype=dtype, device=device))
    from padfree.integrations.transformers import register

    register()


def build(
    case: ModelCase,
    batch: Batch,
    dtype: torch.dtype,
    attention: str,
    cls_only: bool,
    compile_mode: str | None = None,
) -> Built:
    device = batch.input_ids.device
    if attention == "padfree":
        check_padfree(device, dtype)
    model = make_classifier(case, attention, cls_only, dtype, device)
    call = compiled(model, mode=compile_mode) if compile_mode else model

    def forward() -> Tensor:
        return call(batch.input_ids, batch.attention_mask).logits[:, 1]

    ran = f"attn_implementation={attention}, {'last layer for row 0 only' if cls_only else 'every row'}"
    return Built(model, forward, model.embedding.weight, ran, capture=compile_mode != "reduce-overhead")


class TorchEncoder(nn.Module):
    """The classifier on nn.TransformerEncoder, with the weights of a TextClassifier."""

    def __init__(self, source: TextClassifier, case: ModelCase) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(case.width, case.heads, case.ffn, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, case.layers)
        self.source = source
        for target, layer_from in zip(self.encoder.layers, source.layers, strict=True):
            assert isinstance(layer_from, TransformerLayer)
            mha = layer_from.mha
            state = {
                "self_attn.in_proj_weight": torch.cat([mha.wq.weight, mha.wk.weight, mha.wv.weight]),
                "self_attn.in_proj_bias": torch.cat([mha.wq.bias, mha.wk.bias, mha.wv.bias]),
                "self_attn.out_proj.weight": mha.dense.weight,
                "self_attn.out_proj.bias": mha.dense.bias,
            }
            for name, part in (
                ("linear1", layer_from.ffn[0]),
                ("linear2", layer_from.ffn[2]),
                ("norm1", layer_from.layernorm1),
                ("norm2", layer_from.layernorm2),
            ):
                state |= {f"{name}.{key}": tensor for key, tensor in part.state_dict().items()}
            target.load_state_dict(state)
        self.to(source.embedding.weight.device, source.embedding.weight.dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        source = self.source
        width = source.embedding.weight.shape[1]
        x = source.embedding(input_ids) * width**0.5 + source.pos_encoding[:, : input_ids.shape[1]]
        x = self.encoder(x, src_key_padding_mask=input_ids == PAD)
        return source.classification(x[:, 0])[:, 0] / 2


def build_torch_encoder(case: ModelCase, batch: Batch, dtype: torch.dtype) -> Built:
    source = make_classifier(case, "eager", False, dtype, batch.input_ids.device)
    model = TorchEncoder(source, case)
    return Built(model, lambda: model(batch.input_ids), source.embedding.weight, "nn.TransformerEncoder")


def _peer(name: str, attention: str, cls_only: bool, note: str, compile_mode: str | None = None) -> ModelPeer:
    builder = functools.partial(build, attention=attention, cls_only=cls_only, compile_mode=compile_mode)
    return ModelPeer(name, builder, note, slow_to_compile=compile_mode is not None)


REFERENCE = _peer("eager", "eager", False, "the notebook's encoder")
PEERS = [
    _peer("padfree", "padfree", True, "fused attention, last layer for row 0 only"),
    _peer("padfree-all-rows", "padfree", False, "fused attention, every row of every layer"),
    REFERENCE,
    _peer("eager-cls", "eager", True, "last layer for row 0 only"),
    _peer("sdpa", "sdpa", False, "every row of every layer"),
    _peer("sdpa-cls", "sdpa", True, "last layer for row 0 only"),
    ModelPeer(
        "nn.TransformerEncoder", build_torch_encoder, "its fast path in inference where torch takes it"
    ),
    _peer("compile-eager", "eager", False, "torch.compile", "default"),
    _peer("compile-sdpa", "sdpa", False, "torch.compile", "default"),
    _peer("compile-sdpa-graphs", "sdpa", False, "torch.compile, reduce-overhead", "reduce-overhead"),
]


def choose_cases(options: argparse.Namespace, device: torch.device) -> list[ModelCase]:
    """--shapes names sizes (notebook, d128, d768); ValueError for another name."""
    names = options.shapes.split(",") if options.shapes else (["notebook"] if options.quick else list(SIZES))
    for name in names:
        if name not in SIZES:
            raise ValueError(f"shape must be one of {', '.join(SIZES)}, got {name!r}")
    default = "bf16,fp32" if device.type == "cuda" else "fp32"
    batch = 64 if device.type == "cuda" else (8 if options.quick else 16)
    return [
        replace(SIZES[name], dtype=dtype, batch=batch)
        for dtype in choose_dtypes(options.dtypes, default)
        for name in names
    ]


def choose_modes(directions: str | None) -> list[str]:
    """inference for forward, training for both; the backward alone is not timed."""
    from padfree_bench.suites.attention import choose_directions

    if directions and "backward" in directions.split(","):
        raise ValueError(
            "direction must be forward (inference) or both (training) of a model, got 'backward'"
        )
    chosen = choose_directions(directions)
    return [mode for mode, wanted in (("inference", "forward"), ("training", "both")) if wanted in chosen]


def run(options: argparse.Namespace, command: list[str]) -> Result:
    """The encoder suite."""
    device = pick_device()
    cases = choose_cases(options, device)
    peers = choose_model_peers(PEERS, options.peers, device)
    modes = choose_modes(options.directions)
    session = Session("encoder", options, command, {case.dtype for case in cases})
    todo = (
        (case.id, lambda case=case: run_model_case(session, case, peers, REFERENCE, modes))  # type: ignore[misc]
        for case in cases
    )
    return session.run(todo, len(modes))
