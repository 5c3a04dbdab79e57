"""Checkpoints are whole or not there, notice any change, and run nothing when loaded."""

import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from imdb_classifier.checkpoints import checkpoint, weights
from imdb_classifier.checkpoints.checkpoint import MANIFEST, MODEL_FILE
from imdb_classifier.checkpoints.run_folder import (
    CHECKPOINTS,
    Position,
    newest_intact,
    positions,
    resolve,
    settle,
)
from imdb_classifier.commands import evaluate, predict, train
from imdb_classifier.messages import UserError
from tiny_reviews import train_arguments, write_reviews
from tiny_runs import contents, log_without_clock

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


HARM = (flip_one_bit, truncate, zero_some, append, swap_two_bytes, delete, take_a_neighbours_content)


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
    older = positions(run_folder)[0]
    shutil.copy(run_folder / CHECKPOINTS / older.folder_name / MANIFEST, folder / MANIFEST)
    with pytest.raises(UserError, match="SHA-256 differs"):
        checkpoint.verify(folder)


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/b", "..", ""])
def test_a_manifest_whose_names_lead_out_of_its_folder_is_refused(name: str, folder: Path) -> None:
    (folder / MANIFEST).write_bytes(checkpoint._manifest_bytes({name: "0"}))
    with pytest.raises(UserError, match="is not as it was written"):
        weights.load_classifier(folder, check=False)


def test_resuming_falls_back_to_the_checkpoint_before_a_damaged_one_and_says_so(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(run_folder, tmp_path / "run", symlinks=True))
    *_, before, last = positions(copy)
    flip_one_bit(copy / CHECKPOINTS / last.folder_name / MODEL_FILE, random.Random(1))
    assert newest_intact(copy).name == before.folder_name
    assert "SHA-256 differs" in capsys.readouterr().err
    arguments = train_arguments(run_folder.parent / "reviews", copy, "--save-every", "3", "--resume")
    assert train.main(arguments) == 0
    assert newest_intact(copy).name == last.folder_name
    assert contents(copy / "last") == contents(run_folder / "last")


def test_a_run_without_an_intact_checkpoint_is_refused(run_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run_folder, tmp_path / "run", symlinks=True))
    for path in (copy / CHECKPOINTS).glob(f"*/{MANIFEST}"):
        path.unlink()
    with pytest.raises(UserError, match="holds no intact checkpoint"):
        newest_intact(copy)


# what users and their programs put beside a checkpoint, all of it something that a loader could take for its own
ADDED: dict[str, bytes] = {
    "README.md": b"mine",
    ".DS_Store": b"\0",
    "model.onnx": b"\0",
    "pytorch_model.bin": b"cos\nsystem\n(S'touch ran'\ntR.",
    "adapter_config.json": b"{}",
    "model.safetensors.index.json": b"{}",
    "generation_config.json": b"[]",
    "special_tokens_map.json": b'{"cls_token": "[MASK]"}',
    "added_tokens.json": b'{"film": 7}',
    "chat_template.jinja": b"{{ 1 }}",
    "vocab.txt": b"[PAD]\n[CLS]\n",
    "modeling.py": b"raise SystemExit",
}


def add_files(folder: Path) -> None:
    for name, content in ADDED.items():
        (folder / name).write_bytes(content)


def test_files_added_to_a_checkpoint_are_not_looked_at(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = weights.load_classifier(folder)
    add_files(folder)
    same_model, same_tokenizer = weights.load_classifier(folder)
    for name, saved in (("before", (model, tokenizer)), ("after", (same_model, same_tokenizer))):
        (tmp_path / name).mkdir()
        weights.save_classifier(tmp_path / name, *saved)
    assert contents(tmp_path / "before") == contents(tmp_path / "after")


def test_files_added_to_a_checkpoint_outlive_the_run_that_goes_on(run_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run_folder, tmp_path / "run", symlinks=True))
    for position in positions(copy):
        add_files(copy / CHECKPOINTS / position.folder_name)
    kept = positions(copy)
    more = ("--save-every", "3", "--epochs", "3", "--resume")
    assert train.main(train_arguments(run_folder.parent / "reviews", copy, *more)) == 0
    for position in kept:
        found = contents(copy / CHECKPOINTS / position.folder_name)
        assert ADDED.items() <= found.items()
    assert evaluate.main(["--checkpoint", str(copy)]) == 0
    assert predict.main(["--checkpoint", str(copy), "a good film"]) == 0
    # The run went on from its newest checkpoint, not from the one before it.
    undisturbed = Path(shutil.copytree(run_folder, tmp_path / "undisturbed", symlinks=True))
    assert train.main(train_arguments(run_folder.parent / "reviews", undisturbed, *more)) == 0
    assert log_without_clock(copy) == log_without_clock(undisturbed)


def save_once(run: Path, position: Position) -> None:
    """What training does at each save, with files that take no time to write."""

    def fill(building: Path) -> None:
        for name in ("config.json", MODEL_FILE, checkpoint.STATE_FILE):
            (building / name).write_bytes(f"{name} at {position}".encode())

    checkpoint.write_folder(run / CHECKPOINTS / position.folder_name, fill)
    settle(run, position, position)


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
        intact = newest_intact(run)
        assert intact.name in (Position(1, 1).folder_name, Position(1, 2).folder_name, target.folder_name)
        # What the crash left behind does not disturb the next save.
        save_once(run, Position(1, 4))
        assert newest_intact(run).name == Position(1, 4).folder_name
        assert resolve(run).name == Position(1, 4).folder_name
        names = {path.name for path in (run / CHECKPOINTS).iterdir()}
        assert not any(name.startswith(".") for name in names)
        if not killed:
            break
    else:
        pytest.fail("the save never came to its end")
    assert number > 30


def test_only_the_last_two_checkpoints_and_the_best_are_kept(run_folder: Path) -> None:
    best = (run_folder / "best").resolve().name
    kept = [position.folder_name for position in positions(run_folder)]
    assert set(kept) <= {*kept[-2:], best}
    assert (run_folder / "last").resolve().name == kept[-1]
