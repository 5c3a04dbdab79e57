"""The folder of a training run: it holds one run, one command trains in it, and `--overwrite` empties it late.

It holds `checkpoints/epoch-EEEE-batch-BBBBBB` (E epochs done and B batches of the next one) and the links `last` and
`best`, which may have become folders or text files on the way from one machine to another.
"""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from imdb_classifier.checkpoints import checkpoint
from imdb_classifier.messages import UserError, warn

CHECKPOINTS = "checkpoints"
KEPT_BEHIND_LAST = 1
LINKS = ("last", "best")
MAXLINK_BYTES = 4096
LOCK_FILE = ".lock"
METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "curves.png"
DIAGNOSTIC_FILE = "non_finite.json"
BOARD_FOLDER = "tensorboard"
CONTENTS = (CHECKPOINTS, *LINKS, METRICS_FILE, PLOT_FILE, DIAGNOSTIC_FILE, BOARD_FOLDER)
_NAME = re.compile(r"epoch-(\d{4,})-batch-(\d{6,})")
# what such a link says, in a relative or an absolute path and with either system's separators
_LINK = re.compile(rf"(?:.*[/\\])?{CHECKPOINTS}[/\\]({_NAME.pattern})[/\\]?\s*")


@dataclass(frozen=True, order=True)
class Position:
    """Where a run stands: `epoch` epochs done and `batch` batches of the next one."""

    epoch: int = 0
    batch: int = 0

    @property
    def folder_name(self) -> str:
        return f"epoch-{self.epoch:04d}-batch-{self.batch:06d}"

    def folder_in(self, run_folder: Path) -> Path:
        return run_folder / CHECKPOINTS / self.folder_name


def positions(run_folder: Path) -> list[Position]:
    """Where the run's checkpoints stand, oldest first, whether they are intact or not."""
    found = (_NAME.fullmatch(path.name) for path in (run_folder / CHECKPOINTS).glob("epoch-*"))
    return sorted(Position(int(match[1]), int(match[2])) for match in found if match)


def newest_intact(run_folder: Path) -> Path:
    """The newest checkpoint that passes `verify`, with a warning for each newer one; UserError if there is none."""
    for position in reversed(positions(run_folder)):
        folder = position.folder_in(run_folder)
        try:
            checkpoint.verify(folder)
        except UserError as error:
            warn(f"{error}; trying the checkpoint before it")
        else:
            return folder
    raise UserError(f"{run_folder}: holds no intact checkpoint to resume from")


def resolve(path: Path) -> Path:
    """The checkpoint folder that a path on the command line means: itself, or a run's best, else newest."""
    if (path / CHECKPOINTS).is_dir():
        best = path / "best"
        if os.path.lexists(best) and _led_to(best) is None:
            warn(f"{best}: leads to no checkpoint of this run; taking the newest")
        return _led_to(best) or newest_intact(path).resolve()
    if folder := _led_to(path):
        return folder
    if path.is_symlink():
        raise UserError(f"{path}: is a link to {os.readlink(path)}, which is not there")
    if path.exists():
        raise UserError(f"{path}: is a file, expected a checkpoint folder")
    raise UserError(f"{path}: no such checkpoint, train one with imdb-train or pass --checkpoint")


def _led_to(link: Path) -> Path | None:
    """The folder that `best` or `last` of a run means, also where the run has travelled; None if there is none.

    Copied with links followed it is a folder itself; unpacked without links it is a file that holds the link's target;
    and a link to an absolute path leads nowhere once the run has moved, but names a checkpoint of it.
    """
    if link.is_dir():
        return link.resolve()
    match = _LINK.fullmatch(_written_in(link))
    folder = link.parent / CHECKPOINTS / match[1] if match else link
    return folder.resolve() if folder.is_dir() else None


def _written_in(link: Path) -> str:
    if link.is_symlink():
        return os.readlink(link)
    if not link.is_file() or link.stat().st_size > MAXLINK_BYTES:
        return ""
    return link.read_bytes().decode("utf-8", "replace")


def settle(run_folder: Path, last: Position, best: Position | None) -> None:
    """What follows a save: lead the links to its checkpoint and the best one, and delete what is not needed.

    Kept are the newest checkpoint, the one before it, the best, and any that holds files of somebody else. What
    crashes left half written or half deleted goes. Interrupted, it can be done again.
    """
    _point_to(run_folder, "last", last)
    _point_to(run_folder, "best", best)
    for position in positions(run_folder)[: -1 - KEPT_BEHIND_LAST]:
        folder = position.folder_in(run_folder)
        if position != best and not checkpoint.holds_other_files(folder):
            checkpoint.remove(folder)
    for pattern in (f"{CHECKPOINTS}/.building-*", f"{CHECKPOINTS}/.deleting-*", ".deleting-*"):
        for leftover in run_folder.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def _point_to(run_folder: Path, link: str, position: Position | None) -> None:
    """Make `run_folder/link` lead to a checkpoint, in one step, or to none."""
    if position is None:
        (run_folder / link).unlink(missing_ok=True)
        return
    temporary = run_folder / f".{link}"
    temporary.unlink(missing_ok=True)
    target = f"{CHECKPOINTS}/{position.folder_name}"
    try:
        temporary.symlink_to(target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        # A file system without links; `_led_to` reads the text of one as well.
        temporary.write_text(target, encoding="utf-8")
    os.replace(temporary, run_folder / link)


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
        if is_text and not _LINK.fullmatch(_written_in(place)):
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
            own = Position(**state["position"]).folder_in(run_folder)
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
