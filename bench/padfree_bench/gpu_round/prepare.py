"""`python -m bench gpu-round --part prepare`: what a CPU can make before a GPU is at hand, in .carry/.

Kernels compiled with this machine's Triton (run it where the software is the GPU machine's own), a few thousand
reviews with their tokens, the tokenizer, and which commit this is: all that a copy of the tree without history lacks.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from padfree_bench.gpu_round.carry import pack
from padfree_bench.gpu_round.steps import CARRY, ROOT, our_environment, worker
from padfree_bench.measuring.machine import sources_digest
from padfree_bench.measuring.processes import die_with_parent

REVIEWS, SEED = 4000, 0
# What a copy of the tree may weigh: files that git knows or would add, and .carry/.
LIMIT_MIB = 64


def prepare(reviews: Path | None, tokenizer: Path | None) -> int:
    """Fill .carry/ and print what it weighs; status 1 where it is too heavy or something failed, 2 for a wrong path."""
    if (reviews is None) != (tokenizer is None):
        print("python -m bench gpu-round: --reviews and --tokenizer belong together", file=sys.stderr)
        return 2
    for path, fits in ((reviews, Path.is_file), (tokenizer, Path.is_dir)):
        if path is not None and not fits(path):
            print(f"python -m bench gpu-round: {path} is no such file or folder", file=sys.stderr)
            return 2
    CARRY.mkdir(exist_ok=True)
    try:
        write_commit()
    except (OSError, subprocess.CalledProcessError):
        print(
            "python -m bench gpu-round: prepare needs git and a clone: it carries the commit",
            file=sys.stderr,
        )
        return 2
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


def write_commit() -> None:
    changed = _git("status", "--porcelain", "--untracked-files=no").strip()
    content = {
        "commit": _git("rev-parse", "HEAD").strip(), "clean": not changed, "sources": sources_digest()
    }  # fmt: skip
    (CARRY / "commit").write_text(json.dumps(content) + "\n")


def cache_folder() -> Path:
    """Where kernels of these sources are compiled; what was compiled of others is removed, so that it is not packed."""
    folder = ROOT / "runs" / "prepared" / sources_digest()
    for other in folder.parent.glob("*"):
        if other != folder:
            shutil.rmtree(other)
    return folder


def compile_all() -> int:
    """Compile both parts' kernels and pack them; a launcher is linked against a libcuda that need not be there."""
    packed, cache = CARRY / "triton-cache.tar.xz", cache_folder()
    with tempfile.TemporaryDirectory() as stub:
        subprocess.run(["gcc", "-shared", "-o", f"{stub}/libcuda.so.1", "-x", "c", os.devnull], check=False)
        environment = {
            **our_environment(),
            "TRITON_CACHE_DIR": str(cache),
            "TRITON_LIBCUDA_PATH": stub,
        }
        status = 0
        for part in ("smoke", "main"):
            print(f"compiling {part}", flush=True)
            done = subprocess.run(
                worker("padfree_bench.gpu_round.warm", part, "--prepare"), cwd=ROOT, env=environment, check=False,
                preexec_fn=die_with_parent,
            )  # fmt: skip
            status |= done.returncode
    print(f"{pack(cache, packed)} files of kernels packed")
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
        command = worker(
            "imdb_classifier.commands.train", "--dataset", str(CARRY / "reviews"), "--tokenizer", str(CARRY / "tokenizer"),
            "--cache-dir", str(CARRY / "tokens"), "--preset", "notebook", "--epochs", "1", "--no-fused", "--cpu",
            "--output-dir", f"{scratch}/run",
        )  # fmt: skip
        environment = {**our_environment(), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
        return subprocess.run(
            command, cwd=ROOT, env=environment, check=False, preexec_fn=die_with_parent
        ).returncode


def size_of(paths: list[Path]) -> float:
    """MiB of files, and of all files in folders."""
    files = (file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]))
    return sum(file.stat().st_size for file in files if file.is_file()) / 2**20
