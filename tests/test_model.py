"""The classifier: the notebook's arithmetic, under any attention, in every place transformers puts a model."""

import math

import pytest
import torch

from imdb_classifier.configuration import PRESETS, TextClassifierConfig
from imdb_classifier.layers import (
    MultiHeadAttention,
    SelfAttention,
    Transformer,
    eager_attention_forward,
    positional_encoding,
)
from padfree.integrations import transformers as integration
from tiny_models import logit, make_classifier, make_reviews, own_registration

# About 30 roundings of fp32 at the size of a logit.
TOLERANCE = 4e-6


@pytest.fixture(autouse=True)
def padfree_by_reference():
    """ "padfree" runs `padfree.reference` through the adapter; test_integrations runs the kernel."""
    with own_registration():
        integration.register(impl="reference")
        yield


def logit_and_gradients(model, ids):
    labels = torch.arange(len(ids)) % 2
    model.zero_grad()
    output = model(ids, labels=labels)
    output.loss.backward()
    return logit(output).detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(actual, expected):
    (logits, gradients), (expected_logits, expected_gradients) = actual, expected
    assert (logits - expected_logits).abs().max() <= TOLERANCE
    for name, gradient in expected_gradients.items():
        # A key bias shifts a whole softmax row: its true gradient is 0 and what stands there is rounding.
        error = (gradients[name] - gradient).norm()
        assert error <= 1e-5 * gradient.norm() + 1e-6, name


def notebook_logits(model, ids):
    """The notebook's forward pass, one review and one head at a time, from the state dict alone."""
    weights, config = model.state_dict(), model.config

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    logits, depth = [], config.d_model // config.n_heads
    for review in ids:
        x = weights["embedding.weight"][review] * math.sqrt(config.input_dim)
        for position in range(len(review)):
            for column in range(config.input_dim):
                angle = position / 10000 ** ((column - column % 2) / config.input_dim)
                x[position, column] += math.cos(angle) if column % 2 else math.sin(angle)
        for index in range(config.n_layers):
            layer, heads = f"layers.{index}", []
            q, k, v = (linear(f"{layer}.mha.{name}", x) for name in ("wq", "wk", "wv"))
            for head in range(config.n_heads):
                part = slice(head * depth, (head + 1) * depth)
                scores = q[:, part] @ k[:, part].T / math.sqrt(depth) + (review == 0) * -1e9
                heads.append(scores.softmax(-1) @ v[:, part])
            residual = linear(f"{layer}.shortcut", x) if f"{layer}.shortcut.weight" in weights else x
            x = norm(f"{layer}.layernorm1", linear(f"{layer}.mha.dense", torch.cat(heads, -1)) + residual)
            x = norm(f"{layer}.layernorm2", linear(f"{layer}.ffn.2", linear(f"{layer}.ffn.0", x).relu()) + x)
        logits.append(linear("classification", x[0]))
    return torch.cat(logits)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("attention", ("eager", "sdpa", "padfree"))
def test_every_attention_computes_the_notebooks_arithmetic(preset, attention):
    model, ids = make_classifier(preset, attention).double(), make_reviews()
    with torch.no_grad():
        # Only the positions, rounded to fp32 in the notebook as here, keep fp64 from agreeing to 1e-14.
        assert (logit(model(ids)) - notebook_logits(model, ids)).abs().max() <= 1e-6


def test_the_state_dict_reads_like_the_notebooks():
    layer = ("mha.wq", "mha.wk", "mha.wv", "mha.dense", "ffn.0", "ffn.2", "layernorm1", "layernorm2")
    modules = [*(f"layers.{i}.{name}" for i in range(2) for name in layer), "classification"]
    expected = {f"{name}.{kind}" for name in modules for kind in ("weight", "bias")}
    assert set(make_classifier().state_dict()) == expected | {"embedding.weight", "pos_encoding"}


def test_positions_follow_the_sine_and_cosine_formula():
    table = positional_encoding(400, 33)
    assert table.shape == (1, 400, 33) and table.dtype == torch.float32
    for position, column in ((0, 0), (0, 1), (7, 4), (399, 31), (399, 32)):
        angle = position / 10000 ** (2 * (column // 2) / 33)
        expected = math.cos(angle) if column % 2 else math.sin(angle)
        assert table[0, position, column].item() == pytest.approx(expected, abs=1e-7)


def test_self_attention_is_multi_head_attention_with_one_head():
    torch.manual_seed(0)
    single, multi, x = SelfAttention(8, 16), MultiHeadAttention(8, 16, 1), torch.randn(2, 5, 8)
    multi.load_state_dict(single.state_dict())
    assert torch.equal(single(x), multi(x))
    assert single.depth == 16


def test_the_notebooks_second_transformer_runs():
    encoder = Transformer(input_dim=32, d_model=128, dff=256, n_heads=4, n_layers=5, dropout_rate=0.1)
    assert encoder(torch.randn(2, 6, 32)).shape == (2, 6, 128)


@pytest.mark.parametrize("attention", ("eager", "padfree"))
@pytest.mark.parametrize("preset", PRESETS)
def test_swapping_the_attention_name_keeps_logits_and_gradients(preset, attention):
    ids = make_reviews()
    ids[3, 5:9] = 0  # padding inside a review too
    expected = logit_and_gradients(make_classifier(preset), ids)
    assert_same(logit_and_gradients(make_classifier(preset, attention), ids), expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_kernel_keeps_logits_and_gradients(preset):
    integration.register()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = make_reviews((20, 7))[:, :20].to(device)
    expected = logit_and_gradients(make_classifier(preset).to(device), ids)
    model = make_classifier(preset, "padfree_strict").to(device)
    assert_same(logit_and_gradients(model, ids), expected)
    assert integration.counts().fused == model.config.n_layers

    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert (logit(compiled(ids)) - expected[0]).abs().max() <= TOLERANCE


@torch.compiler.set_stance("force_eager")
def test_flex_attention_keeps_the_logits():
    # Compiled for a CPU, flex_attention is now and then wrong by itself (NOTES.md, 2026-11-27): it runs as it is written.
    ids = make_reviews()
    with torch.no_grad():
        assert (
            logit(make_classifier()(ids)) - logit(make_classifier(attention="flex_attention")(ids))
        ).abs().max() < TOLERANCE


@pytest.mark.parametrize("attention", ("eager", "sdpa", "padfree"))
@pytest.mark.parametrize("preset", PRESETS)
def test_computing_row_0_alone_in_the_last_layer_is_exact(preset, attention):
    ids = make_reviews()
    whole = make_classifier(preset, attention, cls_only_last_layer=False)
    assert_same(logit_and_gradients(make_classifier(preset, attention), ids), logit_and_gradients(whole, ids))


@pytest.mark.filterwarnings("ignore:padfree falls back .* 4 dimensions")
@pytest.mark.parametrize("attention", ("sdpa", "padfree"))
def test_row_0_keeps_its_own_row_of_a_mask_that_differs_by_row(attention):
    ids = make_reviews((40, 40))
    visible = torch.rand(2, 1, 40, 40, generator=torch.Generator().manual_seed(2)) < 0.5
    visible |= torch.eye(40, dtype=torch.bool)
    row_0, whole = make_classifier(attention=attention), make_classifier(cls_only_last_layer=False)
    difference = logit(row_0(ids, attention_mask=visible)) - logit(whole(ids, attention_mask=visible))
    assert difference.abs().max() <= TOLERANCE


@pytest.mark.parametrize("attention", ("eager", "sdpa", "padfree"))
def test_a_logit_depends_on_neither_neighbours_nor_padded_length(attention):
    model, lengths = make_classifier(attention=attention), (40, 1, 17, 33)
    with torch.no_grad():
        together = logit(model(make_reviews(lengths)))
        for review, length, expected in zip(make_reviews(lengths), lengths, together, strict=True):
            for width in {length, min(length + 3, 40), 40}:
                assert (logit(model(review[None, :width])) - expected).abs() <= TOLERANCE, width


@pytest.mark.parametrize("attention", ("eager", "sdpa", "padfree"))
def test_a_review_that_is_all_padding_gets_a_finite_logit_and_gradient(attention):
    logits, gradients = logit_and_gradients(make_classifier(attention=attention), make_reviews((40, 0)))
    assert logits.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_the_mask_is_taken_from_the_padding_token_when_none_is_given():
    model, ids = make_classifier(), make_reviews()
    assert torch.equal(model(ids).logits, model(ids, attention_mask=(ids != 0).long()).logits)
    assert not torch.allclose(model(ids).logits, model(ids, attention_mask=torch.ones_like(ids)).logits)


def test_the_loss_is_the_binary_cross_entropy_of_one_logit():
    model, ids, labels = make_classifier(), make_reviews(), torch.tensor([1, 0, 0, 1])
    output = model(ids, labels=labels)
    z = logit(output)
    expected = (torch.log1p(z.exp()) - labels * z).mean()
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.allclose(output.logits.softmax(-1)[:, 1], z.sigmoid())
    bare = make_classifier(num_labels=1)(ids, labels=labels)
    assert bare.logits.shape == (4, 1) and torch.allclose(bare.logits[:, 0], z, atol=TOLERANCE)
    assert bare.loss.item() == pytest.approx(output.loss.item(), abs=1e-6)


def test_dropout_acts_in_training_only():
    model, ids = make_classifier(), make_reviews()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_initial_weights_are_pytorchs_as_in_the_notebook():
    model = make_classifier(d_model=64, vocab_size=2000)
    assert model.embedding.weight.std().item() == pytest.approx(1.0, abs=0.02)
    weight = model.layers[0].mha.wq.weight
    assert weight.abs().max() <= 1 / 8 and weight.std().item() == pytest.approx(
        1 / 8 / math.sqrt(3), abs=0.005
    )


@pytest.mark.parametrize("mask", ("bool", "float", None))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_the_eager_reference_equals_sdpa_with_every_mask(mask, dtype):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 4, dtype=dtype) for _ in range(3))
    visible = torch.rand(2, 1, 5, 5) < 0.7
    visible[..., 0] = True
    visible[1, 0, 2] = False  # a row with nothing to attend to
    given = {
        "bool": visible,
        "float": torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min),
        None: None,
    }[mask]
    out, weights = eager_attention_forward(torch.nn.Module().eval(), query, key, value, given)
    bool_mask = None if mask is None else visible
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, bool_mask)
    assert (out.transpose(1, 2) - expected).abs().max() <= 4 * torch.finfo(dtype).eps
    if mask is not None:
        assert (weights[~visible.expand_as(weights)] == 0).all() and (out[1, 2] == 0).all()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.ones(1, 41, dtype=torch.long), "41 tokens a review, the model has 40 positions"),
        (torch.ones(5, dtype=torch.long), r"input_ids must have shape \[B, S\], got \[5\]"),
        (
            torch.ones(2, 0, dtype=torch.long),
            r"input_ids must hold a token of each review, got shape \[2, 0\]",
        ),
    ],
)
def test_ids_that_do_not_fit_are_refused_in_one_line(ids, message):
    with pytest.raises(ValueError, match=message):
        make_classifier()(ids)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 30}, "d_model must be divisible by n_heads = 4, got 30"),
        ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
        ({"dropout_rate": 1.0}, r"dropout_rate must lie in \[0, 1\), got 1.0"),
        ({"num_labels": 3}, "num_labels must be 2 .* got 3"),
    ],
)
def test_a_configuration_that_no_model_can_have_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TextClassifierConfig(**fields)


def test_the_presets_are_the_notebooks_two_configurations():
    small, large = (TextClassifierConfig(**PRESETS[name]) for name in ("notebook", "notebook-large"))
    sizes = ("input_dim", "d_model", "n_layers", "n_heads", "dff", "dropout_rate", "max_length")
    assert [getattr(small, name) for name in sizes] == [32, 32, 2, 4, 32, 0.1, 400]
    assert [getattr(large, name) for name in sizes] == [32, 128, 5, 4, 256, 0.1, 400]


def test_the_notebooks_names_are_the_packages():
    import imdb_classifier
    from imdb_classifier import layers, modeling

    # where the notebook defines a class or a function of its model
    for name in (
        "SelfAttention",
        "MultiHeadAttention",
        "TransformerLayer",
        "Transformer",
        "positional_encoding",
        "TextClassifier",
    ):
        assert getattr(imdb_classifier, name) is getattr(
            modeling if name == "TextClassifier" else layers, name
        )
    assert all(hasattr(imdb_classifier, name) for name in imdb_classifier.__all__)
