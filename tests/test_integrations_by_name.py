"""What a model gets by naming padfree: its own result always, and a word wherever padfree does not serve it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from padfree.integrations import _models
from padfree.integrations import transformers as integration
from tiny_models import SIZES, make_batch, make_config, make_model, max_error, own_registration

TOLERANCE = 3e-6
HEADS = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
TEXT: dict[str, Any] = {**HEADS, "vocab_size": 99, "max_position_embeddings": 64}
TROCR: dict[str, Any] = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 32,
}
# Classes with attention of their own, under configurations that transformers' list of models does not hold.
OWN_ATTENTION_UNLISTED = {
    "blip": (tf.BlipTextModel, lambda: tf.BlipTextConfig(**TEXT, encoder_hidden_size=32, pad_token_id=0)),
    "flava": (tf.FlavaTextModel, lambda: tf.FlavaTextConfig(**TEXT)),
    "groupvit": (tf.GroupViTTextModel, lambda: tf.GroupViTTextConfig(**TEXT, eos_token_id=98)),
    "clvp": (tf.ClvpModel, lambda: tf.ClvpDecoderConfig(**TEXT)),
    "trocr": (
        tf.TrOCRForCausalLM,
        lambda: tf.TrOCRConfig(**TROCR, vocab_size=99, max_position_embeddings=64),
    ),
}
# Models whose layers never look the name up.
NEVER_ASK = {
    "deberta": lambda: tf.DebertaConfig(**SIZES),
    "deberta-v2": lambda: make_config("deberta-v2"),
    "deberta-v3": lambda: tf.DebertaV2Config(**SIZES, relative_attention=True, position_buckets=8),
    "xlnet": lambda: tf.XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=48),
    "xlm": lambda: tf.XLMConfig(vocab_size=99, emb_dim=32, n_layers=2, n_heads=4),
    "flaubert": lambda: tf.FlaubertConfig(vocab_size=99, emb_dim=32, n_layers=2, n_heads=4),
    "fnet": lambda: tf.FNetConfig(**{k: v for k, v in TEXT.items() if k != "num_attention_heads"}),
    "wavlm": lambda: tf.WavLMConfig(**HEADS, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3)),
    "mpnet": lambda: make_config("mpnet"),
}
# Encoders that would fall back by what their classes claim: layers that do not say that they are not causal, no
# support of flash-attention or of sdpa.
SERVED_ALL_THE_SAME = {
    "layoutlm": (tf.LayoutLMModel, lambda: tf.LayoutLMConfig(**SIZES)),
    "markuplm": (tf.MarkupLMModel, lambda: tf.MarkupLMConfig(**SIZES)),
    "splinter": (tf.SplinterModel, lambda: tf.SplinterConfig(**SIZES)),
    "clap": (tf.ClapTextModel, lambda: tf.ClapTextConfig(**SIZES)),
    "bridgetower": (
        tf.models.bridgetower.modeling_bridgetower.BridgeTowerTextModel,
        lambda: tf.BridgeTowerTextConfig(**SIZES),
    ),
    "siglip2": (tf.Siglip2TextModel, lambda: tf.models.siglip2.Siglip2TextConfig(**SIZES)),
}

pytestmark = pytest.mark.filterwarnings("ignore:padfree falls back")


@pytest.fixture(autouse=True)
def by_reference():
    """The adapter with `padfree.reference` behind it: every decision of the adapter, no kernel needed."""
    with own_registration():
        integration.register(impl="reference")
        yield


def build(model_class: Any, config: Any, attention: str) -> Any:
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = model_class(config).eval()
    # Attention that is nearly uniform would hide a mask that is nearly right.
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and any(word in name for word in ("query", "key", "q_proj", "k_proj")):
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


@torch.no_grad()
@pytest.mark.parametrize("rows", (1, 2))
@pytest.mark.parametrize("name", OWN_ATTENTION_UNLISTED)
def test_attention_of_its_own_under_an_unlisted_configuration_equals_eager(name: str, rows: int) -> None:
    model_class, config = OWN_ATTENTION_UNLISTED[name]
    batch = make_batch(("none", "right")[:rows])
    expected = build(model_class, config(), "eager")(**batch)[0]
    actual = build(model_class, config(), "padfree")(**batch)[0]
    assert max_error(actual, expected, batch["attention_mask"]) <= TOLERANCE
    assert integration.counts().fallback and not integration.counts().reference


def test_a_configuration_of_no_known_model_gets_eagers_mask() -> None:
    class Unknown(tf.PreTrainedConfig):
        pass

    sizes = {"batch_size": 2, "q_length": 5, "kv_length": 5, "dtype": torch.float32}
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2], dtype=torch.bool)
    given = integration.attention_mask_for(attention_mask=mask, config=Unknown(), **sizes)
    assert given.shape == (2, 1, 5, 5) and given.is_floating_point()
    assert torch.equal(given[:, 0, 0] == 0, mask)
    assert integration.counts().fallbacks == {"Unknown's model computes its own attention": 1}


def test_a_configuration_derived_by_the_caller_is_read_as_its_parent() -> None:
    class Derived(tf.BertConfig):
        pass

    batch = make_batch()
    expected = build(tf.BertModel, Derived(**SIZES), "eager")(**batch)[0]
    actual = build(tf.BertModel, Derived(**SIZES), "padfree_strict")(**batch)[0]
    assert max_error(actual, expected, batch["attention_mask"]) <= TOLERANCE


@pytest.mark.parametrize("name", NEVER_ASK)
def test_strict_by_name_refuses_a_model_that_never_asks(name: str) -> None:
    with pytest.raises(ValueError, match="has no layer that takes its attention by name"):
        tf.AutoModel.from_config(NEVER_ASK[name](), attn_implementation="padfree_strict")
    model = tf.AutoModel.from_config(NEVER_ASK[name]())
    with pytest.raises(ValueError, match="has no layer that takes its attention by name"):
        model.set_attn_implementation("padfree_strict")


@pytest.mark.parametrize("name", NEVER_ASK)
def test_by_name_a_model_that_never_asks_is_counted_and_warned_about(name: str) -> None:
    with pytest.warns(UserWarning, match="has no layer that takes its attention by name"):
        tf.AutoModel.from_config(NEVER_ASK[name](), attn_implementation="padfree")
    assert integration.counts().fallback == 1
    integration.reset_counts()
    with pytest.warns(UserWarning, match="has no layer that takes its attention by name"):
        integration.enable(tf.AutoModel.from_config(NEVER_ASK[name]()))
    (reason,) = integration.counts().fallbacks
    assert "has no layer that takes its attention by name" in reason


def test_strict_by_name_holds_when_a_saved_model_is_loaded(tmp_path: Any) -> None:
    make_model("deberta-v2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="DebertaV2Model has no layer"):
        tf.AutoModel.from_pretrained(tmp_path, attn_implementation="padfree_strict")


def test_strict_looks_at_the_parts_of_a_model() -> None:
    vision = tf.ViTConfig(**HEADS, image_size=16, patch_size=8)
    both = tf.VisionTextDualEncoderConfig.from_vision_text_configs(vision, make_config("deberta-v2"))
    with pytest.raises(ValueError, match="DebertaV2Model has no layer"):
        tf.AutoModel.from_config(both, attn_implementation="padfree_strict")
    with pytest.raises(ValueError, match="DebertaV2Model has no layer"):
        tf.AutoModel.from_config(both).set_attn_implementation("padfree_strict")
    # A part without attention, which mixes no tokens, is nobody's loss.
    backbone = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    tf.AutoModel.from_config(backbone, attn_implementation="padfree_strict")


def test_models_are_watched_once_and_others_are_left_alone() -> None:
    post_init = tf.PreTrainedModel.post_init
    integration.register()
    assert tf.PreTrainedModel.post_init is post_init
    model = make_model("deberta-v2")
    model.set_attn_implementation("eager")
    assert not integration.counts().fallback and not model._forward_pre_hooks


@torch.no_grad()
@pytest.mark.parametrize("name", SERVED_ALL_THE_SAME)
def test_an_encoder_is_served_though_its_class_claims_too_little(name: str) -> None:
    model_class, config = SERVED_ALL_THE_SAME[name]
    for batch in (make_batch(), {"input_ids": make_batch()["input_ids"]}):
        # In fp64, so that a processor's own way to sum does not show; eager's softmax remains in fp32.
        expected = build(model_class, config(), "eager").double()(**batch)[0]
        actual = build(model_class, config(), "padfree_strict").double()(**batch)[0]
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        assert max_error(actual, expected, mask) <= TOLERANCE
    assert integration.counts().reference == 2 * SIZES["num_hidden_layers"]


def test_a_layer_that_says_nothing_and_gets_no_mask_stays_causal() -> None:
    """transformers' sdpa reads it so, and a decoder may rely on it."""
    query, key, value = (torch.randn(1, 2, 6, 8) for _ in range(3))
    out, _ = integration.attention_forward(torch.nn.Module(), query, key, value, None)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert (out - expected.transpose(1, 2)).abs().max() <= TOLERANCE
    assert integration.counts().fallbacks == {"the layer is causal": 1}
    decoder = torch.nn.Module()
    decoder.is_decoder = True
    with pytest.raises(RuntimeError, match="the layer is causal"):
        integration.attention_forward(decoder, query, key, value, torch.ones(1, 6), strict=True)


@pytest.mark.parametrize(
    ("shape", "reason"),
    (
        ((2, 1, 6, 6), r"the mask is written out as \[B, 1, M, N\]"),
        ((2, 5), "the mask has another batch size or length than the keys"),
        ((1, 6), "the mask has another batch size or length than the keys"),
        ((2, 6, 6), "the mask has 3 dimensions"),
    ),
)
def test_a_mask_that_is_not_served_is_told_by_its_cause(shape: tuple[int, ...], reason: str) -> None:
    layer = torch.nn.Module()
    layer.is_causal = False
    qkv = [torch.randn(2, 2, 6, 8) for _ in range(3)]
    with pytest.raises(RuntimeError, match=reason):
        integration.attention_forward(layer, *qkv, torch.ones(shape, dtype=torch.bool), strict=True)


@pytest.mark.parametrize("kind", ("bool", "added"))
def test_a_mask_with_one_row_for_all_queries_is_served(kind: str) -> None:
    layer = torch.nn.Module()
    layer.is_causal = False
    query, key, value = (torch.randn(2, 2, 6, 8) for _ in range(3))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2], dtype=torch.bool)[:, None, None]
    if kind == "added":
        mask = torch.randn(2, 1, 1, 6).masked_fill(~mask, -10000.0)
    out, _ = integration.attention_forward(layer, query, key, value, mask, impl="reference", strict=True)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    assert (out - expected.transpose(1, 2)).abs().max() <= TOLERANCE


def test_an_argument_that_is_not_known_falls_back_and_strict_refuses_it() -> None:
    batch = make_batch()
    expected = make_model("bert")(**batch).last_hidden_state
    actual = make_model("bert", "padfree")(**batch, temperature=2.0).last_hidden_state
    assert max_error(actual, expected, batch["attention_mask"]) <= TOLERANCE
    assert integration.counts().fallbacks == {"temperature was given": 3}
    with pytest.raises(RuntimeError, match="temperature was given"):
        make_model("bert", "padfree_strict")(**batch, temperature=2.0)
    harmless = {"num_items_in_batch": torch.tensor(4), "output_hidden_states": True, "temperature": None}
    make_model("bert", "padfree_strict")(**batch, **harmless)


class SinkAttention(torch.nn.Module):
    """A layer of a model whose eager attention, below, knows an argument that no sdpa does."""

    is_causal = False


def eager_attention_forward(
    module, query, key, value, attention_mask, position_bias=None, sinks=None, **kwargs
):
    return query + sinks + position_bias, None


def test_what_only_the_models_own_eager_reads_runs_there() -> None:
    qkv = [torch.randn(1, 2, 4, 8) for _ in range(3)]
    out, _ = integration.attention_forward(
        SinkAttention(), *qkv, None, sinks=torch.tensor(1.0), position_bias=torch.tensor(2.0)
    )
    assert (out - qkv[0] - 3).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", _models.CHOSEN_KEYS)
def test_keys_chosen_by_a_sparse_layer_are_never_ignored(name: str) -> None:
    layer = torch.nn.Module()
    layer.is_causal = True
    qkv = [torch.randn(1, 2, 4, 8) for _ in range(3)]
    with pytest.raises(RuntimeError, match="hides keys in a way only its model's eager and sdpa honour"):
        integration.attention_forward(layer, *qkv, None, **{name: torch.zeros(1, 4, 2)})


def test_enable_names_the_model_inside_another_librarys() -> None:
    class Transformer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.auto_model = make_model("bert")

    class SentenceTransformer(torch.nn.Sequential):
        pass

    with pytest.raises(
        TypeError, match=r"got SentenceTransformer; pass the BertModel inside, model\[0\]\.auto_model$"
    ):
        integration.enable(SentenceTransformer(Transformer(), torch.nn.Identity()))


def test_without_transformers_the_import_says_what_to_install() -> None:
    kernels = Path(integration.__file__).parents[2]
    code = f"import sys; sys.path.insert(0, {str(kernels)!r}); sys.modules['transformers'] = None; "
    code += "import padfree.integrations.transformers"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode
    last = result.stderr.strip().splitlines()[-1]
    assert last == (
        "ModuleNotFoundError: padfree.integrations.transformers needs transformers: "
        "pip install 'transformers>=5.17,<6'"
    )
