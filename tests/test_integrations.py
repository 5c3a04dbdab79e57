"""transformers models with padfree by name: the same outputs as their own attention, and a variant one can see."""

import copy
import warnings

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, BertModel

import padfree
from padfree.integrations import transformers as integration
from tiny_models import FAMILIES, FUSED, OWN_ATTENTION, make_batch, make_model, max_error, own_registration

# Every model ends in a norm, so outputs are of size 1 and this is about 25 roundings of fp32. A dropped mask or
# window errs by 5e-3 and more.
TOLERANCE = 3e-6


@pytest.fixture(autouse=True)
def undo_registration():
    with own_registration():
        yield


@pytest.fixture
def by_reference():
    """The adapter with `padfree.reference` behind it: every decision of the adapter, no kernel needed."""
    integration.register(impl="reference")


@pytest.fixture
def no_kernel(monkeypatch):
    """A CPU without the interpreter, where the kernel cannot run."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    integration.register()


def test_both_interfaces_are_registered(by_reference):
    for name in (integration.NAME, integration.STRICT_NAME):
        assert name in AttentionInterface()
        assert name in AttentionMaskInterface()


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_equal_the_models_own_attention(family, by_reference):
    batch = make_batch()
    expected = make_model(family)(**batch).last_hidden_state
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = make_model(family, "padfree")(**batch).last_hidden_state
    assert max_error(actual, expected, batch["attention_mask"]) <= TOLERANCE

    seen = integration.counts()
    assert (seen.reference > 0) == (family in FUSED)
    assert (seen.fallback > 0) == (family not in FUSED)


@pytest.mark.parametrize("family", FUSED)
def test_outputs_without_a_mask_equal_the_models_own(family, by_reference):
    batch = {"input_ids": make_batch()["input_ids"]}
    expected = make_model(family)(**batch).last_hidden_state
    actual = make_model(family, "padfree_strict")(**batch).last_hidden_state
    assert (actual - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", FUSED)
def test_gradients_equal_the_models_own(family, by_reference):
    batch = make_batch()
    weight = torch.randn(batch["input_ids"].shape + (32,)) * batch["attention_mask"][..., None]

    def gradients(attention):
        model = make_model(family, attention)
        (model(**batch).last_hidden_state * weight).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, actual = gradients(None), gradients("padfree_strict")
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm()
        # A key bias shifts a whole softmax row: its true gradient is 0 and what stands there is rounding.
        assert error <= 1e-5 * gradient.norm() + 1e-4, name


@pytest.mark.parametrize("family", FUSED)
def test_where_the_kernel_cannot_run_sdpa_gives_the_same_and_is_counted(family, no_kernel):
    batch = make_batch()
    expected = make_model(family)(**batch).last_hidden_state
    with pytest.warns(UserWarning, match="falls back .* no GPU"):
        actual = make_model(family, "padfree")(**batch).last_hidden_state
    assert max_error(actual, expected, batch["attention_mask"]) <= TOLERANCE
    seen = integration.counts()
    assert seen.fallback > 0 and seen.fused == seen.reference == 0
    assert all("no GPU" in reason for reason in seen.fallbacks)


@pytest.mark.parametrize("family", ("bert", "modernbert", "eurobert", "t5"))
def test_the_kernel_serves_the_model_and_is_counted(family):
    integration.register()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = {name: tensor.to(device) for name, tensor in make_batch().items()}
    expected = make_model(family).to(device)(**batch).last_hidden_state
    actual = make_model(family, "padfree_strict").to(device)(**batch).last_hidden_state
    assert max_error(actual, expected, batch["attention_mask"]) <= TOLERANCE
    seen = integration.counts()
    assert seen.fused > 0 and seen.fallback == seen.reference == 0


@pytest.mark.parametrize("family", FUSED)
def test_a_review_that_is_all_padding_disturbs_no_other(family, by_reference):
    batch = make_batch(("right", "all", "none"))
    expected = make_model(family)(**batch).last_hidden_state
    actual = make_model(family, "padfree_strict")(**batch).last_hidden_state
    assert actual.isfinite().all()
    assert max_error(actual, expected, batch["attention_mask"]) <= TOLERANCE


@pytest.mark.parametrize("family", ("bert", "modernbert", "t5", "gpt2"))
def test_a_compiled_model_is_one_graph_with_the_same_outputs(family, by_reference):
    batch = make_batch()
    expected = make_model(family)(**batch).last_hidden_state
    torch.compiler.reset()
    compiled = torch.compile(make_model(family, "padfree"), backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="padfree falls back")
        actual = compiled(**batch).last_hidden_state
    assert max_error(actual, expected, batch["attention_mask"]) <= TOLERANCE

    # A second call reuses the graph: nothing is traced again, so nothing is counted again.
    integration.reset_counts()
    compiled(**batch)
    seen = integration.counts()
    assert seen.reference == seen.fallback == 0


@pytest.mark.parametrize("dtype", (torch.bool, torch.float32))
def test_a_four_dimensional_mask_of_the_caller_falls_back_and_counts(dtype, by_reference):
    visible = torch.rand(4, 1, 24, 24, generator=torch.Generator().manual_seed(2)) < 0.8
    visible |= torch.eye(24, dtype=torch.bool)
    mask = visible if dtype == torch.bool else torch.zeros(visible.shape).masked_fill(~visible, -1e9)
    ids = make_batch()["input_ids"]
    expected = make_model("bert")(ids, attention_mask=mask).last_hidden_state
    with pytest.warns(UserWarning, match=r"written out as \[B, 1, M, N\]"):
        actual = make_model("bert", "padfree")(ids, attention_mask=mask).last_hidden_state
    assert (actual - expected).abs().max() <= TOLERANCE
    assert integration.counts().fallback == 3


def test_the_mask_reaches_every_layer_as_the_tokenizer_made_it(by_reference, monkeypatch):
    seen = []
    real = integration.padfree.attention

    def spy(query, key, value, key_padding_mask, **options):
        seen.append(key_padding_mask)
        return real(query, key, value, key_padding_mask, **options)

    monkeypatch.setattr(integration.padfree, "attention", spy)
    batch = make_batch()
    make_model("bert", "padfree")(**batch)
    assert len(seen) == 3
    for padding in seen:
        assert torch.equal(padding, batch["attention_mask"] == 0)


def test_a_mask_is_turned_into_padding_once_a_forward(by_reference, monkeypatch):
    """Not once a layer, and not once for ever: the caller may write another batch's numbers into the same tensor."""
    found, handed = [], []
    key_spans, attention = padfree.key_spans, padfree.attention

    def finding(mask):
        found.append(mask)
        return key_spans(mask)

    def attending(query, key, value, padding, *, key_spans=None, **options):
        handed.append((padding, key_spans))
        return attention(query, key, value, padding, key_spans=key_spans, **options)

    monkeypatch.setattr(padfree, "key_spans", finding)
    monkeypatch.setattr(padfree, "attention", attending)
    model, batch = make_model("bert", "padfree_strict"), make_batch()
    layers = model.config.num_hidden_layers
    assert layers > 1
    for kept in (batch["attention_mask"].clone(), batch["attention_mask"].flip(0)):
        batch["attention_mask"].copy_(kept)
        found.clear()
        handed.clear()
        model(**batch)
        assert len(found) == 1 and len(handed) == layers
        for padding, spans in handed:
            assert torch.equal(padding, kept == 0) and torch.equal(spans, key_spans(kept == 0))


def test_a_mask_that_the_caller_keeps_is_looked_at_again_when_it_was_written_into(by_reference):
    model, batch = make_model("bert", "padfree_strict"), make_batch()
    hidden = model.embeddings(batch["input_ids"])
    masks = batch["attention_mask"].clone(), batch["attention_mask"].flip(0)

    def prepared():
        return integration.attention_mask_for(attention_mask=batch["attention_mask"], config=model.config)

    kept, outputs = prepared(), []
    for mask in masks:
        batch["attention_mask"].copy_(mask)
        outputs.append(model.encoder(hidden, attention_mask=kept).last_hidden_state)
        fresh = model.encoder(hidden, attention_mask=prepared()).last_hidden_state
        assert torch.equal(outputs[-1], fresh)
    assert not torch.equal(*outputs)


def test_attention_dropout_is_applied_in_training_only(by_reference):
    changes = {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.0}
    model, batch = make_model("bert", "padfree_strict", **changes), make_batch()
    still = model(**batch).last_hidden_state
    assert torch.equal(still, model(**batch).last_hidden_state)
    assert not torch.allclose(still, model.train()(**batch).last_hidden_state, atol=1e-3)


def assert_weights_are_the_eager_ones(family):
    batch = make_batch()
    expected = make_model(family, "eager")(**batch, output_attentions=True).attentions
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="padfree falls back")
        actual = make_model(family, "padfree")(**batch, output_attentions=True).attentions
    assert len(actual) == len(expected) == make_model(family).config.num_hidden_layers
    for weights, eager in zip(actual, expected, strict=True):
        by_row = weights.transpose(1, 2), eager.transpose(1, 2)
        assert max_error(*by_row, batch["attention_mask"]) <= TOLERANCE


@pytest.mark.parametrize("family", FUSED)
def test_weights_on_demand_equal_the_eager_ones_in_every_layer(family, by_reference):
    assert_weights_are_the_eager_ones(family)
    # Windows and position biases fall back when weights are asked for: all of T5, some layers of ModernBERT.
    seen = integration.counts()
    assert (seen.reference > 0) == (family != "t5")
    assert (seen.fallback > 0) == (family in ("modernbert", "t5"))


@pytest.mark.parametrize("family", ("bert", "eurobert"))
def test_weights_on_demand_where_the_kernel_cannot_run_equal_the_eager_ones(family, no_kernel):
    assert_weights_are_the_eager_ones(family)
    assert integration.counts().fallback == 3


def test_padded_queries_can_be_skipped_in_any_model(by_reference):
    batch = make_batch(("right", "none"))
    expected = make_model("bert")(**batch).last_hidden_state
    model = make_model("bert", "padfree_strict")
    actual = model(**batch, skip_padded_queries=True).last_hidden_state
    assert max_error(actual, expected, batch["attention_mask"]) <= TOLERANCE
    # The rows at padding did change: the request arrived.
    assert max_error(actual, expected, 1 - batch["attention_mask"]) > 1e-3


def test_cross_attention_with_fewer_queries_than_keys_equals_sdpa(by_reference):
    layer = torch.nn.Module()
    layer.is_causal = False
    mask = make_batch()["attention_mask"].bool()
    query, key, value = (torch.randn(4, 2, n, 8) for n in (1, 24, 24))
    out, weights = integration.attention_forward(
        layer, query, key, value, mask, impl="reference", strict=True
    )
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask[:, None, None])
    assert weights is None
    assert (out - expected.transpose(1, 2)).abs().max() <= TOLERANCE


def test_enable_switches_a_model_in_place(by_reference):
    model, batch = make_model("bert"), make_batch()
    expected = model(**batch).last_hidden_state
    assert integration.enable(model) is model
    assert max_error(model(**batch).last_hidden_state, expected, batch["attention_mask"]) <= TOLERANCE
    assert integration.counts().reference == 3


def test_enable_registers_by_itself():
    for table in (AttentionInterface, AttentionMaskInterface):
        table._global_mapping.pop(integration.NAME, None)
    model = integration.enable(make_model("bert"))
    assert model.config._attn_implementation == integration.NAME
    assert integration.NAME in AttentionMaskInterface()


@pytest.mark.parametrize("wrong", (torch.nn.Linear(2, 2), torch.nn.Linear, BertModel, "bert", None))
def test_enable_refuses_what_is_no_transformers_model(wrong):
    with pytest.raises(
        TypeError, match=f"^model must be a transformers PreTrainedModel, got {type(wrong).__name__}$"
    ):
        integration.enable(wrong)


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_enable_says_when_no_layer_will_use_it(family, by_reference):
    with pytest.warns(UserWarning, match="no layer that takes its attention by name"):
        integration.enable(make_model(family))
    with pytest.raises(ValueError, match="no layer that takes its attention by name"):
        integration.enable(make_model(family), strict=True)


def test_strict_raises_where_sdpa_would_step_in(no_kernel):
    with pytest.raises(RuntimeError, match="strict forbids sdpa: no GPU"):
        integration.enable(make_model("bert"), strict=True)(**make_batch())
    with pytest.raises(RuntimeError, match="the layer is causal"):
        integration.enable(make_model("gpt2"), strict=True)(**make_batch())


def test_a_fallback_warns_once_for_each_reason(no_kernel):
    model, batch = make_model("bert", "padfree"), make_batch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(**batch)
        model(**batch)
    assert len([w for w in caught if "falls back" in str(w.message)]) == 1
    assert integration.counts().fallback == 6


def test_counts_are_a_snapshot(by_reference):
    before = integration.counts()
    make_model("bert", "padfree")(**make_batch())
    assert before.reference == 0 and integration.counts().reference == 3
    assert copy.deepcopy(before) == before


def test_an_unknown_impl_is_refused():
    with pytest.raises(ValueError, match="impl must be 'triton' or 'reference', got 'auto'"):
        integration.register(impl="auto")


def test_autocast_is_served_where_layers_differ_in_dtype(by_reference):
    model = make_model("bert", "padfree").eval()
    module = next(m for m in model.modules() if type(m).__name__ == "BertSelfAttention")
    query, key = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8, dtype=torch.float16)
    integration.reset_counts()
    with torch.autocast("cpu", torch.float16):
        out, _ = integration.attention_forward(
            module, query, key, key, None, is_causal=False, impl="reference"
        )
    assert out.dtype == torch.float16
    assert (integration.counts().reference, integration.counts().fallback) == (1, 0)
