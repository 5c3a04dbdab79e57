"""`python -m bench gpu-check`: the kernels proved on a GPU, step by step, with a JSON verdict.

Every step is a process with a time limit of its own, and the verdict is written after each, so that an early stop
keeps what was found. Without a GPU the same steps are rehearsed in Triton's interpreter as far as they go, and
each one that cannot run says so; the verdict is then "rehearsed", never "passed". What a step printed is kept in
gpu-check-logs/ beside the verdict.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from padfree_bench import machine
from padfree_bench.cli import positive_minutes
from padfree_bench.processes import run_limited, stop_on_sigterm
from padfree_bench.results import RESULTS
from padfree_bench.sanitizer_tool import TOOLS, find_compute_sanitizer

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "failed", "timed out", "not run"


@dataclass(frozen=True)
class Step:
    """A named process and the seconds it may take."""

    name: str
    summary: str
    seconds: int
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    needs_gpu: bool = False


@dataclass
class Outcome:
    name: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)


def worker(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "padfree_bench.gpu_steps", *arguments)


def steps(on_gpu: bool, cases: Path) -> list[Step]:
    """All steps, quick and telling ones first."""
    sanitizer = find_compute_sanitizer()
    exported = Step(
        "export", "results of the interpreter and fp64 truth on the CPU", 300, worker("export", str(cases)),
        {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    checks = [
        Step(
            "agreement",
            "the exported cases on this device, within the error rule",
            300,
            worker("replay", str(cases)),
        ),
        Step(
            "graph", "CUDA-graph replay beside allocations on another stream", 120, worker("graph"), {}, True
        ),
        Step("repeats", "bitwise equal results again and again under load", 180, worker("repeats")),
        Step("storm", "8 processes that start at once with one empty cache", 180, worker("storm")),
        Step("memory", "no growth over many steps", 180, worker("memory")),
        Step("giant", "tensors beyond 2**31 elements, by identities", 240, worker("giant"), {}, True),
        Step("suite", "the kernels' tests, compiled", 300, worker("suite")),
    ]
    for tool in TOOLS:
        command = (
            sanitizer or "compute-sanitizer",
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            *worker("replay", str(cases), "--few"),
        )
        checks.append(
            Step(
                tool,
                f"compute-sanitizer {tool} over every kernel",
                150,
                command,
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                True,
            )
        )
    return [exported, *checks]


def run_step(step: Step, on_gpu: bool, seconds: float, log: Path) -> Outcome:
    """Run one step within its limit and `seconds`; never raises for what the step does."""
    if step.needs_gpu and not on_gpu:
        return Outcome(step.name, NOT_RUN, reason="needs a CUDA GPU")
    if step.name in TOOLS and find_compute_sanitizer() is None:
        return Outcome(
            step.name, NOT_RUN, reason="compute-sanitizer was found neither on PATH nor in a wheel"
        )
    # Ours first, then what the caller brought along.
    folders = [str(ROOT / folder) for folder in ("kernels", "model", "bench")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        **({} if on_gpu else {"TRITON_INTERPRET": "1"}),
        **step.environment,
    }
    limit, start = min(step.seconds, seconds), time.monotonic()
    try:
        with log.open("w") as output:
            status = run_limited(
                step.command, limit, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
    except OSError as error:
        return Outcome(step.name, FAILED, reason=str(error))
    outcome = Outcome(step.name, PASSED if status == 0 else FAILED, time.monotonic() - start)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    for line in reversed(lines):
        with contextlib.suppress(json.JSONDecodeError):
            if line.startswith("{"):
                outcome.details = json.loads(line)
                break
    if status is None:
        outcome.status, outcome.reason = TIMED_OUT, f"stopped after {limit:.0f} s"
    elif status:
        outcome.reason = " / ".join(lines[-3:])[:600]
    return outcome


def verdict_of(outcomes: list[Outcome], on_gpu: bool, complete: bool) -> str:
    """ "passed" only on a GPU with every step passed; a rehearsal can fail but never pass."""
    if any(outcome.status in (FAILED, TIMED_OUT) for outcome in outcomes):
        return FAILED
    if not on_gpu:
        return "rehearsed"
    return PASSED if complete and all(outcome.status == PASSED for outcome in outcomes) else "incomplete"


def save(
    path: Path, outcomes: list[Outcome], on_gpu: bool, complete: bool, environment: dict[str, object]
) -> None:
    content = {
        "kind": "gpu-check",
        "verdict": verdict_of(outcomes, on_gpu, complete),
        "environment": environment,
        "steps": [asdict(outcome) for outcome in outcomes],
    }
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m bench gpu-check", description=__doc__)
    options.add_argument("--steps", help="names by comma; all when left out")
    options.add_argument(
        "--minutes",
        type=positive_minutes,
        default=8.5,
        help="start nothing and stop what runs after this many minutes",
    )
    options.add_argument("--cases", help="cases exported on another machine; made here when left out")
    options.add_argument("--output", default=str(RESULTS), help="folder for results (default: bench/results)")
    options.add_argument("--json", action="store_true", help="print the verdict file")
    return options


def main(argv: list[str]) -> int:
    """Exit status 0 for passed or rehearsed, 1 for failed or incomplete, 2 for a wrong argument."""
    options = parser().parse_args(argv)
    device = machine.pick_device()
    on_gpu = device.type == "cuda"
    folder = Path(options.output) / machine.device_slug(device)
    logs = folder / "gpu-check-logs"
    logs.mkdir(parents=True, exist_ok=True)
    cases = Path(options.cases) if options.cases else folder / ".gpu-check-cases.pt"
    todo = [step for step in steps(on_gpu, cases) if not (options.cases and step.name == "export")]
    if options.steps:
        wanted = options.steps.split(",")
        if unknown := set(wanted) - {step.name for step in todo}:
            names = ", ".join(step.name for step in todo)
            print(
                f"python -m bench gpu-check: steps must be of {names}, got {', '.join(sorted(unknown))}",
                file=sys.stderr,
            )
            return 2
        # The cases that a step replays are made first.
        if any(step.name in wanted and str(cases) in step.command for step in todo):
            wanted.append("export")
        todo = [step for step in todo if step.name in wanted]
    stop_on_sigterm()
    path, environment = folder / "gpu-check.json", machine.environment(device, ["gpu-check", *argv])
    deadline, outcomes = time.monotonic() + options.minutes * 60, list[Outcome]()
    try:
        for step in todo:
            left = deadline - time.monotonic()
            outcome = (
                run_step(step, on_gpu, left, logs / f"{step.name}.log")
                if left > 5
                else Outcome(step.name, NOT_RUN, reason="out of time")
            )
            outcomes.append(outcome)
            complete = len(outcomes) == len(todo) and not options.steps
            save(path, outcomes, on_gpu, complete, environment)
            print(
                f"{outcome.status:9} {outcome.name:11} {outcome.seconds:6.1f} s  {outcome.reason or step.summary}",
                file=sys.stderr,
                flush=True,
            )
    finally:
        if not options.cases:
            # a quarter of a GiB
            cases.unlink(missing_ok=True)
    verdict = verdict_of(outcomes, on_gpu, complete)
    print(path.read_text() if options.json else f"{verdict}: {path}")
    return 0 if verdict in (PASSED, "rehearsed") else 1
