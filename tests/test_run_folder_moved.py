"""A run's folder that was copied or moved, with its links or without, is used like the one that was trained."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from imdb_classifier.checkpoints import checkpoint
from imdb_classifier.checkpoints.run_folder import CHECKPOINTS, LINKS, resolve
from imdb_classifier.commands import evaluate, predict, train
from tiny_reviews import train_arguments
from tiny_runs import assert_same_run, snapshot


def copied(run: Path, target: Path) -> None:
    """With its links."""
    shutil.copytree(run, target, symlinks=True)


def copied_with_links_followed(run: Path, target: Path) -> None:
    shutil.copytree(run, target)
    # A link that a kill left half made is followed too.
    shutil.copytree(run / "last", target / ".last")


def relinked(write: Callable[[Path, str], object]) -> Callable[[Path, Path], None]:
    """A copy in which `write(place, target)` puts something in the place of each link."""

    def copy(run: Path, target: Path) -> None:
        copied(run, target)
        for name in LINKS:
            text = os.readlink(target / name)
            (target / name).unlink()
            write(target / name, text)

    return copy


TRAVELS: dict[str, Callable[[Path, Path], None]] = {
    "links kept": copied,
    "links followed": copied_with_links_followed,
    "links as text, as unzip leaves them": relinked(lambda place, text: place.write_text(text)),
    "links as text of Windows": relinked(
        lambda place, text: place.write_bytes(text.replace("/", "\\").encode() + b"\r\n")
    ),
    "absolute links of a place left behind": relinked(
        lambda place, text: place.symlink_to(f"/gone/runs/imdb/{text}")
    ),
    "links lost": relinked(lambda place, text: None),
}


@pytest.mark.parametrize("travel", TRAVELS)
def test_a_run_that_has_travelled_predicts_evaluates_and_resumes(
    travel: str, dataset: Path, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "a copied run"
    TRAVELS[travel](finished_run, run)
    before = snapshot(run)
    names = ("", "best", "last") if travel != "links lost" else ("",)
    for name in names:
        arguments = ["--cpu", "--checkpoint", str(run / name), "--json"]
        answers = []
        for folder in (run, finished_run):
            arguments[2] = str(folder / name)
            assert predict.main([*arguments, "a good film"]) == 0
            answers.append(capsys.readouterr())
        assert answers[0] == answers[1]
        assert evaluate.main(["--cpu", "--checkpoint", str(run / name), "--json"]) == 0
        assert capsys.readouterr().err == ""
    assert snapshot(run) == before
    assert train.main(train_arguments(dataset, run, "--resume")) == 0
    assert capsys.readouterr().err == ""
    assert_same_run(run, finished_run)
    for name in LINKS:
        assert os.readlink(run / name) == os.readlink(finished_run / name)
        assert not os.path.lexists(run / f".{name}")


@pytest.mark.parametrize("harm", ["damaged", "deleted"])
def test_a_copy_that_is_the_last_intact_checkpoint_is_not_lost(
    harm: str, dataset: Path, finished_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    copied_with_links_followed(finished_run, run)
    if harm == "deleted":
        shutil.rmtree(run / CHECKPOINTS)
    else:
        for model in (run / CHECKPOINTS).glob("*/model.safetensors"):
            model.write_bytes(b"")
    assert train.main(train_arguments(dataset, run)) == 2
    assert train.main(train_arguments(dataset, run, "--resume")) == 0
    assert_same_run(run, finished_run)


def test_a_damaged_checkpoint_with_files_of_the_users_makes_no_way_for_its_copy(
    dataset: Path, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    copied_with_links_followed(finished_run, run)
    own = run / CHECKPOINTS / resolve(finished_run / "last").name
    (own / "model.safetensors").write_bytes(b"")
    (own / "notes.txt").write_text("mine")
    assert train.main(train_arguments(dataset, run, "--resume")) == 2
    assert "is damaged and holds other files than a checkpoint's, move it away" in capsys.readouterr().err
    assert (own / "notes.txt").read_text() == "mine"


def users_notes(place: Path) -> None:
    (place / "notes.txt").write_text("mine")


def users_changed_file(place: Path) -> None:
    (place / "config.json").write_text("{}")


def users_folder(place: Path) -> None:
    shutil.rmtree(place)
    place.mkdir()
    users_notes(place)


def users_file(place: Path) -> None:
    shutil.rmtree(place)
    place.write_text("epoch 2, from checkpoints/epoch-0002, was the best of the summer")


def another_run(place: Path) -> None:
    state = checkpoint.read_json(place / checkpoint.STATE_FILE)
    state["settings"]["seed"] = 1
    checkpoint.write_json(place / checkpoint.STATE_FILE, state)
    names = [path.name for path in place.iterdir() if path.name != checkpoint.MANIFEST]
    files = {name: checkpoint.sha256_of(place / name) for name in names}
    (place / checkpoint.MANIFEST).write_bytes(checkpoint._manifest_bytes(files))


@pytest.mark.parametrize("put", [users_notes, users_changed_file, users_folder, users_file, another_run])
@pytest.mark.parametrize("name", LINKS)
def test_what_may_be_the_users_in_the_place_of_a_link_is_kept_and_named(
    put: Callable[[Path], None],
    name: str,
    dataset: Path,
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    put(run / name)
    before = snapshot(run)
    for option in ["--resume"] if put is another_run else ["--resume", "--overwrite"]:
        assert train.main(train_arguments(dataset, run, option)) == 2
        (message,) = capsys.readouterr().err.splitlines()
        assert f"{run / name}: is " in message and message.endswith("move it away")
        assert {path: content for path, content in snapshot(run).items() if path.startswith(name)} == {
            path: content for path, content in before.items() if path.startswith(name)
        }


def test_a_link_to_nothing_is_said(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    copied(finished_run, run)
    (run / "best").unlink()
    (run / "best").symlink_to("checkpoints/epoch-0009-batch-000000")
    assert predict.main(["--cpu", "--checkpoint", str(run / "best"), "a film"]) == 2
    expected = "best: is a link to checkpoints/epoch-0009-batch-000000, which is not there"
    assert expected in capsys.readouterr().err
    assert predict.main(["--cpu", "--checkpoint", str(run), "a film"]) == 0
    assert "best: leads to no checkpoint of this run; taking the newest" in capsys.readouterr().err


def test_a_file_system_without_links_holds_a_run_as_well(
    dataset: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, original = tmp_path / "run", Path.symlink_to

    def refuse_in_run(self: Path, target: Path) -> None:
        if run in self.parents:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        original(self, target)

    monkeypatch.setattr(Path, "symlink_to", refuse_in_run)
    assert train.main(train_arguments(dataset, run, "--epochs", "1")) == 0
    assert train.main(train_arguments(dataset, run, "--resume")) == 0
    for name in LINKS:
        assert resolve(run / name).name == resolve(finished_run / name).name
    assert snapshot(resolve(run)) == snapshot(resolve(finished_run))
