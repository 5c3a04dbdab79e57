"""The classifier where transformers puts a model: saved, loaded, in a pipeline, under Trainer, compiled."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from imdb_classifier.attention import choose_attention, get_attention
from imdb_classifier.configuration import PRESETS, TextClassifierConfig
from imdb_classifier.modeling import TextClassifier
from padfree.integrations import transformers as integration
from tiny_models import logit, make_classifier, make_reviews, own_registration

# About 30 roundings of fp32 at the size of a logit.
TOLERANCE = 4e-6
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "film", "plot"]


@pytest.fixture(autouse=True)
def padfree_by_reference():
    """ "padfree" runs `padfree.reference` through the adapter; test_integrations runs the kernel."""
    with own_registration():
        integration.register(impl="reference")
        yield


@pytest.mark.parametrize("preset", PRESETS)
def test_a_saved_model_comes_back_through_the_auto_classes_under_any_attention(preset, tmp_path):
    model, ids = make_classifier(preset), make_reviews()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), TextClassifierConfig)
    for attention in ("eager", "sdpa", "padfree"):
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation=attention)
        assert isinstance(loaded, TextClassifier) and loaded.config._attn_implementation == attention
        assert loaded.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}
        assert (logit(loaded.eval()(ids)) - logit(model(ids))).abs().max() <= TOLERANCE
    assert integration.counts().reference == model.config.n_layers


def make_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=40,
        # As a BERT tokenizer: the model must bear the token types it has no use for.
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("attention", ("sdpa", "padfree"))
def test_a_text_classification_pipeline_names_the_label_and_its_probability(attention, tmp_path):
    model = make_classifier()
    model.save_pretrained(tmp_path)
    tokenizer = make_tokenizer(tmp_path)
    classify = pipeline("text-classification", str(tmp_path), model_kwargs={"attn_implementation": attention})
    texts = ["a good film", "bad plot " * 50]
    answers = classify(texts, truncation=True, batch_size=2)
    for text, answer in zip(texts, answers, strict=True):
        ids = tokenizer(text, truncation=True, return_tensors="pt").input_ids
        positive = logit(model(ids)).sigmoid().item()
        assert answer["label"] == ("POSITIVE" if positive > 0.5 else "NEGATIVE")
        assert answer["score"] == pytest.approx(max(positive, 1 - positive), abs=1e-6)


def test_trainer_steps_by_the_mean_loss_whatever_the_accumulation(tmp_path):
    rows = [{"input_ids": ids, "labels": i % 2} for i, ids in enumerate(make_reviews((40, 20, 30, 40)))]
    results = []
    for accumulation in (1, 2):
        model = make_classifier(dropout_rate=0.0)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(accumulation)),
            max_steps=1,
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            max_grad_norm=0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
            use_cpu=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        results.append((trainer.state.log_history[0]["loss"], model.classification.weight.detach().clone()))

    model = make_classifier(dropout_rate=0.0)
    loss = model(torch.stack([r["input_ids"] for r in rows]), labels=torch.tensor([0, 1, 0, 1])).loss
    loss.backward()
    expected = model.classification.weight - 0.1 * model.classification.weight.grad
    for logged, weight in results:
        assert logged == pytest.approx(loss.item(), abs=1e-4)
        assert (weight - expected).abs().max() <= 1e-6


def test_a_compiled_classifier_is_one_graph_with_the_same_logits():
    ids = make_reviews()
    torch.compiler.reset()
    compiled = torch.compile(make_classifier(attention="padfree"), backend="aot_eager", fullgraph=True)
    assert (logit(compiled(ids)) - logit(make_classifier()(ids))).abs().max() <= TOLERANCE


def test_the_registry_knows_each_name_and_lists_them_for_a_wrong_one():
    for name in ("eager", "sdpa", "padfree"):
        assert callable(get_attention(name))
    with pytest.raises(ValueError, match="one of padfree, sdpa, eager, got 'flash'"):
        get_attention("flash")
    with pytest.raises(ValueError, match="one of auto, padfree, sdpa, eager, got 'flash'"):
        choose_attention("flash", "cpu", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_auto_on_a_cpu_is_sdpa_whether_the_interpreter_is_on_or_not(monkeypatch, dtype):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    answer = choose_attention("auto", "cpu", dtype)
    assert answer == ("sdpa", "auto: on a CPU PyTorch's SDPA; the fused kernel is for a GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_attention("auto", "cpu", dtype) == answer
    assert choose_attention("padfree", "cpu", torch.float32) == ("padfree", "asked for")


def test_an_explicit_padfree_that_cannot_run_raises_one_line(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        RuntimeError, match="^attention 'padfree' cannot run here .no GPU.*; auto, sdpa and eager can$"
    ):
        choose_attention("padfree", "cpu", torch.float32)
