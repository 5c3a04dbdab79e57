"""The menu of `python -m bench tune`: the candidates that a CPU chose for it beforehand, each with what it promises.

A question is one pass over one case of the benchmark. `screen` compiles every configuration worth a try for sm_90, each
in a process of its own and for every way in which a call may be told its keys, then the best of them once more with fewer
registers, and keeps the few that the cost model expects to be the fastest.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Any

import triton

from padfree._triton.configs import Config
from padfree_bench.compiled.cost_check import batch_of
from padfree_bench.compiled.cost_model import predict
from padfree_bench.compiled.costs import GPUS, costs_of, excluded, occupancy
from padfree_bench.measuring.cases import parse_case
from padfree_bench.measuring.files import write_whole
from padfree_bench.tuning.children import Found, in_children
from padfree_bench.tuning.work import ARCH, MASK, TOLD, Item, Question, compile_candidate, config_of, name_of

CANDIDATES = Path(__file__).parents[1] / "data" / "tune_candidates.json"
# A question's candidates, the current row among them, and how much slower than it they may be expected to be: twice the
# model's largest error.
MOST, SLOWEST = 12, 1.3
# Of configurations that differ in the depth of the pipeline alone, which the model tells apart worst.
DEPTHS = 2
# The share of its registers that a kernel may be asked to do without; ptxas spills beyond.
GIVEN_UP = 0.25


def compile_item(item: Sequence[Any]) -> Found:
    """`compile_candidate` for a process, of an `Item` or what JSON makes of it: only the cache keeps the kernel."""
    passname, case, config, told = item
    compile_candidate(passname, parse_case(case), config_of(config), told)
    return {}


def examine(item: Item) -> Found:
    """Compile a candidate and read it: registers, shared bytes, what it issues, expected µs, and why no GPU should time it."""
    passname, case, config, told = item
    compiled = compile_candidate(passname, parse_case(case), config, told)
    costs, refused = costs_of(compiled), excluded(compiled)
    found: Found = {name: compiled.resources[name] for name in ("registers", "stack")}
    found["shared"] = compiled.shared_bytes
    if costs is None:
        return found | {"refused": "the cost model finds no score loop"}
    batch = batch_of(parse_case(case))
    found["costs"], found["apart"] = asdict(costs), batch.together
    expected = predict(compiled.name, costs, GPUS[ARCH], batch, apart=batch.together)
    found["predicted_us"], found["waiting"] = round(expected.expected, 2), round(expected.waiting, 2)
    return found | ({"refused": refused} if refused else {})


def shortlist(current: dict[str, Config], found: list[Found]) -> list[Found]:
    """For each way to tell keys the current configuration and the best others by prediction, MOST in all, with reasons.

    Raises:
        ValueError: the current one was not compiled
    """
    kept: list[Found] = []
    for told in TOLD:
        rows = [row.copy() for row in found if row["told"] == told]
        (now,) = (row for row in rows if row["config"] == current[told])
        if "predicted_us" not in now:
            raise ValueError(f"the current row, {name_of(now['config'])}: {now['refused']}")
        now["reason"] = "; ".join(["current row", *filter(None, [now.pop("refused", None)])])
        depths = Counter[Config]()
        near = []
        for row in sorted((row for row in rows if "refused" not in row), key=lambda row: row["predicted_us"]):
            depths[row["config"]._replace(num_stages=0)] += 1
            against = row["predicted_us"] / now["predicted_us"]
            if row is now or depths[row["config"]._replace(num_stages=0)] > DEPTHS or against > SLOWEST:
                continue
            row["reason"] = (
                f"{against - 1:+.0%} expected: {row['costs']['ctas']} programs at once, each waits {row['waiting']:.0%}"
                f" of its time (the current row's: {now['costs']['ctas']}, {now['waiting']:.0%})"
            )
            near.append(row)
        kept += [now, *near][: MOST // len(TOLD)]
    return kept


def tighter(row: Found) -> Config | None:
    """The configuration with as many registers as let one program more fit, where it is they that keep it out."""
    config, registers = row["config"], row["registers"]
    if config.max_registers is not None:
        return None
    for fewer in range(registers // 8 * 8, ceil(registers * (1 - GIVEN_UP)) - 1, -8):
        if occupancy(ARCH, fewer, config.num_warps, row["shared"]) > row["costs"]["ctas"]:
            return config._replace(max_registers=fewer)
    return None


def look(items: list[Item], jobs: int) -> Iterator[Found]:
    """What `examine` finds of each item, with what names it; a line on stderr for each that no GPU should time."""
    for (passname, case, config, told), outcome in in_children(examine, items, jobs):
        if reason := outcome.get("refused"):
            print(f"{passname} {case} {name_of(config)} {told}: {reason}", file=sys.stderr, flush=True)
        yield {"pass": passname, "case": case, "config": config, "told": told, **outcome}


def menu(question: Question, jobs: int) -> tuple[list[Found], int]:
    """The question's candidates, the best of them also with fewer registers, and how many were compiled for it."""
    current = {told: question.row(told).config for told in TOLD}
    items = [question.item(config, told) for config in question.configs() for told in TOLD]
    found = list(look(items, jobs))
    best = shortlist(current, found)
    limited = [question.item(config, row["told"]) for row in best if (config := tighter(row))]
    found += look([item for item in limited if item not in items], jobs)
    return shortlist(current, found), len(found)


def screen(asked: list[Question], path: Path, jobs: int) -> None:
    """Choose the candidates of these questions anew and write them to the file, after each question."""
    rows: list[Found] = []
    for question in asked:
        try:
            kept, compiled = menu(question, jobs)
        except ValueError as error:
            print(f"{question} is left out: {error}", file=sys.stderr, flush=True)
            continue
        rows += kept
        write_lines(path, {"triton": triton.__version__, "arch": ARCH, "rows": rows})
        print(f"{question}: {len(kept)} of {compiled} kept", flush=True)


def read_candidates(path: Path) -> list[Found]:
    """The rows that `screen` wrote; ValueError in one line where the file holds none."""
    try:
        rows = [row | read_row(row) for row in json.loads(path.read_text())["rows"]]
        if unknown := {row["told"] for row in rows} - set(TOLD):
            raise ValueError(f"no call is told its keys by {', '.join(unknown)}")
        return rows
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"cannot read candidates from {path}: {error}") from None


def read_row(stored: Found) -> Found:
    """A stored row's configuration and how its call is told which keys are real."""
    return {"config": config_of(stored["config"]), "told": stored.get("told", MASK)}


def write_lines(path: Path, content: dict[str, Any]) -> None:
    """JSON with one entry of a list a line."""
    parts = []
    for name, value in content.items():
        lines = ",\n  ".join(map(_json, value)) if isinstance(value, list) else ""
        parts.append(f' "{name}": ' + (f"[\n  {lines}\n ]" if lines else _json(value)))
    write_whole(path, "{\n" + ",\n".join(parts) + "\n}\n")


def _json(entry: Any) -> str:
    """Configurations by their fields' names, which json.dumps takes for lists."""
    by_name = lambda value: value._asdict() if isinstance(value, Config) else value
    return json.dumps({k: by_name(v) for k, v in entry.items()} if isinstance(entry, dict) else entry)
