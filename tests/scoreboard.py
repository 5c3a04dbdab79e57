"""The kernel rows of the reliability scoreboard, each with its goal, its tests and a figure counted from them.

`python tests/scoreboard.py --write docs/reliability.md` writes the table; nothing in it is typed in by hand but the
goals. Figures that only a run can give are printed at the end of every run, and the table says so.
"""

import argparse
import ast
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
LINK = re.compile(r"\b[\w.-]+#\d+")
NO_GPU = "not measured: no GPU"
GPU_ROUND = "round-*.json"


@dataclass(frozen=True)
class Row:
    """One row: what is measured, its goal, the test files it rests on, and the figure today."""

    number: str
    what: str
    goal: str
    files: tuple[str, ...]
    figure: str


def functions(*patterns: str) -> Iterator[ast.FunctionDef]:
    """The test functions of these files."""
    for pattern in patterns:
        for path in sorted(TESTS.glob(pattern)):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                    yield node


def decorators(function: ast.FunctionDef) -> str:
    return " ".join(ast.unparse(d) for d in function.decorator_list)


def replays() -> tuple[int, int, int]:
    """(named replays of known bugs, those that need a GPU, reports they link)."""
    named = [
        f
        for f in functions("test_known_bugs_*.py", "test_giants.py")
        if LINK.search(ast.get_docstring(f) or "")
    ]
    links = {link for f in named for link in LINK.findall(ast.get_docstring(f) or "")}
    gpu = sum(bool(re.search(r"\bcuda\b|needs_gpu", decorators(f))) for f in named)
    return len(named), gpu, len(links)


def gpu_figure(*steps: str) -> str:
    """What the newest `make gpu-round` on a GPU says of these steps."""
    read = [
        json.loads(path.read_text()) for path in sorted((ROOT / "bench" / "results").glob(f"*/{GPU_ROUND}"))
    ]
    on_gpu = [part for part in read if part["environment"]["device_type"] == "cuda"]
    found = {
        step["name"]: f"{step['name']} {step['status']} ({part['environment']['device']})"
        for part in sorted(on_gpu, key=lambda part: part["environment"]["started"])
        for step in part["steps"]
    }
    return ", ".join(found.get(name, f"{name} not run") for name in steps) if on_gpu else NO_GPU


def audit_figure() -> str:
    from faults import FAULTS

    result = json.loads((TESTS / "faults" / "result.json").read_text())
    reasons = {fault.name: fault.reason or "unexplained" for fault in FAULTS}
    survivors = [
        f"{v['name']} ({reasons.get(v['name'], 'gone')})" for v in result["verdicts"] if not v["killed"]
    ]
    share = result["killed"] / result["total"]
    named = f"; survivors: {'; '.join(survivors)}" if survivors else ""
    return f"{result['killed']} of {result['total']} killed ({share:.1%}){named}"


def rows() -> list[Row]:
    # the tests' own tables, read only here: importing them decorates kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")
    sys.path[:0] = [str(TESTS), str(ROOT / "kernels"), str(ROOT / "bench")]
    from _planted_faults import PLANTED
    from bad_calls import BAD_CALLS
    from padfree_bench.gpu_round.checks import REPEATS
    from test_giants import ROLES

    bugs, on_gpu, links = replays()
    properties = [f for f in functions("test_properties.py") if "given" in decorators(f)]
    printed = "printed at the end of every run"
    return [
        Row("R1", "forward and backward cases on every submission", ">= 2,000 in three dtypes",
            ("test_forward.py", "test_backward.py", "test_packed.py"), printed),
        Row("R2", "seeds of each case", "5 fixed, 1 rotating and printed", ("conftest.py",), f"{seed_count()} fixed, 1 rotating, {printed}"),
        Row("R3", "error rule", "max error <= 1.5x forward, 2x backward of PyTorch's + 1 ulp, against fp64",
            ("test_forward.py", "test_backward.py"), factors()),
        Row("R4", "launches under the sanitizer", "all, 0 findings; >= 12 planted faults reported",
            ("test_sanitizer.py", "test_sanitizer_arithmetic.py"), f"{len(PLANTED)} planted faults; launches and findings {printed}"),
        Row("R5", "fault audit", ">= 60 faults, >= 95 % killed", ("test_faults.py",), audit_figure()),
        Row("R6", "bitwise properties over generated examples", ">= 12 properties", ("test_properties.py",), f"{len(properties)} properties"),
        Row("R7", "known bugs of other libraries replayed by name", ">= 40",
            (*(f"test_known_bugs_{name}.py" for name in ("masks", "shapes", "system", "devices")), "test_giants.py"),
            f"{bugs} replays ({on_gpu} need a GPU) of {links} reports"),
        Row("R8", "roles with offsets beyond 2^31 and 2^32; grids beyond 65,535", ">= 10 roles, forward and backward",
            ("test_giants.py",), f"{len(ROLES)} roles"),
        Row("R9", "wrong calls refused by name before launch", ">= 80", ("test_bad_calls.py",), f"{len(BAD_CALLS)} calls"),
        Row("R10", "assertions on compiled code", "every configuration: no spill, no atomic, no single TF32 product for fp32",
            ("test_aot.py", "test_known_bugs_system.py"), f"{sum(1 for _ in functions('test_aot.py'))} tests; the whole table by `make aot`"),
        Row("R11", "opcheck, gradcheck, compile, second order", "4 of 4 on 12 inputs", compile_files(), f"{compile_tests()} tests"),
        Row("R12", "generated examples", ">= 1,000 a run, 20,000 in a soak run", ("test_properties.py",), examples(len(properties))),
        *(
            Row(number, what, goal, (), gpu_figure(*steps))
            for number, steps, what, goal in (
                ("R20", ("agreement",), "compiled kernels against fp64 on the GPU", "every row, feature and padding"),
                ("R21", ("repeats",), "bitwise repeats under load", f"{REPEATS:,} x 4, forward and backward"),
                ("R22", ("memcheck", "racecheck"), "compute-sanitizer", "every kernel, 0 errors"),
                ("R23", ("graph",), "graph replay on new inputs beside allocations", "bitwise"),
            )
        ),
    ]  # fmt: skip


def seed_count() -> int:
    match = re.search(
        r"^SEEDS = \(([^)]*), ROTATING_SEED\)", (TESTS / "conftest.py").read_text(), re.MULTILINE
    )
    assert match, "conftest.py names its seeds"
    return len(match[1].split(","))


def factors() -> str:
    from padfree.testing import BACKWARD_FACTOR, FORWARD_FACTOR

    return f"{FORWARD_FACTOR}x forward, {BACKWARD_FACTOR}x backward, asserted"


def compile_files() -> tuple[str, ...]:
    return tuple(
        sorted(
            {
                p.name
                for p in TESTS.glob("test_*.py")
                if re.search(r"\bopcheck\(|\bgradcheck\(", p.read_text())
            }
        )
    )


def compile_tests() -> int:
    words = r"\bopcheck\(|\bgradcheck\(|torch\.compile\(|create_graph=True"
    return sum(bool(re.search(words, ast.unparse(f))) for f in functions("test_*.py"))


def examples(properties: int) -> str:
    ci, soak = (int(n) for n in re.findall(r"max_examples=(\d+)", (TESTS / "conftest.py").read_text()))
    return f"{properties * ci:,} a run, {properties * soak:,} in `make soak`"


def render() -> str:
    lines = [
        "# Reliability",
        "",
        "Written by `python tests/scoreboard.py --write docs/reliability.md` from the tests; a test fails when it is stale.",
        "",
        "| row | what | goal | tests | today |",
        "|---|---|---|---|---|",
    ]
    for row in rows():
        files = ", ".join(f"[{name}](../tests/{name})" for name in row.files) or "`make gpu-round`"
        lines.append(f"| {row.number} | {row.what} | {row.goal} | {files} | {row.figure} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="write the table there instead of printing it"
    )
    options = parser.parse_args()
    if options.write:
        options.write.parent.mkdir(exist_ok=True)
        options.write.write_text(render())
    else:
        print(render(), end="")


if __name__ == "__main__":
    main()
