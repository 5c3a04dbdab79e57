"""Checkpoints are whole or not there, notice any change, and run nothing when loaded."""

import json
import os
import random
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from imdb_classifier import checkpoint, train, weights
from imdb_classifier.checkpoint import MANIFEST, MODEL_FILE, Position
from imdb_classifier.errors import UserError
from tiny_reviews import train_arguments, write_reviews
from tiny_runs import contents

MUTATIONS = 300


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    arguments = train_arguments(write_reviews(folder / "reviews"), folder / "run", "--save-every", "3")
    assert train.main(arguments) == 0
    return folder / "run"


@pytest.fixture
def folder(run_folder: Path, tmp_path: Path) -> Path:
    """A copy of the last checkpoint, to be harmed."""
    return Path(shutil.copytree(run_folder / "last", tmp_path / "checkpoint"))


def flip_one_bit(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def zero_some(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    while not any(content[at : at + 64]):
        at = draw.randrange(len(content))
    content[at : at + 64] = bytes(len(content[at : at + 64]))
    path.write_bytes(content)


def append(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randint(1, 9)))


def swap_two_bytes(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    first = draw.randrange(len(content))
    second = draw.choice([at for at in range(len(content)) if content[at] != content[first]])
    content[first], content[second] = content[second], content[first]
    path.write_bytes(content)


def delete(path: Path, draw: random.Random) -> None:
    path.unlink()


def take_a_neighbours_content(path: Path, draw: random.Random) -> None:
    others = [other for other in path.parent.iterdir() if other.read_bytes() != path.read_bytes()]
    path.write_bytes(draw.choice(sorted(others)).read_bytes())


def add_a_file(path: Path, draw: random.Random) -> None:
    names = [
        "pytorch_model.bin",
        "adapter_config.json",
        "modeling.py",
        "model.safetensors.index.json",
        ".hidden",
    ]
    (path.parent / draw.choice(names)).write_bytes(b"{}")


HARM = (
    flip_one_bit,
    truncate,
    zero_some,
    append,
    swap_two_bytes,
    delete,
    take_a_neighbours_content,
    add_a_file,
)


def test_every_mutation_of_a_checkpoint_is_detected(folder: Path) -> None:
    draw = random.Random(0)
    names = sorted(path.name for path in folder.iterdir())
    original = {name: (folder / name).read_bytes() for name in names}
    checkpoint.verify(folder)
    undetected = []
    for number in range(MUTATIONS):
        harm, name = HARM[number % len(HARM)], names[number // len(HARM) % len(names)]
        harm(folder / name, draw)
        try:
            checkpoint.verify(folder)
            undetected.append((harm.__name__, name))
        except UserError as error:
            assert len(str(error).splitlines()) == 1
        for path in folder.iterdir():
            path.unlink()
        for restored, content in original.items():
            (folder / restored).write_bytes(content)
    assert undetected == []
    checkpoint.verify(folder)


def test_a_manifest_of_an_older_checkpoint_is_detected(run_folder: Path, folder: Path) -> None:
    older = checkpoint.positions(run_folder)[0]
    shutil.copy(run_folder / checkpoint.CHECKPOINTS / older.folder_name / MANIFEST, folder / MANIFEST)
    with pytest.raises(UserError, match="SHA-256 differs"):
        checkpoint.verify(folder)


def test_resuming_falls_back_to_the_checkpoint_before_a_damaged_one_and_says_so(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(run_folder, tmp_path / "run", symlinks=True))
    *_, before, last = checkpoint.positions(copy)
    flip_one_bit(copy / checkpoint.CHECKPOINTS / last.folder_name / MODEL_FILE, random.Random(1))
    assert checkpoint.newest_intact(copy).name == before.folder_name
    assert "SHA-256 differs" in capsys.readouterr().err
    arguments = train_arguments(run_folder.parent / "reviews", copy, "--save-every", "3", "--resume")
    assert train.main(arguments) == 0
    assert checkpoint.newest_intact(copy).name == last.folder_name
    assert contents(copy / "last") == contents(run_folder / "last")


def test_a_run_without_an_intact_checkpoint_is_refused(run_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run_folder, tmp_path / "run", symlinks=True))
    for path in (copy / checkpoint.CHECKPOINTS).glob(f"*/{MANIFEST}"):
        path.unlink()
    with pytest.raises(UserError, match="holds no intact checkpoint"):
        checkpoint.newest_intact(copy)


def save_once(run: Path, position: Position) -> None:
    """What training does at each save, with files that take no time to write."""

    def fill(building: Path) -> None:
        for name in ("config.json", MODEL_FILE, checkpoint.STATE_FILE):
            (building / name).write_bytes(f"{name} at {position}".encode())

    checkpoint.write_folder(run / checkpoint.CHECKPOINTS / position.folder_name, fill)
    checkpoint.point_to(run, "last", position)
    checkpoint.point_to(run, "best", position)
    checkpoint.prune(run, position)


def in_a_child_killed_at_call(number: int, work: Callable[[], None]) -> bool:
    """Run `work` in a fork that dies at its `number`-th file system call; False if it came to its end first."""
    child = os.fork()
    if child == 0:
        left = number

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event.startswith(("open", "os.", "shutil.")) and left >= 0:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), 9)

        sys.addaudithook(count)
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


@pytest.mark.parametrize("again", [False, True], ids=["new position", "same position"])
def test_kill_at_any_file_system_call_of_a_save_leaves_an_intact_checkpoint(
    tmp_path: Path, again: bool
) -> None:
    target = Position(1, 2) if again else Position(1, 3)
    for number in range(1_000):
        run = tmp_path / str(number)
        for batch in range(3):
            save_once(run, Position(1, batch))
        killed = in_a_child_killed_at_call(number, lambda run=run: save_once(run, target))
        intact = checkpoint.newest_intact(run)
        assert intact.name in (Position(1, 1).folder_name, Position(1, 2).folder_name, target.folder_name)
        # What the crash left behind does not disturb the next save.
        save_once(run, Position(1, 4))
        assert checkpoint.newest_intact(run).name == Position(1, 4).folder_name
        assert checkpoint.resolve(run).name == Position(1, 4).folder_name
        names = {path.name for path in (run / checkpoint.CHECKPOINTS).iterdir()}
        assert not any(name.startswith(".") for name in names)
        if not killed:
            break
    else:
        pytest.fail("the save never came to its end")
    assert number > 30


def test_only_the_last_two_checkpoints_and_the_best_are_kept(run_folder: Path) -> None:
    best = (run_folder / "best").resolve().name
    kept = [position.folder_name for position in checkpoint.positions(run_folder)]
    assert set(kept) <= {*kept[-2:], best}
    assert (run_folder / "last").resolve().name == kept[-1]


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


def test_a_folder_without_a_manifest_loads_with_a_warning(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights.load_classifier(without_manifest(folder))
    assert "cannot be verified" in capsys.readouterr().err


def test_a_checkpoint_is_what_from_pretrained_and_the_pipeline_read(run_folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    ours, _ = weights.load_classifier(run_folder / "best")
    model = AutoModelForSequenceClassification.from_pretrained(run_folder / "best")
    tokenizer = AutoTokenizer.from_pretrained(run_folder / "best")
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
