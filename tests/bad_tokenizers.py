"""Tokenizers that cannot encode reviews for the model, each with what the message must say."""

from collections.abc import Callable
from pathlib import Path


def make_word_tokenizer(folder: Path, vocabulary: dict[str, int]) -> list[str]:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[CLS]": 1, **vocabulary}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]")
    saved.save_pretrained(folder / "tokenizer")
    return ["--tokenizer", str(folder / "tokenizer")]


# Knows every word that a tokenizer is tried on, and not those of the reviews.
TRIED_WORDS = {word: number for number, word in enumerate(("good", "film", "a", "bad", "one"), start=2)}


def make_broken_tokenizer(folder: Path) -> list[str]:
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text('{"model": 5}')
    return ["--tokenizer", str(folder / "tokenizer")]


def make_tokenizer_without(folder: Path, **removed: None) -> list[str]:
    from imdb_classifier.data.tokenization import train_tokenizer

    tokenizer = train_tokenizer(["a good film", "a bad film"], 60, 24)
    if "class_token" in removed:
        from tokenizers import processors

        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    else:
        tokenizer.pad_token = None
    tokenizer.save_pretrained(folder / "tokenizer")
    return ["--tokenizer", str(folder / "tokenizer")]


TOKENIZER_FAULTS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "broken tokenizer": (make_broken_tokenizer, "tokenizer: is no usable tokenizer"),
    "tokenizer without an unknown token": (
        lambda folder: make_word_tokenizer(folder, {"film": 2}),
        "cannot encode a review: WordLevel error: Missing [UNK] token",
    ),
    "tokenizer that fails later": (
        lambda folder: make_word_tokenizer(folder, TRIED_WORDS),
        "the tokenizer cannot encode the reviews: WordLevel error: Missing [UNK] token",
    ),
    "tokenizer with an id of 2e6": (
        lambda folder: make_word_tokenizer(folder, {"[UNK]": 2, "film": 2_000_000}),
        "has an id of 2,000,000, expected ids below 1,000,000",
    ),
    "tokenizer without padding": (
        lambda folder: make_tokenizer_without(folder, padding=None),
        "has no padding token",
    ),
    "tokenizer without a class token": (
        lambda folder: make_tokenizer_without(folder, class_token=None),
        "puts no class token in front",
    ),
}
