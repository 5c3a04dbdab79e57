"""A compile cache as one small file: what a hit needs, and its way into a folder of another name."""

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

# Triton finds a kernel by these; the other stages of its compilation are ten times as large and never read again.
KEPT = ("*.json", "*.cubin", "*.so")
MADE_BY = "compiler.json"


def compiler() -> dict[str, str]:
    """What decides whether a cache of compiled kernels serves here."""
    import triton
    from triton.runtime.cache import triton_key

    package = Path(triton.__file__).parent
    ptxas = package / "backends" / "nvidia" / "bin" / "ptxas"
    said = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256((package / "_C" / "libtriton.so").read_bytes()).hexdigest()
    return {
        "triton": triton.__version__,
        "libtriton_sha256": digest[:16],
        "triton_key_sha256": hashlib.sha256(triton_key().encode()).hexdigest()[:16],
        "ptxas": said.strip().splitlines()[-1] if said.strip() else "?",
    }


def pack(cache: Path, archive: Path) -> int:
    """Write what a hit needs of a Triton cache to a .tar.xz, whole or not at all; returns the number of files."""
    files = sorted(file for pattern in KEPT for file in cache.glob(f"*/{pattern}"))
    made_by = json.dumps(compiler()).encode()
    temporary = archive.with_name(f".{archive.name}")
    with tarfile.open(temporary, "w:xz") as tar:
        member = tarfile.TarInfo(MADE_BY)
        member.size = len(made_by)
        tar.addfile(member, io.BytesIO(made_by))
        for file in files:
            tar.add(file, file.relative_to(cache))
    temporary.replace(archive)
    return len(files)


def unpack(archive: Path, cache: Path) -> list[str]:
    """Put a packed cache here; returns what differs between the compiler that made it and this machine's.

    A group file names its members by absolute path, so each is written anew.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(cache, filter="data")
    for group in cache.glob("*/__grp__*.json"):
        names = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in names}}))
    made_by, here = json.loads((cache / MADE_BY).read_text()), compiler()
    return [
        f"{name} {made_by.get(name)}, here {value}"
        for name, value in here.items()
        if made_by.get(name) != value
    ]
