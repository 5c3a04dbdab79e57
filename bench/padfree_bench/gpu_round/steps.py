"""What the two parts of the GPU round do, the most valuable first, each step within a limit of its own."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from padfree_bench.results import RESULTS

ROOT = Path(__file__).resolve().parents[3]
CARRY = ROOT / ".carry"
PART_SECONDS = {"smoke": 240, "main": 480}
# What the driver itself may take, beside its steps: to ask what machine this is, and to write files.
VERSIONS_SECONDS, OVERHEAD_SECONDS = 12, 15

HEADLINE = ("B64-H12-D64-S400-imdb-bf16", "B64-H4-D8-S400-imdb-bf16")
CONTROL = ("B64-H12-D64-S512-full-bf16", "B64-H4-D8-S512-full-bf16")
OTHER_HEADS = ("B64-H16-D128-S400-imdb-bf16", "B64-H8-D16-S400-imdb-bf16", "B64-H4-D32-S400-imdb-bf16")
PRECISION = tuple(case.replace("bf16", dtype) for dtype in ("fp16", "fp32") for case in HEADLINE)
LONG = ("B16-H12-D64-S4096-scaled-bf16", "B4-H12-D64-S16384-scaled-bf16")
MEMORY = ("B128-H12-D64-S512-scaled-bf16", "B16-H12-D64-S4096-scaled-bf16")
FIRST_PEERS = (
    "padfree,padfree-skip,padfree-varlen,sdpa,sdpa-efficient,sdpa-cudnn,varlen_attn,varlen_attn+pack"
)
OUR_PEERS = (
    "padfree",
    "padfree-skip",
    "padfree-varlen",
    "padfree-varlen+pack",
    "padfree-qkv",
    "padfree-nomask",
)


@dataclass(frozen=True)
class Round:
    """Where a round runs: `folder` is the card's, under `output`; `cache` Triton's."""

    output: Path
    folder: Path
    cache: Path
    on_gpu: bool


@dataclass(frozen=True)
class Step:
    """A process, the seconds it may take, and what it needs: a GPU to mean anything, a folder that was brought along."""

    name: str
    summary: str
    seconds: int
    command: tuple[str, ...]
    needs_gpu: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    needs_folder: Path | None = None


def bench(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "bench", *arguments)


def worker(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", *arguments)


def suite(around: Round, name: str, label: str, seconds: int, *arguments: str) -> tuple[str, ...]:
    """A suite that starts no case once its time is nearly up; without a GPU its quick form."""
    line = [name, "--label", label, "--minutes", f"{max(seconds - 12, 6) / 60:.2f}", "--no-pictures"]
    return bench(*line, "--output", str(around.output), *(arguments if around.on_gpu else ("--quick",)))


def attention(
    around: Round, label: str, seconds: int, shapes: tuple[str, ...], *more: str
) -> tuple[str, ...]:
    return suite(around, "attention", label, seconds, "--shapes", ",".join(shapes), *more)


def end_to_end(around: Round, how: str) -> tuple[str, ...]:
    """Two epochs of imdb-train on the reviews that travelled along, in bf16 on a GPU."""
    data = ("--dataset", str(CARRY / "reviews"), "--tokenizer", str(CARRY / "tokenizer"))
    kept = (
        "--cache-dir",
        str(CARRY / "tokens"),
        "--output-dir",
        str(around.folder / f"train-{how}"),
        "--overwrite",
    )
    few = ("--precision", "bf16") if around.on_gpu else ("--limit", "192")
    attention = ("--fused",) if how == "padfree" and around.on_gpu else ("--no-fused",)
    return worker(
        "imdb_classifier.train", *data, *kept, "--preset", "notebook", "--epochs", "2", *attention, *few
    )


def sanitized(tool: str) -> tuple[str, ...]:
    """Each kernel once under NVIDIA's compute-sanitizer, from PATH or else from a CUDA toolkit."""
    toolkits = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
    program = shutil.which("compute-sanitizer") or str(next(iter(toolkits), "compute-sanitizer"))
    return (
        program,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        *worker("padfree_bench.gpu_round.checks", "touch"),
    )


def smoke(around: Round) -> list[Step]:
    """Is it right, does it repeat, and the first figures."""
    checks = "padfree_bench.gpu_round.checks"
    return [
        Step("warm", "kernels compiled side by side into one cache", 60, warm("smoke", around)),
        Step("agreement", "every row, feature and pattern of padding against fp64 on this device", 50, worker(checks, "agreement")),
        Step("repeats", "thousands of bitwise equal results under load, launched and replayed", 30, worker(checks, "repeats")),
        Step("graph", "a graph replayed on new inputs while another stream allocates", 12, worker(checks, "graph"), True),
        Step("headline", "the two headline cases, first figures", 60,
             attention(around, "smoke", 60, HEADLINE, "--directions", "forward,both", "--peers", FIRST_PEERS)),
    ]  # fmt: skip


def main(around: Round) -> list[Step]:
    """Tune the rows that the headline uses, then all tables."""
    tuned = {"PADFREE_TUNED_ROWS": str(around.folder / "tune.json")}
    table = (*HEADLINE, *CONTROL, *OTHER_HEADS)
    no_caching = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Step("warm", "kernels compiled side by side into one cache", 60, warm("main", around)),
        Step("tune", "the headline's rows of the table against a dozen others", 60,
             bench("tune", "--minutes", "0.75", "--output", str(around.output))),
        Step("warm-tuned", "the headline's other kernels with the tuned rows", 20, warm("tuned", around), False, tuned),
        Step("table", "attention: headline, no padding, other heads; every peer", 115,
             attention(around, "table", 115, table, "--directions", "forward,both"), False, tuned),
        Step("train-step", "a training step: the notebook's loop against ours", 60,
             suite(around, "train", "round", 60, "--dtypes", "bf16"), False, tuned),
        Step("epoch-padfree", "imdb-train on reviews, fused", 30, end_to_end(around, "padfree"), needs_folder=CARRY / "reviews"),
        Step("epoch-sdpa", "imdb-train on the same reviews, SDPA", 20, end_to_end(around, "sdpa"), needs_folder=CARRY / "reviews"),
        Step("memory", "what a call holds at its peak", 20,
             suite(around, "memory", "round", 20, "--shapes", ",".join(MEMORY), "--peers", FIRST_PEERS)),
        Step("memcheck", "compute-sanitizer memcheck, each kernel once", 20, sanitized("memcheck"), True, no_caching),
        Step("racecheck", "compute-sanitizer racecheck, each kernel once", 20, sanitized("racecheck"), True, no_caching),
        Step("more", "attention: fp16, fp32, long sequences", 25,
             attention(around, "more", 25, (*PRECISION, *LONG), "--directions", "forward,both", "--peers", FIRST_PEERS)),
    ]  # fmt: skip


def warm(what: str, around: Round) -> tuple[str, ...]:
    return worker("padfree_bench.gpu_round.warm", what, *(() if around.on_gpu else ("--some",)))


PARTS: dict[str, Callable[[Round], list[Step]]] = {"smoke": smoke, "main": main}


def round_on_a_cpu() -> Round:
    """A round that is only looked at: for counting limits and kernels."""
    return Round(RESULTS, RESULTS / "cpu", CARRY, on_gpu=False)
