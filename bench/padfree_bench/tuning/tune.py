"""`python -m bench tune`: which rows of the configuration table should change, and what it is worth to know the lengths.

On a GPU the candidates that `--screen` chose beforehand are held against fp64, then timed as CUDA graphs beside the
current row, interleaved; one that wins by more than noise (its 80th percentile below the row's 20th) is accepted. Calls
that are told their keys in another way than by the mask have answers of their own.
Without a GPU the same questions are answered by the cost model: a prediction, never accepted. A person edits the table.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from padfree._triton import configs
from padfree._triton.configs import Row
from padfree._triton.launch import forget
from padfree_bench.compiled.aot import why_not_compile
from padfree_bench.measuring import headline, machine
from padfree_bench.measuring.cases import Case, parse_case
from padfree_bench.measuring.check import Truth, compute_truth, relative_error
from padfree_bench.measuring.errors import DeviceLost
from padfree_bench.measuring.files import keep_earlier
from padfree_bench.measuring.inputs import make_inputs
from padfree_bench.measuring.processes import positive_minutes, stop_on_sigterm
from padfree_bench.measuring.results import RESULTS
from padfree_bench.measuring.timing import Call, Effort, capture_graph, measure, own_stream
from padfree_bench.tuning.children import Found, first_line, in_children
from padfree_bench.tuning.tune_candidates import (
    CANDIDATES,
    compile_item,
    config_of,
    read_candidates,
    screen,
    write_lines,
)
from padfree_bench.tuning.work import ARCH, MASK, PASSES, TOLD, Item, Question, Work, name_of

HEADLINE = ",".join(headline.HEADLINE)
BASIS = {True: "measured on this GPU", False: "predicted by a static cost model, nothing was run"}
# fp32 results whose truth is the current row's: its sums in another order.
SAME = 1e-4
# What was measured on short sequences says nothing about longer ones.
LONGEST = 1024


class OutOfTime(Exception):
    """The time given is over; the question at hand stays unanswered."""


def questions(cases: str, passes: str) -> list[Question]:
    """Every pass over every case; ValueError in one line for what is no pass, no case, or not in the question."""
    names, chosen = passes.split(","), [parse_case(text, "bf16") for text in cases.split(",")]
    for name in names:
        if name not in PASSES:
            raise ValueError(f"passes must be of {', '.join(PASSES)}, got {name!r}")
    for case in chosen:
        if case.dtype == "fp32" or case.head_dim % 8 or case.head_dim > 256 or case.seq == 1:
            raise ValueError(f"cases must be 16-bit, S > 1, D a multiple of 8 up to 256, got {case.id}")
    return [Question(name, case) for case in chosen for name in names]


def offers(asked: list[Question], path: Path = CANDIDATES) -> dict[Question, list[Found]]:
    """Each question's candidates: by how keys are told, and of these the current row first whether or not the file has it."""
    rows, offered = read_candidates(path), dict[Question, list[Found]]()
    for question in asked:
        found = [row for row in rows if (row["pass"], row["case"]) == (question.passname, question.case.id)]
        if not found:
            raise ValueError(f"{path} has none for {question}: python -m bench tune --screen --cases ...")
        offered[question] = []
        for told in TOLD:
            now = question.row(told).config
            rows_told = [row for row in found if row["told"] == told]
            current = [row for row in rows_told if row["config"] == now] or [{"config": now, "told": told}]
            offered[question] += [*current, *(row for row in rows_told if row["config"] != now)]
    return offered


def warm_items() -> list[Item]:
    """What `compile_item` takes, in any process and without a GPU, so that a run on the headline compiles nothing."""
    offered = offers(questions(HEADLINE, ",".join(PASSES)))
    return [question.item(row["config"], row["told"]) for question, rows in offered.items() for row in rows]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN in here: an element that a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@lru_cache(maxsize=1)
def prepared(case: Case, device: torch.device) -> tuple[Work, Truth]:
    """The passes of one case follow one another."""
    inputs = make_inputs(case, device)
    return Work(inputs), compute_truth(inputs)


def wrong(found: dict[str, Tensor], current: dict[str, Tensor], work: Work, truth: Truth) -> str:
    """Why these are not the pass's results, by fp64 or else by the current row's; "" where they are."""
    for name, actual in found.items():
        exact, limit = getattr(truth, name, current[name]), truth.limits.get(name, SAME)
        got, expected = (x.reshape(*x.shape[:3], -1) for x in (actual, exact))
        error, _ = relative_error(got, expected, work.inputs.keep)
        if not error <= limit:
            return f"wrong answer: relative error of {name} {error:.1e} (limit {limit:.0e})"
        if not torch.equal(*(x.transpose(1, 2)[work.inputs.padding] for x in (actual, current[name]))):
            return f"wrong answer: {name} at padding"
    return ""


def time_candidates(question: Question, rows: list[Found], device: torch.device, deadline: float) -> None:
    """Check every candidate alone, then time those that are right, interleaved; the rows take what was found."""
    (work, truth), calls = prepared(question.case, device), dict[str, Call]()
    current: dict[str, Tensor] = {}
    for row in rows:
        if time.monotonic() > deadline:
            raise OutOfTime
        make = partial(partial, work.launch, question.passname, row["config"], row["told"])
        try:
            if "refused" not in row:
                with poisoned_memory():
                    found = make()()
                current = current or found
                if reason := wrong(found, current, work, truth):
                    raise ValueError(reason)
                calls[label(row)] = capture_graph(make)
        except torch.AcceleratorError as error:
            # An illegal access is a fault to look into, and this process's GPU context is gone.
            raise DeviceLost(f"{question} {label(row)}: {first_line(error)}") from error
        except Exception as error:  # noqa: BLE001 - each is a reason for the row
            row["refused"] = first_line(error)
        if "refused" in rows[0]:
            return  # nothing to compare with
    left = max(0.1, deadline - time.monotonic())
    samples = measure(calls, device, Effort(min(2.0, left), least=10, most=100, at_most_seconds=left))
    for row in rows:
        if sample := samples.get(label(row)):
            figures = {"p20_us": sample.p20, "p50_us": sample.p50, "p80_us": sample.p80}
            row |= {name: float(f"{ms * 1e3:.4g}") for name, ms in figures.items()}


def label(row: Found) -> str:
    return f"{name_of(row['config'])} {row['told']}"


def decide(question: Question, rows: list[Found], on_gpu: bool) -> list[Found]:
    """For each way to tell keys name the fastest; accept it only when measured and its p80 is below the current row's p20."""
    groups = ([row for row in rows if row["told"] == told] for told in TOLD)
    return [decide_among(question, group, on_gpu) for group in groups if group]


def decide_among(question: Question, rows: list[Found], on_gpu: bool) -> Found:
    """`decide` among rows whose keys are told alike, the current row first."""
    figure, now = "p50_us" if on_gpu else "predicted_us", rows[0]
    usable = [row for row in rows if figure in row and "refused" not in row]
    best = min(usable, key=lambda row: row[figure], default=now)
    return {
        "pass": question.passname, "kind": question.key[1], "head_dim": question.key[2], "case": question.case.id,
        "max_length": min(question.row(now["told"]).max_length, LONGEST), "told": now["told"], "config": best["config"],
        "current": now["config"], "best_us": best.get(figure), "current_us": now.get(figure),
        "accepted": on_gpu and best.get("p80_us", float("inf")) < now.get("p20_us", 0.0),
    }  # fmt: skip


def apply_rows(path: Path) -> list[Found]:
    """Put the rows that a GPU run accepted first in this process's table, for sequences as short; returns them.

    One that was measured with known lengths stands before those that serve a mask too.
    """
    try:
        accepted = [answer for answer in json.loads(path.read_text())["answers"] if answer["accepted"]]
        for a in reversed(accepted):
            known, rows = a.get("told", MASK) != MASK, configs.TABLE[a["pass"], a["kind"], a["head_dim"]]
            row = Row(
                config_of(a["config"]),
                f"measured: {path.name}",
                a["max_length"],
                (ARCH,),
                plain=True,
                known=known,
            )
            rows.insert(0 if known else [row.known for row in rows].index(False), row)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"cannot read tuned rows from {path}: {error}") from None
    configs.row_for.cache_clear()
    forget()
    return accepted


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m bench tune", description=__doc__)
    options.add_argument("--cases", default=HEADLINE, help="cases by comma; default: the headline's two")
    options.add_argument("--passes", default=",".join(PASSES), help="by comma; default: %(default)s")
    options.add_argument("--candidates", type=Path, default=CANDIDATES, help="file of the screening")
    options.add_argument("--screen", action="store_true", help="write that file, without a GPU")
    options.add_argument("--jobs", type=int, help="compilers side by side; default: as the machine allows")
    options.add_argument("--minutes", type=positive_minutes, default=0.8, help="ends after them; default 0.8")
    options.add_argument("--output", type=Path, default=RESULTS, help="folder for results")
    return options


def main(argv: list[str]) -> int:
    """Answer the questions, saved one by one; status 2 with one line for a wrong argument, 1 for a lost GPU or none answered."""
    options, device = parser().parse_args(argv), machine.pick_device()
    on_gpu, deadline = device.type == "cuda", time.monotonic() + options.minutes * 60
    jobs = options.jobs or min(16, machine.usable_cores())
    stop_on_sigterm()
    try:
        asked = questions(options.cases, options.passes)
        if (on_gpu or options.screen) and (reason := why_not_compile()):
            raise ValueError(reason)
        if options.screen:
            screen(asked, options.candidates, jobs)
            return 0
        offered = offers(asked, options.candidates)
        if on_gpu:
            compile_beforehand(offered, jobs, deadline)
            if (arch := configs.architecture(device)) != ARCH:
                raise ValueError(f"candidates are screened for sm_{ARCH}, this GPU is sm_{arch}")
        if not answer(offered, device, deadline, options.output, argv):
            print("python -m bench tune: no question was answered in the time given", file=sys.stderr)
            return 1
    except ValueError as error:
        print(f"python -m bench tune: {error}", file=sys.stderr)
        return 2
    except DeviceLost as error:
        print(f"stopped, the GPU takes no more work: {error}; the answers before are saved", file=sys.stderr)
        return 1
    return 0


def compile_beforehand(offered: dict[Question, list[Found]], jobs: int, deadline: float) -> None:
    """Fill Triton's cache side by side, before this process touches the GPU; quick where it is full already.

    Half of the time is for timing: what is not compiled by then is left out, so that none stalls the run.
    """
    until = (time.monotonic() + deadline) / 2
    rows = {
        question.item(row["config"], row["told"]): row for question, found in offered.items() for row in found
    }
    outcomes = dict(in_children(compile_item, list(rows), jobs, until=until))
    for item, row in rows.items():
        row.update(outcomes.get(item, {"refused": "not compiled in half of the time given"}))


def answer(
    offered: dict[Question, list[Found]], device: torch.device, deadline: float, output: Path, argv: list[str]
) -> int:
    """Answer what the time allows; returns how many questions that were, and leaves no other run's file."""
    on_gpu = device.type == "cuda"
    path = output / machine.device_slug(device) / "tune.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    answers: list[Found] = []
    content: dict[str, Any] = {
        "kind": "tune", "basis": BASIS[on_gpu], "arch": ARCH,
        "environment": machine.environment(device, ["tune", *argv]),
        "not_reached": [str(question) for question in offered], "answers": answers, "rows": list[Found](),
    }  # fmt: skip
    keep_earlier(path)
    write_lines(path, content)
    with own_stream(device):
        for question, rows in offered.items():
            try:
                if on_gpu:
                    time_candidates(question, rows, device, deadline)
            except OutOfTime:
                break
            answers += (found := decide(question, rows, on_gpu))
            content["not_reached"] = content["not_reached"][1:]
            content["rows"] += [{"pass": question.passname, "case": question.case.id, **row} for row in rows]
            write_lines(path, content)
            print("\n".join(map(line, found)), flush=True)
    answered = len(offered) - len(content["not_reached"])
    print(f"{answered} of {len(offered)} questions, {content['basis']}: {path}", file=sys.stderr)
    return answered


def line(a: Found) -> str:
    outcome = "accept" if a["accepted"] else "keep" if a["config"] == a["current"] else "consider"
    now, best = (
        f"{name_of(a[which])} {a[us]} us" for which, us in (("current", "current_us"), ("config", "best_us"))
    )
    return f"{outcome:8} {a['pass']} {a['case']} by {a['told']}: now {now}, best {best}"
