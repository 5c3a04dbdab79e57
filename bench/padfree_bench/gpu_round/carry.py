"""`.carry/`: what a CPU can make before a GPU is at hand, by `python -m bench gpu-round --part prepare`.

Kernels compiled with this machine's Triton (run it where the software is the GPU machine's own), a few thousand
reviews with their tokens, the tokenizer, and which commit this is: all that a copy of the tree without history lacks.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from padfree_bench.gpu_round.steps import CARRY, PREPARE, ROOT, WrongArgument, imdb_train, run, worker
from padfree_bench.measuring.machine import sources_digest

REVIEWS, SEED = 4000, 0
# What a copy of the tree may weigh: files that git knows or would add, and .carry/.
LIMIT_MIB = 64
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
    made_by, member = json.dumps(compiler()).encode(), tarfile.TarInfo(MADE_BY)
    member.size = len(made_by)
    temporary = archive.with_name(f".{archive.name}")
    with tarfile.open(temporary, "w:xz") as tar:
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
    return [f"{k} {made_by.get(k)}, here {value}" for k, value in here.items() if made_by.get(k) != value]


def prepare(reviews: Path | None, tokenizer: Path | None) -> int:
    """Fill .carry/ and print what it weighs; status 1 where it is too heavy or something failed."""
    if (reviews is None) != (tokenizer is None):
        raise WrongArgument("--reviews and --tokenizer belong together")
    for path, fits in ((reviews, Path.is_file), (tokenizer, Path.is_dir)):
        if path is not None and not fits(path):
            raise WrongArgument(f"{path} is no such file or folder")
    CARRY.mkdir(exist_ok=True)
    try:
        changed = _git("status", "--porcelain", "--untracked-files=no").strip()
        commit = {
            "commit": _git("rev-parse", "HEAD").strip(),
            "clean": not changed,
            "sources": sources_digest(),
        }
        (CARRY / "commit").write_text(json.dumps(commit) + "\n")
    except (OSError, subprocess.CalledProcessError):
        raise WrongArgument("prepare needs git and a clone: it carries the commit") from None
    failed = compile_all()
    if reviews is not None and tokenizer is not None:
        failed += carry_reviews(reviews, tokenizer)
    elif not (CARRY / "reviews").is_dir():
        print("no --reviews: the round will not train on reviews")
    weights = {path.name: size_of([path]) for path in sorted(CARRY.iterdir())}
    listed = _git("ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0")
    total = sum(weights.values()) + size_of([ROOT / name for name in listed if name])
    for name, size in weights.items():
        print(f"{size:6.1f} MiB  .carry/{name}")
    print(f"{total:6.1f} MiB of {LIMIT_MIB} with the tree")
    return 1 if failed or total > LIMIT_MIB else 0


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def compile_all() -> int:
    """Compile both parts' kernels and pack them; a launcher is linked against a libcuda that need not be there."""
    cache, status = ROOT / "runs" / "prepared" / sources_digest(), 0
    for other in cache.parent.glob("*"):
        if other != cache:
            shutil.rmtree(other)  # kernels of other sources would be packed too
    with tempfile.TemporaryDirectory() as stub:
        subprocess.run(["gcc", "-shared", "-o", f"{stub}/libcuda.so.1", "-x", "c", os.devnull], check=False)
        environment = {"TRITON_CACHE_DIR": str(cache), "TRITON_LIBCUDA_PATH": stub}
        for part in ("smoke", "main"):
            print(f"compiling {part}", flush=True)
            status |= run(worker("warm", part, PREPARE), environment).returncode
    print(f"{pack(cache, CARRY / 'triton-cache.tar.xz')} files of kernels packed")
    return status


def carry_reviews(reviews: Path, tokenizer: Path) -> int:
    """Draw reviews, copy the tokenizer, and let imdb-train itself cut both splits into tokens on its way."""
    import numpy
    from pyarrow import parquet

    for name in ("reviews", "tokens", "tokenizer"):
        shutil.rmtree(CARRY / name, ignore_errors=True)
    table = parquet.read_table(reviews, columns=["text", "label"])
    drawn = numpy.random.default_rng(SEED).permutation(table.num_rows)[:REVIEWS]
    (CARRY / "reviews").mkdir()
    parquet.write_table(table.take(drawn), CARRY / "reviews" / "train.parquet", compression="zstd")
    shutil.copytree(tokenizer, CARRY / "tokenizer")
    with tempfile.TemporaryDirectory() as scratch:
        line = imdb_train(Path(scratch) / "run", "--epochs", "1", "--no-fused", "--cpu")
        return run(line, {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}).returncode


def size_of(paths: list[Path]) -> float:
    """MiB of files, and of all files in folders."""
    files = (file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]))
    return sum(file.stat().st_size for file in files if file.is_file()) / 2**20
