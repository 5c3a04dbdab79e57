"""The folder of a training run: it holds one run, one command trains in it, and `--overwrite` empties it late."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imdb_classifier.checkpoints import checkpoint
from imdb_classifier.checkpoints.checkpoint import CHECKPOINTS, LINKS, positions
from imdb_classifier.messages import UserError

LOCK_FILE = ".lock"
CONTENTS = (CHECKPOINTS, *LINKS, "tensorboard", "metrics.jsonl", "curves.png", "non_finite.json")


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise UserError rather than mix two runs in one folder, or resume where there is none; deletes nothing."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, expected a folder for the run")
    check_links(folder)
    holds_run = bool(positions(folder) or copies(folder))
    if resume and not holds_run:
        raise UserError(f"{folder}: holds no run to resume")
    if holds_run and not (resume or overwrite):
        raise UserError(f"{folder}: holds a run already, pass --resume, --overwrite or another --output-dir")


def _link_places(run_folder: Path) -> list[Path]:
    """Where a run's links stand, and where each is made before it is renamed."""
    return [run_folder / name for link in LINKS for name in (link, f".{link}")]


def copies(run_folder: Path) -> list[Path]:
    """The folders that stand in the place of the run's links, as after a copy that followed them."""
    return [place for place in _link_places(run_folder) if place.is_dir() and not place.is_symlink()]


def check_links(run_folder: Path) -> None:
    """Raise UserError where something that may be the user's stands in the place of a link.

    That is what is neither a link, nor the text of one, nor an intact checkpoint without other files in it.
    """
    for copy in copies(run_folder):
        if not checkpoint.is_intact(copy) or checkpoint.holds_other_files(copy):
            raise UserError(f"{copy}: is a folder that is not just an intact checkpoint, move it away")
    for place in _link_places(run_folder):
        is_text = place.is_file() and not place.is_symlink()
        if is_text and not checkpoint.LINK.fullmatch(checkpoint.written_in(place)):
            raise UserError(f"{place}: is a file, expected a link to a checkpoint; move it away")


def adopt_copies(run_folder: Path) -> None:
    """Make way for links where `best` and `last` are folders; no intact checkpoint is lost by it.

    A copy whose checkpoint is missing or damaged among the run's own takes its place, any other goes. Raises UserError
    as `check_links` does, and where a copy is of another run.
    """
    check_links(run_folder)
    for copy in copies(run_folder):
        try:
            state = checkpoint.read_json(copy / checkpoint.STATE_FILE)["state"]
            own = checkpoint.Position(**state["position"]).folder_in(run_folder)
        except (KeyError, TypeError):
            raise checkpoint.other_version(copy) from None
        if not checkpoint.is_intact(own):
            if own.is_dir() and checkpoint.holds_other_files(own, like=copy):
                raise UserError(f"{own}: is damaged and holds other files than a checkpoint's, move it away")
            own.parent.mkdir(exist_ok=True)
            checkpoint.remove(own)
            copy.rename(own)
        elif checkpoint.read_manifest(own) == checkpoint.read_manifest(copy):
            checkpoint.remove(copy)
        else:
            raise UserError(f"{copy}: is not the checkpoint of the same name in {CHECKPOINTS}, move it away")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder` and hold it, until the block or the process ends; UserError where another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as file:
        try:
            # Not flock, whose lock the loader's workers would inherit and hold beyond the death of this process.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            fault = f"{folder}: another command is training in it, pass another --output-dir"
            raise UserError(fault) from None
        yield


def clear(folder: Path) -> None:
    """Delete what an earlier run left in `folder`, and nothing else."""
    for path in (folder / name for name in CONTENTS):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
