"""`python -m bench encoder`: the whole classifier, inference and a training pass, same weights everywhere."""

import functools
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from imdb_classifier.data.batches import Collator, Drawn
from imdb_classifier.modeling import TextClassifier, TextClassifierConfig
from padfree_bench.measuring.cases import choose_dtypes
from padfree_bench.measuring.results import Result
from padfree_bench.suites.models import EDGE, PAD, Batch, ModelCase, ModelPeer, choose_models, run_models
from padfree_bench.suites.notebook_model import NotebookClassifier, like

SIZES = {
    "notebook": ModelCase(64, 4, 8, 400, "fp32", "imdb", "notebook", ffn=32, layers=2),
    "d128": ModelCase(64, 8, 16, 400, "fp32", "imdb", "d128", ffn=256, layers=2),
    "d768": ModelCase(64, 12, 64, 400, "fp32", "imdb", "d768", ffn=3072, layers=2),
}
# The parts of nn.TransformerEncoderLayer, and which of ours holds the same weights.
PARTS = {"self_attn.out_proj": "mha.dense", "linear1": "ffn.0", "linear2": "ffn.2"}
PARTS |= {"norm1": "layernorm1", "norm2": "layernorm2"}
QKV = ("wq", "wk", "wv")
PACKED = "attn_implementation=padfree, last layer for row 0 only"


def make_edge_loud(embedding: Tensor, loudness: float = 8.0) -> None:
    """Scale embeddings [V, E] of variance 1 that the model multiplies by sqrt(E), so that a wrong mask shows in bf16.

    Left alone they drive softmax to one key and the gradients' rounding to 70 %, in which any error would hide; then
    the tokens on both sides of the mask's edge are raised, so that one key too many or too few changes every row.
    """
    with torch.no_grad():
        embedding *= embedding.shape[1] ** -0.5
        embedding[[PAD, EDGE]] *= loudness


def draw(
    case: ModelCase, attention: str, cls_only: bool = False, dropout_rate: float = 0.0, **more: Any
) -> TextClassifier:
    """The classifier in fp32; no dropout unless it is asked for, so that answers compare. `more` is for its config."""
    config = TextClassifierConfig(
        d_model=case.width,
        n_heads=case.heads,
        dff=case.ffn,
        n_layers=case.layers,
        max_length=case.seq,
        dropout_rate=dropout_rate,
        cls_only_last_layer=cls_only,
        **more,
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = TextClassifier(config)
    make_edge_loud(model.embedding.weight)
    return model


def on_batch(model: Any, batch: Batch, dtype: torch.dtype) -> tuple[Callable[[], Tensor], str]:
    config = model.config
    rows = "last layer for row 0 only" if config.cls_only_last_layer else "every row"
    ran = f"attn_implementation={config._attn_implementation}, {rows}"
    return lambda: model(batch.input_ids, batch.attention_mask).logits[:, 1], ran


def packed_on_batch(
    model: Any, batch: Batch, dtype: torch.dtype, pack: bool
) -> tuple[Callable[[], Tensor], str]:
    """On the same reviews end to end: packed by the model in each call, or by the collator before the first."""
    if pack:
        return lambda: model(batch.input_ids, batch.attention_mask).logits[
            :, 1
        ], f"{PACKED}, packed by the model"
    keep, device = batch.attention_mask.bool().cpu(), batch.input_ids.device
    drawn = Drawn(batch.input_ids.cpu()[keep], keep.sum(1), batch.labels.cpu(), torch.arange(len(keep)))
    collate = Collator(PAD, batch.input_ids.shape[1], packed=True)
    inputs = {name: value for name, value in collate(drawn).items() if name not in ("labels", "rows")}
    inputs = send_to_device(inputs, device)
    return lambda: model(**inputs).logits[:, 1], f"{PACKED}, packed by the collator"


def draw_notebook(case: ModelCase, attention: str) -> NotebookClassifier:
    return like(draw(case, attention))


def notebook_on_batch(model: Any, batch: Batch, dtype: torch.dtype) -> tuple[Callable[[], Tensor], str]:
    return lambda: model(batch.input_ids)[:, 0] / 2, "the notebook's, every row"


class TorchEncoder(nn.Module):
    """The classifier on nn.TransformerEncoder, with the weights of a TextClassifier: token ids [B, S] -> z [B]."""

    pos_encoding: Tensor

    def __init__(self, case: ModelCase, attention: str, dropout_rate: float = 0.0) -> None:
        super().__init__()
        source = draw(case, attention)
        self.embedding = source.embedding
        self.register_buffer("pos_encoding", source.pos_encoding)
        layer = nn.TransformerEncoderLayer(
            case.width, case.heads, case.ffn, dropout=dropout_rate, batch_first=True
        )
        # The notebook drops on the two residual branches alone.
        layer.self_attn.dropout = layer.dropout.p = 0.0
        self.encoder = nn.TransformerEncoder(layer, case.layers)
        for target, part in zip(self.encoder.layers, source.layers, strict=True):
            found, state = part.state_dict(), dict[str, Tensor]()
            for kind in ("weight", "bias"):
                state |= {f"{theirs}.{kind}": found[f"{ours}.{kind}"] for theirs, ours in PARTS.items()}
                state[f"self_attn.in_proj_{kind}"] = torch.cat([found[f"mha.{name}.{kind}"] for name in QKV])
            target.load_state_dict(state)
        self.classification = source.classification

    def forward(self, input_ids: Tensor) -> Tensor:
        width = self.embedding.weight.shape[1]
        x = self.embedding(input_ids) * width**0.5 + self.pos_encoding[:, : input_ids.shape[1]]
        x = self.encoder(x, src_key_padding_mask=input_ids == PAD)
        return self.classification(x[:, 0])[:, 0]


def in_our_names(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """What belongs to the parameters of a TorchEncoder, by the names that a TextClassifier has for them."""
    named: dict[str, Tensor] = {}
    for name, value in values.items():
        name = name.removeprefix("encoder.")
        for theirs, ours in PARTS.items():
            name = name.replace(f".{theirs}.", f".{ours}.")
        layer, in_proj, kind = name.partition(".self_attn.in_proj_")
        names = [f"{layer}.mha.{part}.{kind}" for part in QKV] if in_proj else [name]
        named |= zip(names, value.chunk(len(names)), strict=True)
    return named


def torch_on_batch(model: Any, batch: Batch, dtype: torch.dtype) -> tuple[Callable[[], Tensor], str]:
    return lambda: model(batch.input_ids) / 2, "nn.TransformerEncoder"


every_row = functools.partial(ModelPeer, draw=draw, on_batch=on_batch)
row_0 = functools.partial(ModelPeer, draw=functools.partial(draw, cls_only=True), on_batch=on_batch)
packed = functools.partial(ModelPeer, draw=functools.partial(draw, cls_only=True, layout="packed"))
FAST_PATH = "aten::_transformer_encoder_layer_fwd"
TORCH_NOTE = "its fast path in inference where torch takes it"
PEERS = [
    row_0("padfree", "padfree", "fused attention, last layer for row 0 only"),
    every_row("padfree-all-rows", "padfree", "fused attention, every row of every layer"),
    packed(
        "padfree-packed",
        "padfree",
        "no padding in any layer, packed before the clock starts",
        on_batch=functools.partial(packed_on_batch, pack=False),
    ),
    packed(
        "padfree-packed+pack",
        "padfree",
        "no padding in any layer, packing inside the time",
        on_batch=functools.partial(packed_on_batch, pack=True),
    ),
    ModelPeer("notebook", "eager", "the notebook's own arithmetic", draw_notebook, notebook_on_batch),
    every_row("eager", "eager", "our model, eager attention"),
    row_0("eager-cls", "eager", "last layer for row 0 only"),
    every_row("sdpa", "sdpa", "every row of every layer"),
    row_0("sdpa-cls", "sdpa", "last layer for row 0 only"),
    ModelPeer(
        "nn.TransformerEncoder", "eager", TORCH_NOTE, TorchEncoder, torch_on_batch, fast_path=FAST_PATH
    ),
    every_row("compile-eager", "eager", "torch.compile", compile_mode="default"),
    every_row("compile-sdpa", "sdpa", "torch.compile", compile_mode="default"),
    every_row(
        "compile-sdpa-graphs", "sdpa", "torch.compile, reduce-overhead", compile_mode="reduce-overhead"
    ),
]


def run(options: Namespace, command: list[str]) -> Result:
    """The encoder suite: --shapes names sizes (notebook, d128, d768)."""
    gpu = torch.cuda.is_available()
    names = options.shapes or ("notebook" if options.quick else None)
    batch = 64 if gpu else 8 if options.quick else 16
    dtypes = choose_dtypes(options.dtypes, "bf16,fp32" if gpu else "fp32")
    cases = [replace(case, batch=batch) for case in choose_models(SIZES, names, dtypes)]
    return run_models("encoder", options, command, cases, PEERS)
