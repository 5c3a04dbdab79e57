"""Models that padfree cannot serve, or only in part: decoders, sinks, caps, masks with other readers. None may be wrong."""

from typing import Any

import pytest
import torch
import transformers as tf

from padfree.integrations import transformers as integration
from tiny_models import own_registration

TOLERANCE = 3e-6
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 60,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
CAUSAL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 4,
    "pad_token_id": 0,
}
SEQ2SEQ_MODELS = {
    "bart": lambda: tf.BartModel(tf.BartConfig(**SEQ2SEQ)),
    "nllb-moe": lambda: tf.NllbMoeModel(
        tf.NllbMoeConfig(**SEQ2SEQ, encoder_sparse_step=0, decoder_sparse_step=0)
    ),
    "pegasus-x": lambda: tf.PegasusXModel(tf.PegasusXConfig(**SEQ2SEQ, block_size=4, num_global_tokens=2)),
    "bigbird-pegasus": lambda: tf.BigBirdPegasusModel(
        tf.BigBirdPegasusConfig(**SEQ2SEQ, attention_type="original_full")
    ),
}
CAUSAL_MODELS = {
    "gemma2, capped scores": lambda: tf.Gemma2Model(tf.Gemma2Config(**CAUSAL)),
    "gpt-oss, sinks": lambda: tf.GptOssModel(
        tf.GptOssConfig(**CAUSAL, num_local_experts=2, num_experts_per_tok=1)
    ),
}

pytestmark = pytest.mark.filterwarnings("ignore:padfree falls back")


@pytest.fixture(autouse=True)
def by_reference():
    """The adapter with `padfree.reference` behind it: every decision of the adapter, no kernel needed."""
    with own_registration():
        integration.register(impl="reference")
        yield


def tokens(rows: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(5, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def make(build: Any, attention: str) -> Any:
    torch.manual_seed(0)
    model = build().eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter)
    model.set_attn_implementation(attention)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", SEQ2SEQ_MODELS)
def test_a_sequence_to_sequence_model_equals_its_eager_self_and_sees_no_future(name: str) -> None:
    ids, decoded = tokens(2, 8, 0), tokens(2, 6, 1)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0

    def run(model: Any, decoder_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False)[0]

    eager, padfree = (make(SEQ2SEQ_MODELS[name], attention) for attention in ("eager", "padfree"))
    assert (run(padfree, decoded, mask) - run(eager, decoded, mask)).abs().max() <= TOLERANCE
    last_changed = decoded.clone()
    last_changed[:, -1] = (last_changed[:, -1] + 7) % 45 + 5
    # without a mask transformers may leave causality to an argument of sdpa, which these layers do not pass on
    difference = run(padfree, decoded, None) - run(padfree, last_changed, None)
    assert torch.equal(difference[:, :-1], torch.zeros_like(difference[:, :-1])) and difference.any()


@torch.no_grad()
@pytest.mark.parametrize("name", CAUSAL_MODELS)
@pytest.mark.parametrize("padded", (False, True))
def test_what_sdpa_would_ignore_runs_the_models_own_eager_attention(name: str, padded: bool) -> None:
    ids = tokens(2, 10, 0)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0 if padded else 1
    outs = [
        make(CAUSAL_MODELS[name], attention)(input_ids=ids, attention_mask=mask)[0]
        for attention in ("eager", "padfree")
    ]
    assert ((outs[0] - outs[1]) * mask[..., None]).abs().max() <= TOLERANCE
    assert integration.counts().fallback


def test_a_layer_that_nothing_serves_says_so() -> None:
    layer = torch.nn.Module()
    layer.is_causal = False
    qkv = [torch.randn(1, 2, 4, 8) for _ in range(3)]
    with pytest.raises(RuntimeError, match="neither padfree nor sdpa can serve Module"):
        integration.attention_forward(layer, *qkv, None, softcap=5.0)


@torch.no_grad()
def test_a_mask_with_a_reader_of_its_own_stays_what_that_reader_expects() -> None:
    """Siglip2 hands the mask of its layers to an nn.MultiheadAttention as well."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    config = tf.Siglip2VisionConfig(**sizes, patch_size=4, num_patches=16)
    mask = torch.tensor([[1] * 16, [1] * 9 + [0] * 7])
    pixels = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(0))
    pooled = [
        make(lambda: tf.Siglip2VisionModel(config), attention)(
            pixel_values=pixels, pixel_attention_mask=mask, spatial_shapes=torch.tensor([[4, 4], [3, 3]])
        ).pooler_output
        for attention in ("eager", "padfree")
    ]
    assert (pooled[0] - pooled[1]).abs().max() <= TOLERANCE


@torch.no_grad()
def test_a_mask_that_the_model_indexes_has_the_dimensions_it_expects() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    features = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 40, dtype=torch.long).tril(30)
    outs = [
        make(lambda: tf.LasrEncoder(tf.LasrEncoderConfig(**sizes, num_mel_bins=16)), attention)(
            input_features=features, attention_mask=mask
        )[0]
        for attention in ("eager", "padfree")
    ]
    assert (outs[0] - outs[1]).abs().max() <= TOLERANCE


@torch.no_grad()
def test_a_decoder_computes_every_row_though_padded_queries_may_be_skipped() -> None:
    """As many target as source positions: the mask of the cross-attention is the encoder's, not that of the queries."""
    ids, decoded = tokens(2, 8, 0), tokens(2, 8, 1)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoded, "use_cache": False}
    expected = make(SEQ2SEQ_MODELS["bart"], "eager")(**batch)[0]
    actual = make(SEQ2SEQ_MODELS["bart"], "padfree")(**batch, skip_padded_queries=True)[0]
    assert (actual - expected).abs().max() <= TOLERANCE
