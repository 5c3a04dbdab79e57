"""One checkpoint: whole or not there, and one changed bit is noticed; loading it never runs code.

It is what `from_pretrained` reads (config.json, model.safetensors, the tokenizer) plus optimizer.safetensors,
rng.safetensors, training_state.json and manifest.json, which is written last and carries the SHA-256 of every other
file and of itself.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imdb_classifier.messages import UserError

MANIFEST = "manifest.json"
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
RNG_FILE = "rng.safetensors"
STATE_FILE = "training_state.json"
FORMAT = 1
_FILE_NAME = re.compile(r"\w[\w.-]*")


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
