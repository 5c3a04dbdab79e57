"""Tensors of a checkpoint, in safetensors only: the classifier, the optimizer's state, the random generators."""

import inspect
import os
import re
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedTokenizerFast

from imdb_classifier.checkpoints.checkpoint import MANIFEST, MODEL_FILE, read_json, read_manifest, verify
from imdb_classifier.configuration import TextClassifierConfig
from imdb_classifier.data.tokenization import check_tokenizer, load_tokenizer
from imdb_classifier.messages import UserError, warn
from imdb_classifier.modeling import TextClassifier
from imdb_classifier.packing import serves_packed

MAX_LAYERS = 1_000
CONFIG_FIELDS = {*inspect.get_annotations(TextClassifierConfig), "id2label", "label2id"} - {"attribute_map"}


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # Written through Python rather than by safetensors, so that a full disk is an OSError like any other.
    path.write_bytes(safetensors.torch.save(content, metadata={"format": "pt"}))


def load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from None


def save_classifier(folder: Path, model: TextClassifier, tokenizer: PreTrainedTokenizerFast) -> None:
    """config.json, model.safetensors and the tokenizer, as `from_pretrained` expects them."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)
    save_tensors(folder / MODEL_FILE, model.state_dict())
    # Calls leave their truncation behind; saved, it would depend on what was tokenized before.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # tokenizers raises a bare Exception where Python would raise an OSError.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if type(error) is not Exception or number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder / "tokenizer.json")) from error


def load_classifier(
    folder: Path, attention: str = "sdpa", *, check: bool = True
) -> tuple[TextClassifier, PreTrainedTokenizerFast]:
    """The classifier, in fp32 and eval mode, and its tokenizer; any `attention` runs any checkpoint.

    A folder with a manifest is verified first (`check`), and only the files it lists are read; one without, saved
    by `save_pretrained`, gets a warning. Names, shapes and dtypes are compared with the configuration before any
    weight is allocated; UserError where something is missing, damaged, or does not fit together.
    """
    if (folder / MANIFEST).exists():
        if check:
            verify(folder)
        # A folder of links to these files alone, since transformers reads what it finds beside a tokenizer.
        with tempfile.TemporaryDirectory() as view:
            for name in read_manifest(folder):
                (Path(view) / name).symlink_to(folder.resolve() / name)
            return _load(folder, Path(view), attention)
    warn(f"{folder}: has no {MANIFEST}, its bytes cannot be verified")
    return _load(folder, folder, attention)


def _load(folder: Path, view: Path, attention: str) -> tuple[TextClassifier, PreTrainedTokenizerFast]:
    config = _load_config(folder)
    if config.layout == "packed" and not serves_packed(attention):
        asked = "layout is 'packed', which padfree runs"
        raise UserError(f"{folder / 'config.json'}: {asked} and {attention} does not; with 'auto' both do")
    _check_header(folder / MODEL_FILE, config)
    tokenizer = load_tokenizer(str(view), config.max_length)
    check_tokenizer(tokenizer, str(folder), config.vocab_size)
    model = TextClassifier._from_config(config, attn_implementation=attention)
    model.load_state_dict(load_tensors(folder / MODEL_FILE))
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{folder / MODEL_FILE}: {name} holds NaN or infinity, expected finite weights")
    return model.eval(), tokenizer


def _load_config(folder: Path) -> TextClassifierConfig:
    """What the model is, from the file; dtype and attention are not the file's to choose."""
    file, known = folder / "config.json", TextClassifierConfig.model_type
    content = read_json(file)
    if (found := content.get("model_type")) != known:
        raise UserError(f"{file}: model_type is {found!r}, expected {known!r}")
    try:
        own = {name: value for name, value in content.items() if name in CONFIG_FIELDS}
        config = TextClassifierConfig.from_dict({**own, "dtype": "float32"})
        if config.n_layers > MAX_LAYERS:
            raise ValueError(f"n_layers is {config.n_layers}, expected at most {MAX_LAYERS}")
        if config.num_labels != 2:
            raise ValueError(f"it names {config.num_labels} label, expected the two of a review")
    except Exception as error:  # noqa: BLE001  transformers raises types of its own for a wrong field
        raise UserError(f"{file}: is no usable configuration: {' '.join(str(error).split())}") from None
    return config


def _check_header(path: Path, config: TextClassifierConfig) -> None:
    try:
        with safetensors.safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  no mapping
            found = {name: (list(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from None
    try:
        with torch.device("meta"):
            model = TextClassifier(config)
    except (RuntimeError, OverflowError, TypeError) as error:
        reason = str(error)[:200]
        raise UserError(f"{path}: config.json asks for a model that cannot exist: {reason}") from None
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(set(expected) | set(found)):
        if name not in expected or name not in found:
            problem = "lacks" if name in expected else "holds an unknown"
            raise UserError(f"{path}: {problem} tensor {name}, which does not fit config.json")
        shape, dtype = found[name]
        if shape != expected[name] or dtype not in ("F32", "F16", "BF16"):
            raise UserError(f"{path}: {name} is {dtype} {shape}, expected floats of {expected[name]}")


def save_optimizer(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Every state tensor under `parameter name/state name`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {
        f"{names[cast(Parameter, parameter)]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    save_tensors(path, tensors)


def load_optimizer(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill the optimizer's state; its hyper-parameters stay as they were constructed."""
    by_name: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in load_tensors(path).items():
        parameter, _, key = name.rpartition("/")
        by_name[parameter][key] = tensor
    names = {parameter: name for name, parameter in model.named_parameters()}
    held = {names[parameter]: parameter for group in optimizer.param_groups for parameter in group["params"]}
    if by_name and by_name.keys() != held.keys():
        raise UserError(f"{path}: holds the state of other parameters than the model's")
    for name, entries in by_name.items():
        shape = held[name].shape
        if any(tensor.ndim and tensor.shape != shape for tensor in entries.values()):
            raise UserError(f"{path}: the state of {name} has the wrong shape, expected {list(shape)}")
    state = {index: by_name[name] for index, name in enumerate(held) if name in by_name}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def rng_state() -> dict[str, Tensor]:
    """The generators that this process draws from while training (dropout)."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def save_rng(path: Path, states: list[dict[str, Tensor]]) -> None:
    named = {f"{rank}/{name}": value for rank, state in enumerate(states) for name, value in state.items()}
    save_tensors(path, named)


def load_rng(path: Path, rank: int) -> None:
    tensors = load_tensors(path)
    if f"{rank}/cpu" not in tensors:
        raise UserError(f"{path}: was written by fewer processes than now run, expected the same number")
    torch.set_rng_state(tensors[f"{rank}/cpu"])
    if torch.cuda.is_available() and f"{rank}/cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"{rank}/cuda"])
