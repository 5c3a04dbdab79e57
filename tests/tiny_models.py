"""Small random-weight models, transformers' families and our classifier, and batches padded in every way."""

from contextlib import contextmanager

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface

from imdb_classifier.configuration import PRESETS, TextClassifierConfig
from imdb_classifier.modeling import TextClassifier
from padfree.integrations import transformers as integration

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
MARKERS = {"bos_token_id": 1, "eos_token_id": 2}


def make_config(family):
    match family:
        case "bert":
            return transformers.BertConfig(**SIZES)
        case "distilbert":
            return transformers.DistilBertConfig(
                vocab_size=99, dim=32, n_layers=3, n_heads=4, hidden_dim=48, max_position_embeddings=64
            )
        case "roberta":
            return transformers.RobertaConfig(**SIZES)
        case "modernbert":  # window of 4 to each side in 2 of 3 layers
            return transformers.ModernBertConfig(
                **SIZES, **MARKERS, cls_token_id=1, sep_token_id=2, local_attention=8
            )
        case "eurobert":  # 2 key/value heads for 4 query heads
            return transformers.EuroBertConfig(**SIZES, **MARKERS, num_key_value_heads=2)
        case "t5":  # trainable position bias, no scaling
            return transformers.T5Config(
                vocab_size=99,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="relu",
            )
        case "gpt2":
            return transformers.GPT2Config(
                vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, **MARKERS
            )
        case "mpnet":
            return transformers.MPNetConfig(**SIZES)
        case "deberta-v2":
            return transformers.DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"])
    raise KeyError(family)


FUSED = ("bert", "distilbert", "roberta", "modernbert", "eurobert", "t5")
OWN_ATTENTION = ("mpnet", "deberta-v2")
FAMILIES = (*FUSED, "gpt2", *OWN_ATTENTION)


def make_model(family, attention=None, **changes):
    config = make_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    if attention is not None:
        config._attn_implementation = attention
    torch.manual_seed(0)
    model_class = transformers.T5EncoderModel if family == "t5" else transformers.AutoModel
    return (model_class(config) if family == "t5" else model_class.from_config(config)).eval()


def make_batch(pad=("right", "left", "holes", "none")):
    torch.manual_seed(1)
    mask = torch.ones(len(pad), 24, dtype=torch.long)
    for row, kind in zip(mask, pad, strict=True):
        hidden = {
            "right": slice(15, None),
            "left": slice(0, 7),
            "holes": slice(5, 9),
            "none": slice(0, 0),
            "all": slice(0, None),
        }
        row[hidden[kind]] = 0
    return {"input_ids": torch.randint(3, 99, mask.shape), "attention_mask": mask}


def max_error(actual, expected, attention_mask):
    """Largest difference over real tokens; what stands at padding is nobody's business."""
    return (actual - expected)[attention_mask.bool()].abs().max().item()


@contextmanager
def own_registration():
    """What is registered and counted inside is undone: transformers' tables belong to the whole process."""
    saved = [(table, dict(table._global_mapping)) for table in (AttentionInterface, AttentionMaskInterface)]
    integration.reset_counts()
    try:
        yield
    finally:
        integration.reset_counts()
        for table, mapping in saved:
            table._global_mapping.clear()
            table._global_mapping.update(mapping)


VOCABULARY = 60


def make_classifier(preset="notebook", attention="sdpa", **changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "max_length": 40, **PRESETS[preset], **changes}
    config = TextClassifierConfig(**sizes)
    config._attn_implementation = attention
    return TextClassifier(config).eval()


def make_reviews(lengths=(40, 1, 17, 33)):
    """Token ids [B, 40], padded with 0 on the right."""
    torch.manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (len(lengths), 40))
    return ids.masked_fill(torch.arange(40) >= torch.tensor(lengths)[:, None], 0)


def logit(output):
    """z from the two columns [-z/2, z/2]."""
    return output.logits[:, 1] - output.logits[:, 0]
