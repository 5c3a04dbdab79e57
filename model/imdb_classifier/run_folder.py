"""The folder of a training run: it holds one run, one command trains in it, and `--overwrite` empties it late."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imdb_classifier.checkpoint import CHECKPOINTS, positions
from imdb_classifier.errors import UserError

LOCK_FILE = ".lock"
CONTENTS = (CHECKPOINTS, "best", "last", "tensorboard", "metrics.jsonl", "curves.png", "non_finite.json")


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Refuse to mix two runs in one folder, and to resume where there is none; deletes nothing.

    Raises:
        UserError: what stands in `folder` and the two options do not go together.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, expected a folder for the run")
    if resume and not positions(folder):
        raise UserError(f"{folder}: holds no run to resume")
    if positions(folder) and not (resume or overwrite):
        raise UserError(f"{folder}: holds a run already, pass --resume, --overwrite or another --output-dir")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder` and hold it for this process alone, until the end of the block or of the process.

    Raises:
        UserError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as file:
        try:
            # Not flock, whose lock the loader's workers would inherit and hold beyond the death of this process.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"{folder}: another command is training in it, pass another --output-dir"
            ) from None
        yield


def clear(folder: Path) -> None:
    """Delete what an earlier run left in `folder`, and nothing else."""
    for path in (folder / name for name in CONTENTS):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
