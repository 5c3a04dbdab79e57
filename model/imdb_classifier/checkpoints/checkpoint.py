"""Checkpoints that are whole or not there, that notice one changed bit, and that never run code when loaded.

A run folder holds `checkpoints/epoch-EEEE-batch-BBBBBB` (E epochs done and B batches of the next one) and the links
`last` and `best`. Each checkpoint is what `from_pretrained` reads (config.json, model.safetensors, the tokenizer) plus
optimizer.safetensors, rng.safetensors, training_state.json and manifest.json, which is written last and carries the
SHA-256 of every other file and of itself.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imdb_classifier.messages import UserError, warn

CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
RNG_FILE = "rng.safetensors"
STATE_FILE = "training_state.json"
FORMAT = 1
KEPT_BEHIND_LAST = 1
LINKS = ("last", "best")
MAXLINK_BYTES = 4096
_FILE_NAME = re.compile(r"\w[\w.-]*")
_NAME = re.compile(r"epoch-(\d{4,})-batch-(\d{6,})")
# what such a link says, in a relative or an absolute path and with either system's separators
LINK = re.compile(rf"(?:.*[/\\])?{CHECKPOINTS}[/\\]({_NAME.pattern})[/\\]?\s*")


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


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make `folder` with what `fill` writes into it and a manifest, so that it appears complete or not at all.

    Everything goes to a temporary neighbour, is flushed to the disk and renamed; a crash at any instant leaves
    either no `folder` or a whole one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = folder.with_name(f".building-{folder.name}")
    remove(building)
    building.mkdir()
    try:
        fill(building)
        files = {path.name: sha256_of(path) for path in building.iterdir()}
        (building / MANIFEST).write_bytes(_manifest_bytes(files))
        for path in (*building.iterdir(), building):
            _flush(path)
        remove(folder)
        os.rename(building, folder)
        _flush(folder.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def remove(folder: Path) -> None:
    """Delete a folder; renamed first, so that no half-deleted checkpoint keeps its name."""
    if folder.exists():
        doomed = folder.with_name(f".deleting-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
        shutil.rmtree(doomed)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_bytes(files: dict[str, str]) -> bytes:
    body = {"format": FORMAT, "files": files}
    seal = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "sha256": seal}, sort_keys=True, indent=1) + "\n").encode()


def read_manifest(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a checkpoint, by its name; UserError unless its manifest is as it was written."""
    try:
        written = (folder / MANIFEST).read_bytes()
        files = json.loads(written)["files"]
        if not isinstance(files, dict) or _manifest_bytes(files) != written:
            raise ValueError
        if not all(_FILE_NAME.fullmatch(name) for name in files):
            raise ValueError("a name that leads out of the folder")
    except FileNotFoundError:
        raise UserError(f"{folder}: has no {MANIFEST}, expected a complete checkpoint") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{folder / MANIFEST}: is not as it was written, the checkpoint is damaged") from None
    return files


def verify(folder: Path) -> None:
    """Raise UserError unless every byte of a checkpoint is as its manifest says; other files are not looked at."""
    for name, expected in sorted(read_manifest(folder).items()):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: is missing, the checkpoint is damaged")
        if sha256_of(folder / name) != expected:
            raise UserError(f"{folder / name}: SHA-256 differs from {MANIFEST}, the checkpoint is damaged")


def is_intact(folder: Path) -> bool:
    try:
        verify(folder)
    except UserError:
        return False
    return True


def holds_other_files(folder: Path, like: Path | None = None) -> bool:
    """Whether somebody has put files of their own into a checkpoint that is otherwise readable, or `like` one."""
    try:
        own = read_manifest(like or folder).keys() | {MANIFEST}
    except UserError:
        return False
    return any(path.name not in own for path in folder.iterdir())


def positions(run_folder: Path) -> list[Position]:
    """Where the run's checkpoints stand, oldest first, whether they are intact or not."""
    found = (_NAME.fullmatch(path.name) for path in (run_folder / CHECKPOINTS).glob("epoch-*"))
    return sorted(Position(int(match[1]), int(match[2])) for match in found if match)


def newest_intact(run_folder: Path) -> Path:
    """The newest checkpoint that passes `verify`, with a warning for each newer one; UserError if there is none."""
    for position in reversed(positions(run_folder)):
        folder = position.folder_in(run_folder)
        try:
            verify(folder)
        except UserError as error:
            warn(f"{error}; trying the checkpoint before it")
        else:
            return folder
    raise UserError(f"{run_folder}: holds no intact checkpoint to resume from")


def resolve(path: Path) -> Path:
    """The checkpoint folder that a path on the command line means: itself, or a run's best, else newest."""
    if (path / CHECKPOINTS).is_dir():
        best = path / "best"
        if os.path.lexists(best) and led_to(best) is None:
            warn(f"{best}: leads to no checkpoint of this run; taking the newest")
        return led_to(best) or newest_intact(path).resolve()
    if folder := led_to(path):
        return folder
    if path.is_symlink():
        raise UserError(f"{path}: is a link to {os.readlink(path)}, which is not there")
    if path.exists():
        raise UserError(f"{path}: is a file, expected a checkpoint folder")
    raise UserError(f"{path}: no such checkpoint, train one with imdb-train or pass --checkpoint")


def led_to(link: Path) -> Path | None:
    """The folder that `best` or `last` of a run means, also where the run has travelled; None if there is none.

    Copied with links followed it is a folder itself; unpacked without links it is a file that holds the link's target;
    and a link to an absolute path leads nowhere once the run has moved, but names a checkpoint of it.
    """
    if link.is_dir():
        return link.resolve()
    match = LINK.fullmatch(written_in(link))
    folder = link.parent / CHECKPOINTS / match[1] if match else link
    return folder.resolve() if folder.is_dir() else None


def written_in(link: Path) -> str:
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
        if position != best and not holds_other_files(folder):
            remove(folder)
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
        # A file system without links; `led_to` reads the text of one as well.
        temporary.write_text(target, encoding="utf-8")
    os.replace(temporary, run_folder / link)


def other_version(folder: Path) -> UserError:
    return UserError(f"{folder}: was written by another version of this program, which must finish it")


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: is missing, expected a checkpoint folder") from None
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path}: cannot be read as JSON") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object")
    return content
