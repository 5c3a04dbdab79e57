"""`python -m bench SUITE [options]`: the front of the benchmark suite."""

import argparse
import importlib
import sys

from padfree_bench.measuring.cases import SUITES
from padfree_bench.measuring.errors import DeviceLost
from padfree_bench.measuring.processes import positive_minutes
from padfree_bench.measuring.results import RESULTS, fault_line

# Commands with options of their own: the module, imported only when asked for, and what it is for.
COMMANDS = {
    "compile-report": (
        "compiled.compile_report",
        "registers, shared memory and predicted time of every kernel configuration, without a GPU",
    ),
    "cost-model": (
        "compiled.cost_check",
        "how well predicted times of launches agree with measured ones",
    ),
    "tune": (
        "tuning.tune",
        "propose rows for the kernel's configuration table: measured on a GPU, else predicted",
    ),
    "gpu-round": (
        "gpu_round.driver",
        "a GPU's quarter of an hour: proof and first figures, then all tables; a rehearsal without one",
    ),
    "report": ("reports.report", "plots, one HTML page, and README's table from the result files"),
    "compare": ("reports.compare", "what got slower from result file A to B beyond noise"),
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = top.add_subparsers(dest="suite", required=True, metavar="COMMAND")
    for name, summary in SUITES.items():
        add_suite_options(commands.add_parser(name, help=summary, description=summary), name)
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    return top


def add_suite_options(suite: argparse.ArgumentParser, name: str) -> None:
    """The options that every suite shares, and those that mean something to this one."""
    shapes = "groups (imdb, full, padding, length, batch) or B64-H12-D64-S400-imdb-bf16, by comma"
    sizes = "model sizes, by comma; an unknown name lists them all"
    directions = "forward, backward, both, by comma"
    models = "forward (inference), both (training), by comma"
    add = suite.add_argument
    add("--shapes", help=shapes if name in ("attention", "memory") else sizes)
    add("--dtypes", help="fp32, fp16, bf16, by comma")
    add("--peers", help="implementations by name, by comma; an unknown name lists them all")
    if name == "epoch":
        add("--reviews", required=True, help="a .parquet or another file of reviews (text, label)")
        add("--tokenizer", required=True, help="a tokenizer's folder")
        add("--limit", type=int, help="train on so many reviews and hold out as many (default: half of all)")
    if name != "train":
        loops = "epoch, predict, by comma"
        told = {"encoder": models, "hf": models, "epoch": loops}
        add("--directions", help=told.get(name, directions))
    add("--quick", action="store_true", help="a handful of small cases; kept apart from full results")
    if name == "attention":
        add("--twice", action="store_true", help="time every peer a second time under another name")
    add("--seed", type=int, help="draw the inputs of an earlier run; a new seed when left out")
    add("--no-pictures", action="store_true", help="draw none now; `report` draws them later")
    add("--json", action="store_true", help="print the result file instead of the table")
    add("--minutes", type=positive_minutes, help="start no further case after this many minutes")
    add("--label", help="part of the file name; needed where options leave out a part of the suite")
    add("--output", default=str(RESULTS), help="folder for results (default: bench/results)")


def main(argv: list[str] | None = None) -> int:
    """Run one command; a wrong argument is one line on standard error and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return _run_command(argv[0], argv[1:])
    options = parser().parse_args(argv)
    suite = importlib.import_module(f"padfree_bench.suites.{options.suite}")
    try:
        result = suite.run(options, argv)
    except (ValueError, OSError) as error:
        print(f"python -m bench {options.suite}: {error}", file=sys.stderr)
        return 2
    except DeviceLost as error:
        print(f"stopped, the GPU takes no more work: {error}; the cases before are saved", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the cases measured so far are saved", file=sys.stderr)
        return 130
    if result.faults:
        print(f"python -m bench {options.suite}: {fault_line(result)}; all is saved", file=sys.stderr)
    return 1 if result.faults else 0


def _run_command(name: str, argv: list[str]) -> int:
    try:
        return int(importlib.import_module(f"padfree_bench.{COMMANDS[name][0]}").main(argv) or 0)
    except OSError as error:
        print(f"python -m bench {name}: {error}", file=sys.stderr)
        return 2
