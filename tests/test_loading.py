"""A checkpoint that somebody else made is refused in one line or loaded as what it says, and runs nothing."""

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from imdb_classifier.checkpoints import checkpoint, weights
from imdb_classifier.checkpoints.checkpoint import MANIFEST, MODEL_FILE
from imdb_classifier.messages import UserError


@pytest.fixture
def folder(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be harmed."""
    return Path(shutil.copytree(finished_run / "last", tmp_path / "checkpoint"))


def without_manifest(folder: Path) -> Path:
    """As a stranger's model would come: nothing to verify it against."""
    (folder / MANIFEST).unlink()
    return folder


def change_config(**fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


def put(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def put_header(header: object, length: int | None = None) -> Callable[[Path], None]:
    encoded = json.dumps(header).encode()
    return put(MODEL_FILE, struct.pack("<Q", len(encoded) if length is None else length) + encoded)


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = weights.load_tensors(folder / MODEL_FILE)
        change(tensors)
        weights.save_tensors(folder / MODEL_FILE, tensors)

    return rewrite


def put_evil_tokenizer_code(folder: Path) -> None:
    evil = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\nclass Evil: pass\n"
    (folder / "evil.py").write_text(evil)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def replace_weights_by_pickle(folder: Path) -> None:
    (folder / MODEL_FILE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")


HOSTILE: dict[str, Callable[[Path], None]] = {
    "pickle in place of weights": replace_weights_by_pickle,
    "pickle named safetensors": put(MODEL_FILE, b"cos\nsystem\n(S'touch ran'\ntR."),
    "empty weights": put(MODEL_FILE, b""),
    "header length of 2^62": put_header({}, 2**62),
    "header without tensors": put_header({}),
    "tensor larger than the file": put_header(
        {"embedding.weight": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}
    ),
    "tensor removed": change_tensors(lambda tensors: tensors.pop("classification.weight")),
    "tensor added": change_tensors(lambda tensors: tensors.update(extra=torch.zeros(1))),
    "integer weights": change_tensors(
        lambda tensors: tensors.update({"classification.bias": torch.zeros(1, dtype=torch.int64)})
    ),
    "weights with NaN": change_tensors(lambda tensors: tensors["classification.bias"].fill_(float("nan"))),
    "config of another model": change_config(model_type="bert"),
    "config with auto_map code": change_config(model_type="evil", auto_map={"AutoConfig": "evil.Evil"}),
    "a billion layers": change_config(n_layers=10**9),
    "a vocabulary of 10^15": change_config(vocab_size=10**15),
    "positions of 10^18": change_config(max_length=10**18),
    "width in words": change_config(d_model="wide"),
    "negative width": change_config(d_model=-32),
    "an int8 vocabulary size": change_config(vocab_size="int8"),
    "config is no JSON": put("config.json", b"\x80\x04"),
    "config nested too deeply": put("config.json", b"[" * 200_000),
    "config is a list": put("config.json", b"[]"),
    "tokenizer with code": put_evil_tokenizer_code,
    "tokenizer is no JSON": put("tokenizer.json", b"\x80\x04"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_is_refused_in_one_line_and_runs_nothing(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    HOSTILE[name](without_manifest(folder))
    monkeypatch.chdir(folder)
    with pytest.raises(UserError) as refusal:
        weights.load_classifier(folder)
    assert len(str(refusal.value).splitlines()) == 1
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "field",
    [
        {"dtype": "int8"},
        {"dtype": 5},
        {"torch_dtype": "float16"},
        {"attn_implementation": "evil"},
        {"_attn_implementation": "foo/bar"},
        {"_attn_implementation_internal": "foo/bar"},
        {"quantization_config": {"load_in_8bit": True}},
        {"_name_or_path": "foo/bar", "auto_map": {"AutoConfig": "evil.Evil"}},
    ],
    ids=str,
)
def test_a_config_chooses_neither_dtype_nor_attention_nor_code(field: dict, folder: Path) -> None:
    expected, _ = weights.load_classifier(folder)
    change_config(**field)(without_manifest(folder))
    model, _ = weights.load_classifier(folder, "eager")
    assert model.config._attn_implementation == "eager"
    assert model.config.to_diff_dict() == expected.config.to_diff_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
        assert model.state_dict()[name].dtype == torch.float32


def test_a_folder_without_a_manifest_loads_with_a_warning(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights.load_classifier(without_manifest(folder))
    assert "cannot be verified" in capsys.readouterr().err


def test_a_checkpoint_is_what_from_pretrained_and_the_pipeline_read(finished_run: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    ours, _ = weights.load_classifier(finished_run / "best")
    model = AutoModelForSequenceClassification.from_pretrained(finished_run / "best")
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "best")
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    assert classify("a great film", truncation=True)[0]["label"] in ("NEGATIVE", "POSITIVE")


def test_no_load_path_knows_pickle() -> None:
    sources = Path(checkpoint.__file__).parent.glob("*.py")
    pattern = re.compile(
        r"\b(pickle|dill|joblib|allow_pickle)\b|(?<!safetensors\.)torch\.(load|save)\(|(?<![.\w])(eval|exec)\("
    )
    found = [
        f"{path.name}: {line}"
        for path in sources
        for line in path.read_text().splitlines()
        if pattern.search(line)
    ]
    assert found == []
