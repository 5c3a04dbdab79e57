"""Packed or padded, one projection or three: the classifier gives the same logits and gradients."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from imdb_classifier.configuration import PRESETS
from imdb_classifier.data.batches import Collator, TokenizedReviews
from imdb_classifier.layers import Dropout, MultiHeadAttention, linear_together
from imdb_classifier.packing import pack
from padfree.integrations import transformers as integration
from tiny_models import make_classifier, own_registration

LENGTHS = (40, 1, 17, 33, 2)


@pytest.fixture(autouse=True)
def padfree_by_reference():
    with own_registration():
        integration.register(impl="reference")
        yield


def drawn(seed):
    """Reviews with holes, of one token, without any token, and one without padding: ids and mask [B, S]."""
    generator = torch.Generator().manual_seed(seed)
    visible = torch.rand(6, 40, generator=generator) < 0.7
    visible[:, 0] = True
    visible[1, 1:] = False
    visible[2] = False
    visible[3, 20:] = False
    visible[5] = True
    ids = torch.randint(1, 60, (6, 40), generator=generator).masked_fill(~visible, 0)
    return ids, visible.long()


def answers(model, **inputs):
    """Logits and every gradient."""
    labels = torch.tensor([1, 0, 0, 1, 1, 0])[: inputs.pop("reviews", 6)]
    output = model(**inputs, labels=labels)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(output.loss, list(parameters.values()))
    return {"logits": output.logits.detach()} | dict(zip(parameters, gradients, strict=True))


def assert_close(found, expected, tolerance):
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= tolerance, name


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("first_row_only", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_packed_equals_padded(preset, first_row_only, seed):
    ids, mask = drawn(seed)
    options = {"cls_only_last_layer": first_row_only}
    packed, padded, eager = (
        answers(
            make_classifier(preset, name, layout=layout, **options).double(),
            input_ids=ids,
            attention_mask=mask,
        )
        for name, layout in (("padfree", "packed"), ("padfree", "padded"), ("eager", "padded"))
    )
    assert_close(packed, eager, 1e-12)
    assert_close(padded, eager, 1e-12)


def test_a_review_whose_class_token_is_hidden_is_packed_as_it_is_padded():
    ids, mask = drawn(0)
    mask[3, 0] = mask[5, :9] = 0
    packed = answers(
        make_classifier(attention="padfree", layout="packed").double(), input_ids=ids, attention_mask=mask
    )
    assert_close(packed, answers(make_classifier().double(), input_ids=ids, attention_mask=mask), 1e-12)


def collated(**options):
    data = TokenizedReviews.from_lists([[2, *range(5, 4 + length)] for length in LENGTHS], [1, 0, 0, 1, 1])
    batch = Collator(pad_token_id=0, max_length=40, **options)(data.__getitems__(range(5)))
    return {name: value for name, value in batch.items() if name not in ("rows", "labels")} | {"reviews": 5}


@pytest.mark.parametrize("buckets", [0, 3])
def test_what_the_collator_packs_equals_what_it_pads(buckets):
    model = make_classifier(attention="padfree").double()
    expected = answers(make_classifier().double(), **collated())
    assert_close(answers(model, **collated(packed=True, buckets=buckets)), expected, 1e-12)
    assert_close(answers(model, **collated(buckets=buckets)), expected, 1e-12)


@pytest.mark.parametrize("buckets", [0, 3])
def test_the_kernel_runs_packed_and_compiled(buckets):
    integration.register()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = {
        k: v.to(device) if isinstance(v, torch.Tensor) else v
        for k, v in collated(packed=True, buckets=buckets).items()
    }
    expected = answers(make_classifier(), **collated())
    model = make_classifier(attention="padfree_strict").to(device)
    found = {name: tensor.cpu() for name, tensor in answers(model, **dict(inputs)).items()}
    assert_close(found, expected, 4e-6)
    assert integration.counts().fused == model.config.n_layers

    del inputs["reviews"]
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    assert (compiled(**inputs).logits.cpu() - expected["logits"]).abs().max() <= 4e-6


def test_filler_reaches_neither_a_logit_nor_a_gradient():
    model = make_classifier(attention="padfree").double()
    batch = collated(packed=True, buckets=1)
    expected = answers(model, **dict(batch))
    filler = batch["cu_seq_lens_q"][-1]
    assert filler < batch["input_ids"].shape[1]
    batch["input_ids"][:, filler:] = 7
    batch["position_ids"][:, filler:] = 3
    found = answers(model, **batch)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_batch_is_packed_where_the_attention_can_and_the_layout_says_so():
    for attention, layout, packs in (
        ("padfree", "auto", True),
        ("padfree", "padded", False),
        ("sdpa", "auto", False),
        ("sdpa", "packed", True),
    ):
        assert make_classifier(attention=attention, layout=layout).packs is packs


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"attention": "sdpa", "layout": "packed"}, {}, "attention 'sdpa' does not keep packed reviews apart"),
        ({"attention": "sdpa"}, {"collate": True}, "attention 'sdpa' does not keep packed reviews apart"),
        (
            {"attention": "padfree"},
            {"collate": True, "attention_mask": torch.ones(1, 93)},
            "packed reviews have no padding, got an attention_mask",
        ),
        ({"attention": "padfree"}, {"collate": True, "position_ids": None}, "position_ids absent, max_length_q given"),
        ({"attention": "padfree"}, {"collate": True, "max_length_q": None}, "max_length_q absent"),
        ({"attention": "padfree"}, {"collate": True, "max_length_q": 41}, "max_length_q is 41, the model has 40"),
        (
            {"attention": "padfree"},
            {"collate": True, "input_ids": torch.ones(2, 9, dtype=torch.long)},
            r"got input_ids \[2, 9\]",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_packed_is_refused_in_one_line(options, change, message):
    ids, mask = drawn(0)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if change.pop("collate", False):
        inputs = collated(packed=True) | change
        del inputs["reviews"]
    with pytest.raises(ValueError, match=message):
        make_classifier(**options)(**inputs)


def test_a_mask_that_differs_by_row_cannot_be_packed():
    with pytest.raises(ValueError, match=r"needs an attention_mask \[2, 4\], got \[2, 1, 4, 4\]"):
        pack(torch.ones(2, 4, dtype=torch.long), torch.ones(2, 1, 4, 4))


def test_three_linear_layers_together_are_each_alone():
    torch.manual_seed(0)
    x, layers = (
        torch.randn(2, 5, 8, dtype=torch.float64),
        [nn.Linear(8, width).double() for width in (3, 4, 8)],
    )
    for found, layer in zip(linear_together(x, *layers), layers, strict=True):
        assert (found - layer(x)).abs().max() <= 1e-14


def test_an_adapter_in_place_of_a_projection_computes_by_itself():
    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    torch.manual_seed(0)
    attention, x = MultiHeadAttention(8, 8, 2), torch.randn(1, 3, 8)
    plain = attention(x)
    adapter = Adapter(8, 8)
    adapter.load_state_dict(attention.wv.state_dict())
    attention.wv = adapter
    # The weights of a row sum to one, so one more in every value is one more before the last projection.
    assert torch.allclose(attention(x), plain + attention.dense.weight.sum(1), atol=1e-6)


def hooked(layer):
    layer.register_forward_hook(lambda module, arguments, output: output + 1)


def moved(layer):
    plain = layer.forward
    layer.forward = lambda x: plain(x) + 1


@pytest.mark.parametrize("change", [hooked, moved])
def test_what_is_hung_onto_a_projection_computes(change):
    torch.manual_seed(0)
    attention, x = MultiHeadAttention(8, 8, 2), torch.randn(1, 3, 8)
    plain = attention(x)
    change(attention.wv)
    assert torch.allclose(attention(x), plain + attention.dense.weight.sum(1), atol=1e-6)


def test_projections_without_a_bias_and_pruned_ones_compute():
    torch.manual_seed(0)
    attention, x = MultiHeadAttention(8, 8, 2), torch.randn(1, 3, 8)
    prune.random_unstructured(attention.wv, "weight", 0.5)
    for _ in range(2):
        attention(x).sum().backward()
    attention.wq, attention.wk, attention.wv = (nn.Linear(8, 8, bias=False) for _ in range(3))
    assert attention(x).shape == x.shape


def test_the_head_is_in_fp32_under_autocast():
    model, seen = make_classifier(), []
    model.classification.register_forward_hook(lambda module, arguments, z: seen.extend([*arguments, z]))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randint(1, 60, (2, 9)))
    assert [tensor.dtype for tensor in seen] == [torch.float32] * 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_mask_of_all_rows_is_written_out(attention, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ids, mask = drawn(0)
    model, shapes = make_classifier(attention=attention), []
    own = ALL_ATTENTION_FUNCTIONS.get_interface

    def spied(name, default):
        attend = own(name, default)

        def call(module, query, key, value, attention_mask, **options):
            shapes.append(attention_mask.shape)
            return attend(module, query, key, value, attention_mask, **options)

        return call

    monkeypatch.setattr(
        type(ALL_ATTENTION_FUNCTIONS), "get_interface", lambda self, name, default: spied(name, default)
    )
    model(ids, mask)
    assert shapes == [(6, 1, 1, 40)] * 2


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.999999, 1.0])
def test_dropout_on_a_cpu_takes_every_rate(p):
    torch.manual_seed(0)
    out = Dropout(p)(torch.ones(4000))
    kept = out[out != 0]
    share = round(p * 2**16) / 2**16
    assert abs(len(kept) / 4000 - (1 - share)) < 0.03
    # scaled by the share that was met, not by the one that was asked for
    assert share in (0, 1) or torch.equal(kept, torch.full_like(kept, 1 / (1 - share)))


def test_dropout_on_a_cpu_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    dropout, x = Dropout(0.1), torch.ones(1_000_003, requires_grad=True)
    out = dropout(x)
    share = (out == 0).double().mean().item()
    assert abs(share - 0.1) < 5 * math.sqrt(0.1 * 0.9 / x.numel())
    assert out.double().mean().item() == pytest.approx(1, abs=2e-3)
    # neighbours come out of one draw, and are independent all the same
    both = ((out[1:] == 0) & (out[:-1] == 0)).double().mean().item()
    assert both == pytest.approx(0.01, abs=6e-4)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient, out.detach())
    assert torch.equal(dropout.eval()(x), x)


def test_on_a_gpu_packed_batches_get_few_shapes(monkeypatch):
    from imdb_classifier.modeling import TextClassifier
    from imdb_classifier.training.inference import collator_for

    packs, pads = make_classifier(attention="padfree"), make_classifier()
    assert (collator_for(packs).buckets, collator_for(packs, 8).buckets) == (0, 8)
    monkeypatch.setattr(TextClassifier, "device", torch.device("cuda"))
    assert collator_for(packs) == Collator(0, 40, packed=True, buckets=64)
    assert (collator_for(packs, 8).buckets, collator_for(pads).buckets) == (8, 0)
