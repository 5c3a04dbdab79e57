"""`python -m bench SUITE [options]`: the front of the benchmark suite."""

import argparse
import importlib
import sys

from padfree_bench.measuring.processes import positive_minutes
from padfree_bench.measuring.results import RESULTS, SUITES, DeviceLost, fault_line

# Owned by modules with their own options; imported only when asked for.
OWN_OPTIONS = {
    "compile-report": "padfree_bench.compiled.compile_report",
    "tune": "padfree_bench.tuning.tune",
    "gpu-round": "padfree_bench.gpu_round.driver",
    "report": "padfree_bench.reports.report",
    "compare": "padfree_bench.reports.compare",
}
HELP = {
    "compile-report": "registers, shared memory and predicted time of every kernel configuration, without a GPU",
    "tune": "propose rows for the kernel's configuration table: measured on a GPU, else predicted",
    "gpu-round": "a GPU's quarter of an hour: proof and first figures, then all tables; a rehearsal without one",
    "report": "plots, one HTML page, and README's table from the result files",
    "compare": "what got slower from result file A to B beyond noise",
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = top.add_subparsers(dest="suite", required=True, metavar="COMMAND")
    for name, summary in SUITES.items():
        suite = commands.add_parser(name, help=summary, description=summary)
        add_suite_options(suite, name)
    for name, summary in HELP.items():
        commands.add_parser(name, help=summary, add_help=False)
    return top


def add_suite_options(suite: argparse.ArgumentParser, name: str) -> None:
    """The options that every suite shares, and those that mean something to this one."""
    shapes = "groups (imdb, full, padding, length, batch) or B64-H12-D64-S400-imdb-bf16, by comma"
    sizes = "model sizes, by comma; an unknown name lists them all"
    suite.add_argument("--shapes", help=shapes if name in ("attention", "memory") else sizes)
    suite.add_argument("--dtypes", help="fp32, fp16, bf16, by comma")
    suite.add_argument("--peers", help="implementations by name, by comma; an unknown name lists them all")
    if name != "train":
        models = "forward (inference), both (training), by comma"
        suite.add_argument(
            "--directions", help=models if name in ("encoder", "hf") else "forward, backward, both, by comma"
        )
    suite.add_argument(
        "--quick", action="store_true", help="a handful of small cases; kept apart from full results"
    )
    if name == "attention":
        suite.add_argument(
            "--twice", action="store_true", help="time every peer a second time under another name"
        )
    suite.add_argument("--seed", type=int, help="draw the inputs of an earlier run; a new seed when left out")
    suite.add_argument("--no-pictures", action="store_true", help="draw none now; `report` draws them later")
    suite.add_argument("--json", action="store_true", help="print the result file instead of the table")
    suite.add_argument(
        "--minutes", type=positive_minutes, help="start no further case after this many minutes"
    )
    suite.add_argument(
        "--label", help="part of the file name; needed where options leave out a part of the suite"
    )
    suite.add_argument("--output", default=str(RESULTS), help="folder for results (default: bench/results)")


def main(argv: list[str] | None = None) -> int:
    """Run one command; a wrong argument is one line on standard error and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in OWN_OPTIONS:
        return _own_options(argv[0], argv[1:])
    options = parser().parse_args(argv)
    module = importlib.import_module(f"padfree_bench.suites.{options.suite}")
    try:
        result = module.run(options, argv)
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


def _own_options(name: str, argv: list[str]) -> int:
    try:
        module = importlib.import_module(OWN_OPTIONS[name])
    except ModuleNotFoundError as error:
        if error.name != OWN_OPTIONS[name]:
            raise
        print(f"python -m bench {name}: not part of this checkout", file=sys.stderr)
        return 2
    try:
        return int(module.main(argv) or 0)
    except OSError as error:
        print(f"python -m bench {name}: {error}", file=sys.stderr)
        return 2
