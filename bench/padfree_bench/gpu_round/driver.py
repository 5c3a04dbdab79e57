"""`python -m bench gpu-round --part prepare|smoke|main`: a GPU's quarter of an hour, used to the full.

prepare  on a CPU, before: what a CPU can make goes into .carry/ (kernels, reviews, tokens, the commit)
smoke    within 4 minutes: is it right on this hardware, does it repeat, the first figures
main     within 8.5 minutes: tune, all tables, counters, training, memory, compute-sanitizer

Every step is a process with a limit of its own; what came of it is on disk before the next one starts, in one folder a
card. Without a GPU both parts are rehearsed as far as they go, and say "rehearsed", never "passed".
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from padfree_bench.gpu_round.steps import (
    OVERHEAD_SECONDS,
    PART_SECONDS,
    PARTS,
    ROOT,
    Round,
    Step,
    our_environment,
    round_on_a_cpu,
    worker,
)
from padfree_bench.measuring.files import keep_earlier, write_whole
from padfree_bench.measuring.processes import die_with_parent, run_limited, stop_on_sigterm
from padfree_bench.measuring.results import NOT_RUN, RESULTS

PASSED, FAILED, TIMED_OUT, REHEARSED = "passed", "failed", "timed out", "rehearsed"
INCOMPLETE = "incomplete"
LOG_BYTES = 200_000
PACK_SECONDS = 10


@dataclass
class Outcome:
    """What became of a step; `details` is the last line of JSON it printed."""

    name: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)


def environment(around: Round, step: Step) -> dict[str, str]:
    """One compile cache for all steps, nothing kept back in a buffer."""
    return {
        **our_environment(),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(around.cache),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        **step.environment,
    }


def run_step(around: Round, step: Step, seconds: float) -> Outcome:
    """Run one step within `seconds`; never raises for what the step does."""
    if step.needs_gpu and not around.on_gpu:
        return Outcome(step.name, NOT_RUN, reason="needs a CUDA GPU")
    if step.needs_folder is not None and not step.needs_folder.is_dir():
        return Outcome(step.name, NOT_RUN, reason=f"no {step.needs_folder}: see --part prepare --reviews")
    if seconds < 5:
        return Outcome(step.name, NOT_RUN, reason="no time left")
    # A rehearsal is about getting to the end: two cores take longer than sixteen.
    limit = seconds if around.on_gpu else 10 * step.seconds
    log = around.folder / "logs" / f"{step.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    try:
        with log.open("w") as output:
            status = run_limited(
                step.line(seconds),
                limit,
                cwd=ROOT,
                env=environment(around, step),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
    except OSError as error:
        return Outcome(step.name, FAILED, reason=str(error))
    outcome = Outcome(step.name, PASSED if around.on_gpu else REHEARSED, time.monotonic() - begin)
    text = log.read_text(errors="replace")
    log.write_text(text[-LOG_BYTES:])
    lines = [line for line in text.splitlines() if line.strip()]
    outcome.details = next((found for line in reversed(lines) if (found := _json(line)) is not None), {})
    suite = Suite()
    if step.result:
        suite = figures(around.suites / f"{step.result}.json", time.time() - outcome.seconds)
        outcome.details = suite.figures
    if status is None:
        outcome.status = TIMED_OUT
        outcome.reason = f"stopped after {limit:.0f} s; what it had written is kept"
    elif status:
        said = [line for line in lines if _json(line) is None]
        outcome.status, outcome.reason = FAILED, f"status {status}: {' / '.join(said[-3:])[:600]}"
    elif step.result and not suite.figures:
        outcome.status, outcome.reason = FAILED, f"{step.result}.json has no figure of this run"
    elif suite.untimed and around.on_gpu:
        outcome.status, outcome.reason = FAILED, f"padfree has no figure: {'; '.join(suite.untimed)[:600]}"
    elif suite.not_reached and around.on_gpu:
        outcome.status, outcome.reason = INCOMPLETE, f"not reached: {', '.join(suite.not_reached)[:600]}"
    return outcome


@dataclass
class Suite:
    """What a suite's file says: {case and direction: {peer: ms, as a graph where there is one}}, our own rows without a
    figure, and cases that the time did not reach."""

    figures: dict[str, Any] = field(default_factory=dict)
    untimed: list[str] = field(default_factory=list)
    not_reached: list[str] = field(default_factory=list)


def figures(path: Path, since: float) -> Suite:
    """Read a suite's file; one that was written before `since` is another run's."""
    found = Suite()
    if not path.is_file() or path.stat().st_mtime < since - 1:
        return found
    content = json.loads(path.read_text())
    found.not_reached = content["not_reached"]
    for row in content["rows"]:
        place = f"{row['case']} {row['direction']}"
        if (ms := row.get("graph_ms") or row.get("ms_p50") or row.get("peak_mib")) is not None:
            found.figures.setdefault(place, {})[row["peer"]] = ms
        elif row["status"] == NOT_RUN and "padfree" in row["peer"]:
            found.untimed.append(f"{place} {row['peer']}: {row.get('reason')}")
    return found


def _json(line: str) -> dict[str, Any] | None:
    with contextlib.suppress(json.JSONDecodeError):
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    return None


def verdict_of(outcomes: list[Outcome], steps: list[Step], on_gpu: bool) -> str:
    """ "passed" only on a GPU with every step passed; a rehearsal can fail but never pass."""
    if any(outcome.status in (FAILED, TIMED_OUT) for outcome in outcomes):
        return FAILED
    if len(outcomes) < len(steps):
        return "unfinished"
    if not on_gpu:
        return REHEARSED
    return PASSED if all(outcome.status == PASSED for outcome in outcomes) else INCOMPLETE


def save(
    around: Round, part: str, versions: dict[str, Any], steps: list[Step], known: dict[str, Outcome]
) -> str:
    """Write the state of the part whole or not at all; returns its verdict."""
    outcomes = [known[step.name] for step in steps if step.name in known]
    verdict = verdict_of(outcomes, steps, around.on_gpu)
    content = {
        "kind": "gpu-round",
        "part": part,
        "verdict": verdict,
        "environment": versions,
        "steps": [asdict(outcome) for outcome in outcomes],
        "not_reached": [step.name for step in steps if step.name not in known],
    }
    write_whole(around.folder / f"round-{part}.json", json.dumps(content, indent=1) + "\n")
    return verdict


def archive(around: Round, target: Path) -> None:
    """Pack the card's folder, and in a rehearsal the suites' own, whole or not at all."""
    temporary = target.with_name(f".{target.name}")
    try:
        with tarfile.open(temporary, "w:gz") as tar:
            for folder in dict.fromkeys((around.folder, around.suites)):
                for path in sorted(folder.rglob("*")):
                    if path.is_file() and not path.name.startswith(".") and path != target.resolve():
                        tar.add(path, Path(folder.name) / path.relative_to(folder))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def packing(around: Round, target: Path | None) -> Iterator[None]:
    """Pack now and then meanwhile: where only the archive comes home, a kill must not cost a whole step."""
    over = threading.Event()

    def pack() -> None:
        while target is not None and not over.wait(PACK_SECONDS):
            with contextlib.suppress(
                OSError, tarfile.TarError
            ):  # a file moved away meanwhile: the next one has it
                archive(around, target)

    thread = threading.Thread(target=pack)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def outcomes_before(path: Path, commit: object) -> dict[str, Outcome]:
    """What an earlier call of the same commit left of a part, for a call that runs some steps anew."""
    try:
        content = json.loads(path.read_text())
        if content["environment"]["commit"] != commit:
            return {}
        return {step["name"]: Outcome(**step) for step in content["steps"]}
    except (OSError, KeyError, TypeError, ValueError):
        return {}


def look_around(output: Path) -> tuple[Round, dict[str, Any]]:
    """Ask a process what machine this is: torch takes seconds to import, and this one must stay light."""
    try:
        asked = subprocess.run(
            worker("padfree_bench.gpu_round.versions"), cwd=ROOT, env=our_environment(),
            capture_output=True, text=True, timeout=60, check=False, preexec_fn=die_with_parent,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise OSError(f"cannot tell what machine this is: no answer in {error.timeout} s") from None
    found = _json((asked.stdout.strip().splitlines() or [""])[-1])
    if asked.returncode or found is None:
        raise OSError(f"cannot tell what machine this is: {(asked.stderr.strip().splitlines() or ['?'])[-1]}")
    folder = output / found.pop("folder")
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or ROOT / "runs" / "triton-cache").resolve()
    return Round(output, folder, cache, found["device_type"] == "cuda"), found


def table(steps: list[Step], known: dict[str, Outcome]) -> str:
    """What was done, skipped and why, a line a step; then the suites' figures of our own and SDPA, a line a case."""
    outcomes = [known.get(step.name, Outcome(step.name, NOT_RUN, reason="not reached")) for step in steps]
    lines = [
        f"{outcome.status:9} {step.name:14} {outcome.seconds:6.1f} s of {step.seconds:3}  {outcome.reason or step.summary}"
        for step, outcome in zip(steps, outcomes, strict=True)
    ]
    for step, outcome in zip(steps, outcomes, strict=True):
        for place, found in outcome.details.items() if step.result else ():
            shown = [
                f"{peer} {value:g}" for peer, value in found.items() if "padfree" in peer or "sdpa" in peer
            ]
            lines.append(f"{step.name}, {place}: {', '.join(shown)}")
    return "\n".join(lines)


def run_part(part: str, output: Path, packed: Path | None, only: list[str] | None) -> int:
    begin = time.monotonic()
    around, versions = look_around(output)
    around.folder.mkdir(parents=True, exist_ok=True)
    steps, record = PARTS[part](around), around.folder / f"round-{part}.json"
    asked = [step for step in steps if only is None or step.name in only]
    before = outcomes_before(record, versions.get("commit")) if only else {}
    known = {name: outcome for name, outcome in before.items() if name not in {step.name for step in asked}}
    print(f"{part} on {versions['device']}: {json.dumps(versions.get('compiler'))}", flush=True)
    if missing := versions.get("not_installed"):
        print(f"not installed, what needs it will fail: {', '.join(missing)}", flush=True)
    if not only:
        keep_earlier(record)
    if any(step.name == "tune" for step in asked):
        keep_earlier(around.folder / "tune.json")  # another run's rows are not this one's

    def keep() -> str:
        verdict = save(around, part, versions, steps, known)
        if packed is not None:
            archive(around, packed)
        return verdict

    verdict = keep()
    for index, step in enumerate(asked):
        left = PART_SECONDS[part] - OVERHEAD_SECONDS / 2 - (time.monotonic() - begin)
        try:
            with packing(around, packed):
                outcome = run_step(around, step, allowed(step, asked[index + 1 :], left))
            known[step.name] = outcome
            verdict = keep()
        except OSError as error:
            # A full disk: the figures of later steps may still be small enough, or are seen on the screen.
            outcome = known.setdefault(step.name, Outcome(step.name, FAILED))
            outcome.status, outcome.reason = FAILED, f"cannot write: {error}"
        said = (
            f"{outcome.status:9} {step.name:14} {outcome.seconds:6.1f} s  {outcome.reason or outcome.details}"
        )
        print(said[:300], flush=True)
    print(f"\n{table(steps, known)}")
    print(f"{verdict}: {record}, {time.monotonic() - begin:.0f} s in all")
    done = [known[step.name] for step in asked]
    return 0 if verdict_of(done, asked, around.on_gpu) in (PASSED, REHEARSED) else 1


def allowed(step: Step, later: list[Step], left: float) -> float:
    """Seconds for a step: its own and what those before it did not need, never what those after it may need."""
    return min(left, max(step.seconds, left - sum(other.seconds for other in later)))


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m bench gpu-round",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--part", required=True, choices=("prepare", *PART_SECONDS))
    options.add_argument(
        "--output", type=Path, default=RESULTS, help="folder for results (default: bench/results)"
    )
    options.add_argument(
        "--archive",
        type=Path,
        help="pack the card's folder into this .tar.gz, every 10 s and after every step",
    )
    options.add_argument(
        "--steps", help="names by comma, what others found before is kept; all when left out"
    )
    options.add_argument(
        "--reviews", type=Path, help="prepare: a .parquet of reviews (text, label) to take 4,000 from"
    )
    options.add_argument("--tokenizer", type=Path, help="prepare: a tokenizer's folder")
    return options


def main(argv: list[str]) -> int:
    """Exit status 0 for passed or rehearsed, 1 for anything else, 2 for a wrong argument."""
    options = parser().parse_args(argv)
    stop_on_sigterm()
    if options.part == "prepare":
        from padfree_bench.gpu_round.prepare import prepare

        return prepare(options.reviews, options.tokenizer)
    only = [name.strip() for name in options.steps.split(",")] if options.steps is not None else None
    known = [step.name for step in PARTS[options.part](round_on_a_cpu())]
    if unknown := set(only or ()) - set(known):
        print(
            f"python -m bench gpu-round: steps must be of {', '.join(known)}, got {', '.join(sorted(unknown)) or 'nothing'}",
            file=sys.stderr,
        )
        return 2
    if options.archive and (options.archive.is_dir() or not options.archive.name.endswith(".tar.gz")):
        print(
            f"python -m bench gpu-round: --archive must be a .tar.gz, got {options.archive}", file=sys.stderr
        )
        return 2
    if options.archive:
        options.archive.parent.mkdir(parents=True, exist_ok=True)
    return run_part(options.part, options.output.resolve(), options.archive, only)
