"""What the two parts of the GPU round do, the most valuable first, each step within a limit of its own."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from padfree_bench.measuring.headline import HEADLINE, TUNED_ROWS
from padfree_bench.measuring.processes import die_with_parent

ROOT = Path(__file__).resolve().parents[3]
REHEARSE, PREPARE = "--rehearse", "--prepare"
CARRY = ROOT / ".carry"
BENCH = (sys.executable, "-m", "bench")
PART_SECONDS = {"smoke": 240, "main": 510}
# What the driver itself may take, beside its steps: to ask what machine this is, and to write files.
VERSIONS_SECONDS, OVERHEAD_SECONDS = 12, 15
# For the case that a suite is in when its minutes are over: longer where a peer may be compiling, or sequences are long.
GRACE_SECONDS, LONG_GRACE_SECONDS = 12, 30

CONTROL = ("B64-H12-D64-S512-full-bf16", "B64-H4-D8-S512-full-bf16")
OTHER_HEADS = ("B64-H16-D128-S400-imdb-bf16", "B64-H8-D16-S400-imdb-bf16", "B64-H4-D32-S400-imdb-bf16")
PRECISION = tuple(case.replace("bf16", dtype) for dtype in ("fp16", "fp32") for case in HEADLINE)
LONG = ("B16-H12-D64-S4096-scaled-bf16", "B4-H12-D64-S16384-scaled-bf16")
MEMORY = ("B128-H12-D64-S512-scaled-bf16", "B16-H12-D64-S4096-scaled-bf16")
ENCODER_SIZES = ("notebook", "d768")
TABLE, MORE = (*HEADLINE, *CONTROL, *OTHER_HEADS), (*PRECISION, *LONG)
OUR_FIRST_PEERS = ("padfree", "padfree-skip", "padfree-varlen")
OUR_PEERS = (*OUR_FIRST_PEERS, "padfree-varlen+pack", "padfree-qkv", "padfree-nomask")
FIRST_PEERS = (*OUR_FIRST_PEERS, "sdpa", "sdpa-efficient", "sdpa-cudnn", "varlen_attn", "varlen_attn+pack")
BOTH = ("forward", "both")
# Left out: our own eager, and what compiles for every shape of a batch, which takes minutes.
TRAIN_PEERS = (
    *("notebook", "sdpa", "ours-sdpa", "ours-padfree", "ours-padfree+graphs", "compile-sdpa-graphs"),
    *("nn.TransformerEncoder", "sdpa+cls", "sdpa+grouped", "sdpa+launches", "ours-padfree-padded"),
)
OUR_ENCODER_PEERS = ("padfree", "padfree-all-rows", "padfree-packed", "padfree-packed+pack")
OTHER_ENCODERS = ("notebook", "eager", "sdpa", "sdpa-cls", "nn.TransformerEncoder", "compile-sdpa-graphs")
ENCODER_PEERS = (*OUR_ENCODER_PEERS, *OTHER_ENCODERS)


class WrongArgument(Exception):
    """The command line asks for what cannot be; the text says why in one line."""


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

    def worker(self, *arguments: str) -> tuple[str, ...]:
        """A module of this folder as a process of its own, which without a GPU is told that it is rehearsed."""
        return (*worker(*arguments), *(() if self.on_gpu else (REHEARSE,)))

    def suite(self, name: str, label: str, **options: Sequence[str]) -> tuple[str, ...]:
        """A suite that starts no case once its time is nearly up; without a GPU its quick form."""
        line = f"{name} --label {label} --minutes {{minutes}} --no-pictures --output".split()
        chosen = [word for option, names in options.items() for word in (f"--{option}", ",".join(names))]
        return (*BENCH, *line, str(self.output), *(chosen if self.on_gpu else ["--quick"]))


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


def worker(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "padfree_bench.gpu_round", *arguments)


def imdb_train(output: Path, *more: str) -> list[str]:
    """The notebook's training on the reviews that came along."""
    carried = {"--dataset": "reviews", "--tokenizer": "tokenizer", "--cache-dir": "tokens"}
    paths = [word for option, name in carried.items() for word in (option, str(CARRY / name))]
    module = "imdb_classifier.commands.train"
    return [sys.executable, "-m", module, *paths, "--output-dir", str(output), "--preset", "notebook", *more]


def sanitized(tool: str) -> tuple[str, ...]:
    """Each of our kernels once under NVIDIA's compute-sanitizer, from PATH or else from a CUDA toolkit."""
    toolkits = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
    program = shutil.which("compute-sanitizer") or str(next(iter(toolkits), "compute-sanitizer"))
    ours = ("--kernel-name", "regex=attention_forward|gradient_kernel|single_query")
    return (program, "--tool", tool, "--error-exitcode", "9", *ours, *worker("checks", "touch"))


def smoke(around: Round) -> list[Step]:
    """Is it right, does it repeat, and the first figures."""
    check = lambda name: around.worker("checks", name)
    return [
        Step("warm", "kernels compiled side by side into one cache", 60, around.worker("warm", "smoke")),
        Step("agreement", "every row, feature and pattern of padding against fp64 on this device", 50, check("agreement")),
        Step("repeats", "thousands of bitwise equal results under load, launched and replayed", 25, check("repeats")),
        Step("steps", "the classifier's training step waits for nothing, a graph repeats it, NaN changes no weight", 20, check("steps")),
        Step("graph", "a graph replayed on new inputs while another stream allocates", 10, check("graph"), needs_gpu=True),
        Step("headline", "the two headline cases, first figures", 47,
             around.suite("attention", "smoke", shapes=HEADLINE, directions=BOTH, peers=FIRST_PEERS), result="attention-smoke"),
    ]  # fmt: skip


def main(around: Round) -> list[Step]:
    """Tune the rows that the headline uses, then whole steps and models, then all tables."""
    tuned = {TUNED_ROWS: str(around.folder / "tune.json")}
    no_caching, reviews = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, CARRY / "reviews"
    return [
        Step("warm", "kernels compiled side by side into one cache", 50, around.worker("warm", "main")),
        Step("tune", "the headline's rows of the table against a dozen others", 40,
             (*BENCH, "tune", "--minutes", "0.6", "--output", str(around.output))),
        Step("warm-tuned", "the headline's other kernels with the tuned rows", 18, around.worker("warm", "tuned"), environment=tuned),
        Step("train-step", "a training step: the notebook's loop, and each lever of ours", 84,
             around.suite("train", "round", dtypes=["bf16"], peers=TRAIN_PEERS),
             environment=tuned, result="train-round", grace=LONG_GRACE_SECONDS),
        Step("encoder", "the classifier, inference and training without an optimizer", 56,
             around.suite("encoder", "round", shapes=ENCODER_SIZES, dtypes=["bf16"], peers=ENCODER_PEERS),
             environment=tuned, result="encoder-round", grace=LONG_GRACE_SECONDS),
        Step("table", "attention: headline, no padding, other heads; every peer", 60,
             around.suite("attention", "table", shapes=TABLE, directions=BOTH),
             environment=tuned, result="attention-table", grace=LONG_GRACE_SECONDS),
        Step("counters", "Nsight Compute on each kernel of the headline: what binds it", 28,
             worker("counters", str(around.folder)), needs_gpu=True),
        Step("epoch-padfree", f"imdb-train on reviews, {'fused' if around.on_gpu else 'SDPA in its place'}, the second of two epochs", 30,
             around.worker("epochs", "padfree"), needs_folder=reviews),
        Step("epoch-graphs", "the same, each training step one CUDA graph", 20,
             around.worker("epochs", "graphs"), needs_gpu=True, needs_folder=reviews),
        Step("epoch-sdpa", "imdb-train on the same reviews, SDPA, which plans anew for every width", 33,
             around.worker("epochs", "sdpa"), needs_folder=reviews),
        Step("memory", "what a call holds at its peak", 18,
             around.suite("memory", "round", shapes=MEMORY, peers=FIRST_PEERS), result="memory-round"),
        Step("memcheck", "compute-sanitizer memcheck, each kernel once", 14, sanitized("memcheck"),
             needs_gpu=True, environment=no_caching),
        Step("racecheck", "compute-sanitizer racecheck, each kernel once", 12, sanitized("racecheck"),
             needs_gpu=True, environment=no_caching),
        Step("more", "attention: fp16, fp32, long sequences", 20,
             around.suite("attention", "more", shapes=MORE, directions=BOTH, peers=FIRST_PEERS),
             result="attention-more", grace=LONG_GRACE_SECONDS),
    ]  # fmt: skip


PARTS: dict[str, Callable[[Round], list[Step]]] = {"smoke": smoke, "main": main}


def our_environment() -> dict[str, str]:
    """This process's, with our own folders before what else Python finds, and never an interpreter."""
    paths = [*(str(ROOT / folder) for folder in ("kernels", "model", "bench")), os.environ.get("PYTHONPATH")]
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run(command: Sequence[str], environment: Mapping[str, str] | None = None, **options: Any) -> Any:
    """`subprocess.run` in the tree's root with our environment; what it starts is killed when this process ends."""
    options |= {"env": {**our_environment(), **(environment or {})}, "preexec_fn": die_with_parent}
    return subprocess.run(command, cwd=ROOT, text=True, check=False, **options)
