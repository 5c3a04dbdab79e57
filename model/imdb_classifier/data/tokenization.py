"""The tokenizer: by Hub name, from a local folder, or a WordPiece vocabulary trained on the training texts."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from imdb_classifier.data.hub import missing_from_hub, prepare_hub
from imdb_classifier.messages import UserError

TRAIN = "train"
# Each id is a row of the embedding; the largest vocabularies in use stay below.
MAX_IDS = 1_000_000
SPECIAL_TOKENS = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}


def load_tokenizer(name: str, max_length: int) -> PreTrainedTokenizerFast:
    """A fast tokenizer from a local folder or the Hub, set to cut at `max_length` tokens.

    Raises UserError where there is none, or it does not fit the classifier (see `check_tokenizer`).
    """
    folder = Path(name).expanduser()
    is_local = folder.exists() or name.startswith((".", "/", "~"))
    if is_local and not (folder / "tokenizer.json").is_file():
        raise UserError(f"{name}: holds no tokenizer.json, expected the folder of a saved fast tokenizer")
    reachable = is_local or prepare_hub()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder) if is_local else name,
            local_files_only=is_local or not reachable,
            trust_remote_code=False,
        )
    except Exception as error:
        # tokenizers raises a bare Exception for a broken tokenizer.json.
        if is_local:
            raise UserError(f"{name}: is no usable tokenizer: {_first_line(error)}") from error
        hint = "pass --tokenizer FOLDER, or --tokenizer train to make one from the training texts"
        raise missing_from_hub("tokenizer", name, reachable, hint) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"tokenizer {name!r} is a slow one, expected a fast one (tokenizer.json)")
    tokenizer.model_max_length = max_length
    # Where it was loaded from is no part of the tokenizer; saved again, it would change its bytes.
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    check_tokenizer(tokenizer, name)
    return tokenizer


def train_tokenizer(texts: Sequence[str], vocabulary_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A lower-case WordPiece tokenizer in BERT's manner, trained on `texts`: [CLS] review [SEP].

    The same texts give the same tokenizer, byte for byte. The trainer alone would not: it numbers the alphabet in
    the order of a hash map and breaks ties by these numbers. So a first pass finds the alphabet, and a second one
    gets it sorted, in the place of special tokens.
    """
    specials = list(SPECIAL_TOKENS.values())
    alphabet = sorted(set(_train_vocabulary(texts, 0, specials)) - set(specials))
    vocabulary = _train_vocabulary(texts, vocabulary_size, specials + alphabet)

    tokenizer = _word_pieces(vocabulary)
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **SPECIAL_TOKENS)


def _train_vocabulary(texts: Sequence[str], size: int, first: list[str]) -> dict[str, int]:
    """WordPiece entries and their ids; `first` get the first ids, and the alphabet is in whatever the size."""
    tokenizer = _word_pieces()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=first, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return vocabulary


def _word_pieces(vocabulary: dict[str, int] | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """The token ids of each text, cut at `max_length`; UserError if one cannot be encoded, for want of [UNK] say."""
    try:
        ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    except Exception as error:
        raise UserError(f"the tokenizer cannot encode the reviews: {_first_line(error)}") from error
    return ids


def check_tokenizer(
    tokenizer: PreTrainedTokenizerFast, name: str, vocabulary_size: int | None = None
) -> None:
    """Raise UserError unless the tokenizer can feed the classifier.

    It pads, on the right; it puts one same token first, whose vector is classified; it makes no id beyond the
    model's `vocabulary_size`, or beyond what an embedding can have rows for.
    """
    if tokenizer.pad_token_id is None:
        raise UserError(f"tokenizer {name!r} has no padding token, expected one such as [PAD]")
    try:
        first_ids = {tokenizer(text)["input_ids"][:1][0] for text in ("good film", "a bad one")}
    except Exception as error:
        raise UserError(f"tokenizer {name!r} cannot encode a review: {_first_line(error)}") from error
    if len(first_ids) != 1 or first_ids != {tokenizer.cls_token_id}:
        raise UserError(f"tokenizer {name!r} puts no class token in front, expected one such as [CLS]")
    ids = count_ids(tokenizer)
    if ids > MAX_IDS:
        raise UserError(f"tokenizer {name!r} has an id of {ids - 1:,}, expected ids below {MAX_IDS:,}")
    if vocabulary_size is not None and ids > vocabulary_size:
        found = f"has {ids:,} ids, the model has {vocabulary_size:,}"
        raise UserError(f"tokenizer {name!r} {found}: expected its own one")


def count_ids(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest id, which is what the embedding needs; a vocabulary may have holes."""
    return max(tokenizer.get_vocab().values()) + 1


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
