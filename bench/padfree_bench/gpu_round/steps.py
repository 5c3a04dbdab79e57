"""What the two parts of the GPU round do, the most valuable first, each step within a limit of its own."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from padfree_bench.measuring.results import RESULTS

ROOT = Path(__file__).resolve().parents[3]
CHECKS = "padfree_bench.gpu_round.checks"
COUNTERS = "padfree_bench.gpu_round.counters"
REHEARSE = "--rehearse"
CARRY = ROOT / ".carry"
PART_SECONDS = {"smoke": 240, "main": 510}
# What the driver itself may take, beside its steps: to ask what machine this is, and to write files.
VERSIONS_SECONDS, OVERHEAD_SECONDS = 12, 15
# For the case that a suite is in when its minutes are over: longer where a peer may be compiling, or sequences are long.
GRACE_SECONDS, LONG_GRACE_SECONDS = 12, 30

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

    @property
    def suites(self) -> Path:
        """Where suites write: a rehearsal's quick figures stay apart."""
        return self.folder if self.on_gpu else self.folder.with_name(f"{self.folder.name}-quick")


@dataclass(frozen=True)
class Step:
    """A process, the seconds it may take at least, and what it needs: a GPU to mean anything, a folder that came along.

    A `result` is a suite's, which is told how long it may go on; `{minutes}` in its command says where.
    """

    name: str
    summary: str
    seconds: int
    command: tuple[str, ...]
    needs_gpu: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    needs_folder: Path | None = None
    result: str = ""
    grace: int = GRACE_SECONDS

    def line(self, seconds: float) -> list[str]:
        """The command for a step that has this long."""
        minutes = f"{max(seconds - self.grace, 6) / 60:.2f}"
        return [part.replace("{minutes}", minutes) for part in self.command]


def bench(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "bench", *arguments)


def worker(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", *arguments)


def suite(around: Round, name: str, label: str, *arguments: str) -> tuple[str, ...]:
    """A suite that starts no case once its time is nearly up; without a GPU its quick form."""
    line = [name, "--label", label, "--minutes", "{minutes}", "--no-pictures", "--output", str(around.output)]
    return bench(*line, *(arguments if around.on_gpu else ("--quick",)))


def attention(around: Round, label: str, shapes: tuple[str, ...], *more: str) -> tuple[str, ...]:
    return suite(
        around, "attention", label, "--shapes", ",".join(shapes), "--directions", "forward,both", *more
    )


def sanitized(tool: str) -> tuple[str, ...]:
    """Each of our kernels once under NVIDIA's compute-sanitizer, from PATH or else from a CUDA toolkit."""
    toolkits = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
    program = shutil.which("compute-sanitizer") or str(next(iter(toolkits), "compute-sanitizer"))
    ours = ("--kernel-name", "regex=attention_forward|gradient_kernel|single_query")
    return (program, "--tool", tool, "--error-exitcode", "9", *ours, *worker(CHECKS, "touch"))


def smoke(around: Round) -> list[Step]:
    """Is it right, does it repeat, and the first figures."""
    return [
        Step("warm", "kernels compiled side by side into one cache", 60, warm("smoke", around)),
        Step("agreement", "every row, feature and pattern of padding against fp64 on this device", 50, check("agreement", around)),
        Step("repeats", "thousands of bitwise equal results under load, launched and replayed", 30, check("repeats", around)),
        Step("graph", "a graph replayed on new inputs while another stream allocates", 12, check("graph", around), True),
        Step("headline", "the two headline cases, first figures", 60,
             attention(around, "smoke", HEADLINE, "--peers", FIRST_PEERS), result="attention-smoke"),
    ]  # fmt: skip


def main(around: Round) -> list[Step]:
    """Tune the rows that the headline uses, then all tables."""
    tuned = {"PADFREE_TUNED_ROWS": str(around.folder / "tune.json")}
    table, more = (*HEADLINE, *CONTROL, *OTHER_HEADS), (*PRECISION, *LONG)
    no_caching = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    reviews = CARRY / "reviews"
    return [
        Step("warm", "kernels compiled side by side into one cache", 50, warm("main", around)),
        Step("tune", "the headline's rows of the table against a dozen others", 50,
             bench("tune", "--minutes", "0.75", "--output", str(around.output))),
        Step("warm-tuned", "the headline's other kernels with the tuned rows", 20, warm("tuned", around), False, tuned),
        Step("table", "attention: headline, no padding, other heads; every peer", 100,
             attention(around, "table", table), False, tuned, result="attention-table",
             grace=LONG_GRACE_SECONDS),
        Step("counters", "Nsight Compute on each kernel of the headline: what binds it", 30,
             worker(COUNTERS, str(around.folder)), True),
        Step("train-step", "a training step: the notebook's loop against ours", 60,
             suite(around, "train", "round", "--dtypes", "bf16"), False, tuned, result="train-round"),
        Step("epoch-padfree", f"imdb-train on reviews, {'fused' if around.on_gpu else 'SDPA in its place'}, the second of two epochs", 30, epochs("padfree", around), needs_folder=reviews),
        Step("epoch-sdpa", "imdb-train on the same reviews, SDPA, which plans anew for every width", 40, epochs("sdpa", around), needs_folder=reviews),
        Step("memory", "what a call holds at its peak", 20,
             suite(around, "memory", "round", "--shapes", ",".join(MEMORY), "--peers", FIRST_PEERS), result="memory-round"),
        Step("memcheck", "compute-sanitizer memcheck, each kernel once", 20, sanitized("memcheck"), True, no_caching),
        Step("racecheck", "compute-sanitizer racecheck, each kernel once", 20, sanitized("racecheck"), True, no_caching),
        Step("more", "attention: fp16, fp32, long sequences", 40,
             attention(around, "more", more, "--peers", FIRST_PEERS), result="attention-more", grace=LONG_GRACE_SECONDS),
    ]  # fmt: skip


def our_environment() -> dict[str, str]:
    """This process's, with our own folders before what else Python finds, and never an interpreter."""
    folders = [str(ROOT / folder) for folder in ("kernels", "model", "bench")]
    paths = [*folders, *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "PYTHONPATH": os.pathsep.join(paths)}


def check(name: str, around: Round) -> tuple[str, ...]:
    return worker(CHECKS, name, *rehearsed(around))


def warm(what: str, around: Round) -> tuple[str, ...]:
    return worker("padfree_bench.gpu_round.warm", what, *rehearsed(around))


def epochs(how: str, around: Round) -> tuple[str, ...]:
    return worker("padfree_bench.gpu_round.epochs", how, *rehearsed(around))


def rehearsed(around: Round) -> tuple[str, ...]:
    return () if around.on_gpu else (REHEARSE,)


PARTS: dict[str, Callable[[Round], list[Step]]] = {"smoke": smoke, "main": main}


def round_on_a_cpu() -> Round:
    """A round that is only looked at: for counting limits and kernels."""
    return Round(RESULTS, RESULTS / "cpu", CARRY, on_gpu=False)
