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

from padfree_bench.gpu_round import outcomes
from padfree_bench.gpu_round.outcomes import Outcome, run_step, split_output, verdict_of
from padfree_bench.gpu_round.steps import (
    OVERHEAD_SECONDS,
    PART_SECONDS,
    PARTS,
    ROOT,
    Round,
    Step,
    WrongArgument,
    run,
    worker,
)
from padfree_bench.measuring.files import keep_earlier, write_whole
from padfree_bench.measuring.processes import stop_on_sigterm
from padfree_bench.measuring.results import NOT_RUN, RESULTS

PACK_SECONDS = 10


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
            # A file may be moved away meanwhile: the next archive has it.
            with contextlib.suppress(OSError, tarfile.TarError):
                archive(around, target)

    thread = threading.Thread(target=pack)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def look_around(output: Path) -> tuple[Round, dict[str, Any]]:
    """Ask a process what machine this is: torch takes seconds to import, and this one must stay light."""
    try:
        asked = run(worker("versions"), capture_output=True, timeout=60)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"cannot tell what machine this is: no answer in {error.timeout} s") from None
    _, found = split_output(asked.stdout)
    if asked.returncode or not found:
        raise OSError(f"cannot tell what machine this is: {(asked.stderr.strip().splitlines() or ['?'])[-1]}")
    folder = output / found.pop("folder")
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or ROOT / "runs" / "triton-cache").resolve()
    return Round(output, folder, cache, found["device_type"] == "cuda"), found


@dataclass
class Record:
    """The state of a part, kept in `path` and the archive: what became of each of its steps."""

    part: str
    around: Round
    versions: dict[str, Any]
    archive: Path | None
    steps: list[Step]
    known: dict[str, Outcome] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.around.folder / f"round-{self.part}.json"

    def take_over(self, asked: list[Step]) -> None:
        """Keep what an earlier call of the same commit found of the steps that are not asked for now."""
        with contextlib.suppress(OSError, KeyError, TypeError, ValueError):
            content = json.loads(self.path.read_text())
            if content["environment"]["commit"] == self.versions.get("commit"):
                before = {step["name"]: Outcome(**step) for step in content["steps"]}
                again = {step.name for step in asked}
                self.known = {name: outcome for name, outcome in before.items() if name not in again}

    def save(self) -> str:
        """Write all whole or not at all; returns the verdict."""
        done = [self.known[step.name] for step in self.steps if step.name in self.known]
        verdict = verdict_of(done, self.steps, self.around.on_gpu)
        content = {
            "kind": "gpu-round", "part": self.part, "verdict": verdict, "environment": self.versions,
            "steps": [asdict(outcome) for outcome in done],
            "not_reached": [step.name for step in self.steps if step.name not in self.known],
        }  # fmt: skip
        write_whole(self.path, json.dumps(content, indent=1) + "\n")
        if self.archive is not None:
            archive(self.around, self.archive)
        return verdict

    def table(self) -> str:
        """What was done, skipped and why, a line a step; then the suites' figures of our own and SDPA, a line a case."""
        lines, cases = list[str](), list[str]()
        for step in self.steps:
            outcome = self.known.get(step.name, Outcome(step.name, NOT_RUN, reason="not reached"))
            lines.append(f"{outcome} of {step.seconds:3}  {outcome.reason or step.summary}")
            for place, found in outcome.details.items() if step.result else ():
                shown = (
                    f"{peer} {ms:g}" for peer, ms in found.items() if "padfree" in peer or "sdpa" in peer
                )
                cases.append(f"{step.name}, {place}: {', '.join(shown)}")
        return "\n".join([*lines, *cases])


def run_part(part: str, output: Path, packed: Path | None, only: list[str] | None) -> int:
    """Run the steps of a part, or `only` some of them, one after the other; returns the exit status."""
    begin = time.monotonic()
    around, versions = look_around(output)
    around.folder.mkdir(parents=True, exist_ok=True)
    record = Record(part, around, versions, packed, PARTS[part](around))
    asked = [step for step in record.steps if only is None or step.name in only]
    print(f"{part} on {versions['device']}: {json.dumps(versions.get('compiler'))}", flush=True)
    if missing := versions.get("not_installed"):
        print(f"not installed, what needs it will fail: {', '.join(missing)}", flush=True)
    if only:
        record.take_over(asked)
    else:
        keep_earlier(record.path)
    if any(step.name == "tune" for step in asked):
        keep_earlier(around.folder / "tune.json")  # another run's rows are not this one's
    verdict = record.save()
    for index, step in enumerate(asked):
        left = PART_SECONDS[part] - OVERHEAD_SECONDS / 2 - (time.monotonic() - begin)
        try:
            with packing(around, packed):
                outcome = run_step(around, step, allowed(step, asked[index + 1 :], left))
            record.known[step.name] = outcome
            verdict = record.save()
        except OSError as error:
            # A full disk: the figures of later steps may still be small enough, or are seen on the screen.
            outcome = record.known.setdefault(step.name, Outcome(step.name, outcomes.FAILED))
            outcome.status, outcome.reason = outcomes.FAILED, f"cannot write: {error}"
        print(f"{outcome}  {outcome.reason or outcome.details}"[:300], flush=True)
    print(f"\n{record.table()}")
    print(f"{verdict}: {record.path}, {time.monotonic() - begin:.0f} s in all")
    done = [record.known[step.name] for step in asked]
    return 0 if verdict_of(done, asked, around.on_gpu) in (outcomes.PASSED, outcomes.REHEARSED) else 1


def allowed(step: Step, later: list[Step], left: float) -> float:
    """Seconds for a step: its own and what those before it did not need, never what those after it may need."""
    return min(left, max(step.seconds, left - sum(other.seconds for other in later)))


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m bench gpu-round", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = options.add_argument
    add("--part", required=True, choices=("prepare", *PART_SECONDS))
    add("--output", type=Path, default=RESULTS, help="folder for results (default: bench/results)")
    when = "every 10 s and after every step"
    add("--archive", type=Path, help=f"pack the card's folder into this .tar.gz, {when}")
    add("--steps", help="names by comma, what others found before is kept; all when left out")
    add("--reviews", type=Path, help="prepare: a .parquet of reviews (text, label) to take 4,000 from")
    add("--tokenizer", type=Path, help="prepare: a tokenizer's folder")
    return options


def main(argv: list[str]) -> int:
    """Exit status 0 for passed or rehearsed, 1 for anything else, 2 for a wrong argument."""
    options = parser().parse_args(argv)
    stop_on_sigterm()
    try:
        if options.part == "prepare":
            from padfree_bench.gpu_round.carry import prepare  # imports torch

            return prepare(options.reviews, options.tokenizer)
        only = steps_asked_for(options.part, options.steps)
        packed = options.archive
        if packed and (packed.is_dir() or not packed.name.endswith(".tar.gz")):
            raise WrongArgument(f"--archive must be a .tar.gz, got {packed}")
    except WrongArgument as error:
        print(f"python -m bench gpu-round: {error}", file=sys.stderr)
        return 2
    if packed:
        packed.parent.mkdir(parents=True, exist_ok=True)
    return run_part(options.part, options.output.resolve(), packed, only)


def steps_asked_for(part: str, names: str | None) -> list[str] | None:
    """The names by comma; None for all."""
    if names is None:
        return None
    nowhere = Round(RESULTS, RESULTS, RESULTS, on_gpu=False)
    only, known = [name.strip() for name in names.split(",")], [step.name for step in PARTS[part](nowhere)]
    if unknown := set(only) - set(known):
        got = ", ".join(sorted(unknown)) or "nothing"
        raise WrongArgument(f"steps must be of {', '.join(known)}, got {got}")
    return only
