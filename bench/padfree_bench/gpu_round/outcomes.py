"""One step of the round: run within its limit, and what to make of how it ended, what it printed and what it wrote."""

import json
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from padfree_bench.gpu_round.steps import ROOT, Round, Step, our_environment
from padfree_bench.measuring.processes import run_limited
from padfree_bench.measuring.results import NOT_RUN

PASSED, FAILED, TIMED_OUT = "passed", "failed", "timed out"
REHEARSED, INCOMPLETE = "rehearsed", "incomplete"
LOG_BYTES = 200_000


@dataclass
class Outcome:
    """What became of a step; `details` is the last line of JSON it printed, or the figures of its suite."""

    name: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.status:9} {self.name:14} {self.seconds:6.1f} s"


def why_not(around: Round, step: Step, seconds: float) -> str:
    """Why the step cannot be run now; "" where it can."""
    if step.needs_gpu and not around.on_gpu:
        return "needs a CUDA GPU"
    if step.needs_folder is not None and not step.needs_folder.is_dir():
        return f"no {step.needs_folder}: see --part prepare --reviews"
    return "no time left" if seconds < 5 else ""


def run_step(around: Round, step: Step, seconds: float) -> Outcome:
    """Run one step within `seconds`; never raises for what the step does."""
    if reason := why_not(around, step, seconds):
        return Outcome(step.name, NOT_RUN, reason=reason)
    # A rehearsal is about getting to the end: two cores take longer than sixteen.
    limit = seconds if around.on_gpu else 10 * step.seconds
    # One compile cache for all steps, nothing kept back in a buffer.
    environment = {
        **our_environment(), "PYTHONUNBUFFERED": "1", "TRITON_CACHE_DIR": str(around.cache),
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **step.environment,
    }  # fmt: skip
    log = around.folder / "logs" / f"{step.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started, begin = time.time(), time.monotonic()
    try:
        with log.open("w") as output:
            options = {"cwd": ROOT, "env": environment, "stdout": output, "stderr": subprocess.STDOUT}
            status = run_limited(step.line(seconds), limit, **options)
    except OSError as error:
        return Outcome(step.name, FAILED, reason=str(error))
    taken, text = time.monotonic() - begin, log.read_text(errors="replace")
    log.write_text(text[-LOG_BYTES:])
    said, details = split_output(text)
    untimed, not_reached = list[str](), list[str]()
    if step.result:
        details, untimed, not_reached = figures(around.suites / f"{step.result}.json", started)
    if status is None:
        verdict = TIMED_OUT, f"stopped after {limit:.0f} s; what it had written is kept"
    elif status:
        verdict = FAILED, f"status {status}: {' / '.join(said[-3:])[:600]}"
    elif step.result and not details:
        verdict = FAILED, f"{step.result}.json has no figure of this run"
    elif untimed and around.on_gpu:
        verdict = FAILED, f"padfree has no figure: {'; '.join(untimed)[:600]}"
    elif not_reached and around.on_gpu:
        verdict = INCOMPLETE, f"not reached: {', '.join(not_reached)[:600]}"
    else:
        verdict = PASSED if around.on_gpu else REHEARSED, ""
    return Outcome(step.name, verdict[0], taken, verdict[1], details)


def split_output(text: str) -> tuple[list[str], dict[str, Any]]:
    """(the lines that are no JSON, the last one that is, or {}) of what a process printed."""
    said, last = list[str](), dict[str, Any]()
    for line in text.splitlines():
        try:
            last = json.loads(line if line.startswith("{") else "")
        except json.JSONDecodeError:
            said += [line] if line.strip() else []
    return said, last


def figures(path: Path, since: float) -> tuple[dict[str, dict[str, float]], list[str], list[str]]:
    """({case and direction: {peer: ms, of a graph where there is one}}, our own rows without a figure, cases not reached).

    Nothing of all that where the suite's file was written before `since`, by another run.
    """
    found, untimed = dict[str, dict[str, float]](), list[str]()
    if not path.is_file() or path.stat().st_mtime < since - 1:
        return found, untimed, []
    content = json.loads(path.read_text())
    for row in content["rows"]:
        place = f"{row['case']} {row['direction']}"
        if (ms := row.get("graph_ms") or row.get("ms_p50") or row.get("peak_mib")) is not None:
            found.setdefault(place, {})[row["peer"]] = ms
        elif row["status"] == NOT_RUN and "padfree" in row["peer"]:
            untimed.append(f"{place} {row['peer']}: {row.get('reason')}")
    return found, untimed, content["not_reached"]


def verdict_of(outcomes: list[Outcome], steps: list[Step], on_gpu: bool) -> str:
    """ "passed" only on a GPU with every step passed; a rehearsal can fail but never pass."""
    if any(outcome.status in (FAILED, TIMED_OUT) for outcome in outcomes):
        return FAILED
    if len(outcomes) < len(steps):
        return "unfinished"
    if not on_gpu:
        return REHEARSED
    return PASSED if all(outcome.status == PASSED for outcome in outcomes) else INCOMPLETE
