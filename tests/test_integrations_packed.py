"""Sequences packed in one row, as transformers' flattening collator makes them: none may see another, on any variant."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartModel,
    DataCollatorWithFlattening,
    MobileBertConfig,
    MobileBertModel,
    SiglipTextConfig,
    SiglipTextModel,
)

from padfree.integrations import transformers as integration
from tiny_models import SIZES, make_model, own_registration

# Outputs are of size 1 and this is about 25 roundings of fp32; a sequence that sees its neighbour errs by 0.1 and more.
TOLERANCE = 3e-6
LENGTHS = (5, 1, 9, 3)
# Position ids start there: RoBERTa counts from its padding id plus one.
SERVED = {"bert": 0, "distilbert": 0, "roberta": 1, "modernbert": 0, "eurobert": 0}

BART = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}

pytestmark = pytest.mark.filterwarnings("ignore:padfree falls back")


@pytest.fixture(autouse=True)
def by_reference():
    """The adapter with `padfree.reference` behind it: every decision of the adapter, no kernel needed."""
    with own_registration():
        integration.register(impl="reference")
        yield


def make_sequences():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 99, (length,), generator=generator) for length in LENGTHS]


def make_packed(sequences, start=0):
    collate = DataCollatorWithFlattening(
        return_tensors="pt", return_flash_attn_kwargs=True, return_seq_idx=True
    )
    batch = collate([{"input_ids": sequence} for sequence in sequences])
    del batch["labels"]
    return batch | {"position_ids": batch["position_ids"] + start}


def one_by_one(model, sequences):
    """[1, T, E]: what the model says of every sequence alone."""
    return torch.cat([model(sequence[None]).last_hidden_state for sequence in sequences], dim=1)


@pytest.mark.parametrize("family", SERVED)
def test_packed_sequences_give_what_each_gives_alone(family):
    sequences = make_sequences()
    model = make_model(family, "padfree_strict")
    actual = model(**make_packed(sequences, SERVED[family])).last_hidden_state
    assert integration.counts().reference == model.config.num_hidden_layers
    assert (actual - one_by_one(make_model(family), sequences)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", SERVED)
def test_gradients_of_packed_sequences_are_those_of_each_alone(family):
    sequences = make_sequences()
    weight = torch.randn(1, sum(LENGTHS), 32, generator=torch.Generator().manual_seed(4))

    def gradients(model, hidden):
        (hidden * weight).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    model, eager = make_model(family, "padfree_strict"), make_model(family)
    packed = model(**make_packed(sequences, SERVED[family])).last_hidden_state
    actual, expected = gradients(model, packed), gradients(eager, one_by_one(eager, sequences))
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm()
        # A key bias shifts a whole softmax row: its true gradient is 0 and what stands there is rounding.
        assert error <= 1e-5 * gradient.norm() + 1e-4, name


@pytest.mark.parametrize("family", ("bert", "modernbert"))
def test_the_kernel_serves_packed_sequences_and_is_counted(family):
    integration.register()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sequences = [sequence.to(device) for sequence in make_sequences()]
    model = make_model(family, "padfree_strict").to(device)
    batch = make_packed([sequence.cpu() for sequence in sequences])
    batch = {name: x.to(device) if torch.is_tensor(x) else x for name, x in batch.items()}
    actual = model(**batch).last_hidden_state
    assert (actual - one_by_one(make_model(family).to(device), sequences)).abs().max() <= TOLERANCE
    seen = integration.counts()
    assert seen.fused == model.config.num_hidden_layers and seen.fallback == seen.reference == 0


@pytest.mark.parametrize("family", SERVED)
def test_where_the_kernel_cannot_run_packed_sequences_still_do_not_see_each_other(family, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    integration.register()
    sequences = make_sequences()
    actual = make_model(family, "padfree")(**make_packed(sequences, SERVED[family])).last_hidden_state
    assert (actual - one_by_one(make_model(family), sequences)).abs().max() <= TOLERANCE
    assert integration.counts().fallback and not integration.counts().fused


def test_a_position_bias_falls_back_to_sdpa_within_each_sequence():
    sequences = make_sequences()
    batch = make_packed(sequences)
    actual = make_model("t5", "padfree")(**batch).last_hidden_state
    assert (actual - one_by_one(make_model("t5"), sequences)).abs().max() <= TOLERANCE
    assert integration.counts().fallback == 2
    with pytest.raises(RuntimeError, match="packed sequences came with a mask or a position bias"):
        make_model("t5", "padfree_strict")(**batch)


@pytest.mark.parametrize("shape", ("row", "written out, bool", "written out, added"))
def test_a_mask_beside_the_boundaries_hides_what_it_hides_as_well(shape):
    sequences = make_sequences()
    mask = torch.ones(1, sum(LENGTHS), dtype=torch.long)
    # the last tokens of the third sequence
    mask[0, 12:15] = 0
    if shape != "row":
        mask = mask.bool()[:, None, None].expand(-1, -1, sum(LENGTHS), -1)
    if shape == "written out, added":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    actual = make_model("bert", "padfree")(**make_packed(sequences), attention_mask=mask).last_hidden_state
    sequences[2] = sequences[2][:6]
    expected = one_by_one(make_model("bert"), sequences)
    kept = torch.tensor([i for i in range(sum(LENGTHS)) if not 12 <= i < 15])
    assert (actual[:, kept] - expected).abs().max() <= TOLERANCE
    assert integration.counts().fallback == 3


def test_weights_of_packed_sequences_are_those_of_each_alone():
    sequences = make_sequences()
    packed = make_model("bert", "padfree")(**make_packed(sequences), output_attentions=True).attentions
    eager = make_model("bert", "eager")
    starts = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    for sequence, start in zip(sequences, starts, strict=False):
        own = slice(start, start + len(sequence))
        for weights, alone in zip(
            packed, eager(sequence[None], output_attentions=True).attentions, strict=True
        ):
            assert (weights[:, :, own, own] - alone).abs().max() <= TOLERANCE


def test_dropout_is_applied_to_packed_sequences_in_training_only():
    changes = {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.0}
    model, batch = make_model("bert", "padfree_strict", **changes), make_packed(make_sequences())
    still = model(**batch).last_hidden_state
    assert torch.equal(still, model(**batch).last_hidden_state)
    assert not torch.allclose(still, model.train()(**batch).last_hidden_state, atol=1e-3)


def test_packed_sequences_compile_to_one_graph():
    # The reference splits the row on the host; the kernel does not.
    integration.register()
    sequences = make_sequences()
    torch.compiler.reset()
    compiled = torch.compile(make_model("bert", "padfree_strict"), backend="aot_eager", fullgraph=True)
    actual = compiled(**make_packed(sequences)).last_hidden_state
    assert (actual - one_by_one(make_model("bert"), sequences)).abs().max() <= TOLERANCE


def test_a_causal_layer_falls_back_within_each_sequence():
    """The boundaries alone, without positions by which transformers would tell the sequences apart."""
    layer = torch.nn.Module()
    layer.is_causal = True
    query, key, value = (torch.randn(1, 2, 8, 4) for _ in range(3))
    cu = torch.tensor([0, 3, 8], dtype=torch.int32)
    packed = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 5, "max_length_k": 5}
    out, _ = integration.attention_forward(layer, query, key, value, None, **packed)
    for rows in (slice(0, 3), slice(3, 8)):
        alone = (x[:, :, rows] for x in (query, key, value))
        expected = torch.nn.functional.scaled_dot_product_attention(*alone, is_causal=True)
        assert (out[:, rows] - expected.transpose(1, 2)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("attention", ("padfree", "padfree_strict"))
def test_positions_that_restart_without_boundaries_are_refused(attention):
    packed = make_packed(make_sequences())
    batch = {name: packed[name] for name in ("input_ids", "position_ids")}
    with pytest.raises(ValueError, match="position_ids restart within a row and cu_seq_lens_q did not come"):
        make_model("bert", attention)(**batch)
    with pytest.raises(ValueError, match="position_ids restart"):
        make_model("bert", attention)(batch["input_ids"], None, None, batch["position_ids"])
    with pytest.raises(ValueError, match="position_ids restart"):
        integration.enable(make_model("bert"), strict=attention == "padfree_strict")(**batch)
    # The same model under another name is transformers' own business, and so are a decoder's positions.
    model = make_model("bert", attention)
    model.set_attn_implementation("sdpa")
    model(**batch)
    make_model("gpt2", "padfree")(**batch)
    # Padded batches bring such positions with their mask; rows that count on are one sequence.
    make_model("bert", attention)(**batch, attention_mask=torch.ones_like(batch["input_ids"]))
    make_model("bert", attention)(batch["input_ids"], position_ids=torch.arange(sum(LENGTHS))[None])


def test_a_compiled_model_refuses_positions_that_restart_as_well():
    torch.compiler.reset()
    compiled = torch.compile(make_model("bert", "padfree"), backend="aot_eager", fullgraph=True)
    packed = make_packed(make_sequences())
    compiled(packed["input_ids"], position_ids=torch.arange(sum(LENGTHS))[None])
    with pytest.raises(RuntimeError, match="position_ids restart within a row"):
        compiled(packed["input_ids"], position_ids=packed["position_ids"])


@pytest.mark.parametrize("attention", ("padfree", "padfree_strict"))
def test_half_of_what_packing_needs_is_refused(attention):
    packed = make_packed(make_sequences())
    model = make_model("bert", attention)
    with pytest.raises(ValueError, match="seq_idx came without cu_seq_lens_q"):
        model(packed["input_ids"], seq_idx=packed["seq_idx"])
    with pytest.raises(ValueError, match="cu_seq_lens_q and cu_seq_lens_k must come together"):
        model(packed["input_ids"], cu_seq_lens_q=packed["cu_seq_lens_q"])
    with pytest.raises(ValueError, match="one row of packed sequences, got a batch of 2"):
        model(**packed | {name: packed[name].expand(2, -1) for name in ("input_ids", "position_ids")})


def test_lengths_are_bounded_by_the_row_where_they_did_not_come():
    sequences = make_sequences()
    batch = make_packed(sequences)
    del batch["max_length_q"], batch["max_length_k"]
    actual = make_model("bert", "padfree_strict")(**batch).last_hidden_state
    assert (actual - one_by_one(make_model("bert"), sequences)).abs().max() <= TOLERANCE


def test_a_model_with_attention_of_its_own_refuses_packed_sequences():
    packed = make_packed(make_sequences())
    model = make_model("mpnet", "padfree")
    with pytest.raises(ValueError, match="MPNetModel cannot keep packed sequences apart"):
        model(**packed)
    with pytest.raises(ValueError, match="position_ids restart"):
        model(packed["input_ids"], position_ids=packed["position_ids"])


UNFIT = {
    # counts its learned positions along the whole row, and swallows the position ids it is given
    "bart": lambda: BartModel(named(BartConfig(**BART))).encoder,
    # its layers do not hand the boundaries on
    "siglip": lambda: SiglipTextModel(named(SiglipTextConfig(**SIZES))),
    # its embedding of a token looks at the neighbours
    "mobilebert": lambda: MobileBertModel(named(MobileBertConfig(**SIZES, embedding_size=32))),
}


def named(config):
    config._attn_implementation = "padfree"
    return config


@pytest.mark.parametrize("name", UNFIT)
def test_a_model_that_cannot_keep_sequences_apart_refuses_them(name):
    with pytest.raises(ValueError, match="cannot keep packed sequences apart"):
        UNFIT[name]()(**make_packed(make_sequences()))
