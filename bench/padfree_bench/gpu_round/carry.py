"""A compile cache as one small file: what a hit needs, and its way into a folder of another name."""

import json
import tarfile
from pathlib import Path

# Triton finds a kernel by these; the other stages of its compilation are ten times as large and never read again.
KEPT = ("*.json", "*.cubin", "*.so")


def pack(cache: Path, archive: Path) -> int:
    """Write what a hit needs of a Triton cache to a .tar.xz, whole or not at all; returns the number of files."""
    files = sorted(file for pattern in KEPT for file in cache.glob(f"*/{pattern}"))
    temporary = archive.with_name(f".{archive.name}")
    with tarfile.open(temporary, "w:xz") as tar:
        for file in files:
            tar.add(file, file.relative_to(cache))
    temporary.replace(archive)
    return len(files)


def unpack(archive: Path, cache: Path) -> None:
    """Put a packed cache here; a group file names its members by absolute path, so each is written anew."""
    cache.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(cache, filter="data")
    for group in cache.glob("*/__grp__*.json"):
        names = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in names}}))
