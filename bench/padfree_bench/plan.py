"""`python -m bench plan --part 1|2|3`: the full GPU round in parts that each end within nine minutes.

Each suite of a part is a process of its own, with a share of the part's minutes: it starts no further case after
that and is stopped a little later, so that neither a slow case nor a crash of the GPU takes the next suite along.
Suites write after every case; the page is drawn last.
"""

import argparse
import sys
import time
from pathlib import Path

from padfree_bench.cli import positive_minutes
from padfree_bench.processes import run_limited, stop_on_sigterm
from padfree_bench.results import RESULTS

ROOT = Path(__file__).resolve().parents[2]
# Those whose curves say something; the rest stand in part 1's tables, and compiling them for every shape takes minutes.
SWEEP_PEERS = (
    "padfree,padfree-skip,padfree-varlen,eager,sdpa,sdpa-efficient,sdpa-cudnn,sdpa-flash-nomask,"
    "varlen_attn,varlen_attn+pack,flex"
)


def attention(label: str, shapes: str, dtypes: str = "bf16") -> list[str]:
    return ["attention", "--label", label, "--dtypes", dtypes, "--shapes", shapes]


def sweep(shapes: str) -> list[str]:
    return [*attention(shapes, shapes), "--directions", "forward,both", "--peers", SWEEP_PEERS]


# (share of the part's minutes, arguments): the most telling cases first in every part.
PARTS: dict[int, list[tuple[float, list[str]]]] = {
    1: [(0.65, attention("imdb", "imdb")), (0.35, attention("full", "full"))],
    2: [(0.35, sweep("padding")), (0.35, sweep("length")), (0.30, sweep("batch"))],
    3: [
        (0.20, ["train"]),
        (0.25, ["encoder"]),
        (0.15, ["hf"]),
        (0.25, attention("precision", "imdb", "fp32,fp16")),
        (0.15, ["memory", "--label", "sweep", "--peers", SWEEP_PEERS]),
    ],
}
# Together under nine: the suites, a case that has started, and the page.
MINUTES, GRACE_MINUTES, REPORT_MINUTES = 7.25, 0.75, 0.75


def arguments(part: int, quick: bool) -> list[tuple[float, list[str]]]:
    """(share, arguments) of a part; with `quick` the small cases of each suite instead of its groups."""
    if not quick:
        return PARTS[part]
    lines = []
    for share, full in PARTS[part]:
        line = list(full)
        for option in ("--shapes", "--dtypes"):
            if option in line:
                at = line.index(option)
                del line[at : at + 2]
        lines.append((share, [*line, "--quick"]))
    return lines


def bench(line: list[str], minutes: float) -> str:
    """Run one command of the suite: "" for success, else what became of it."""
    status = run_limited([sys.executable, "-m", "bench", *line], minutes * 60, cwd=ROOT)
    return "stopped" if status is None else f"status {status}" if status else ""


def main(argv: list[str]) -> int:
    """Run one part; a suite that fails is reported and the next one runs."""
    parser = argparse.ArgumentParser(prog="python -m bench plan", description=__doc__)
    parser.add_argument("--part", type=int, choices=sorted(PARTS), required=True)
    parser.add_argument(
        "--minutes", type=positive_minutes, default=MINUTES, help=f"time for the part's cases ({MINUTES})"
    )
    parser.add_argument("--quick", action="store_true", help="rehearse with small cases")
    parser.add_argument("--output", default=str(RESULTS), help="folder for results (default: bench/results)")
    options = parser.parse_args(argv)
    stop_on_sigterm()
    output = str(Path(options.output).resolve())
    failed, begin, end = [], time.monotonic(), 0.0
    for share, line in arguments(options.part, options.quick):
        spent = (time.monotonic() - begin) / 60
        end += share * options.minutes
        left = max(end - spent, 0.1)
        line = [*line, "--minutes", f"{left:.2f}", "--output", output]
        print(f"[{spent:.1f} min] python -m bench {' '.join(line)}", flush=True)
        if trouble := bench(line, left + GRACE_MINUTES):
            failed.append(f"{line[0]} ({trouble})")
    if trouble := bench(["report", "--results", output], REPORT_MINUTES):
        failed.append(f"report ({trouble})")
    print(f"part {options.part}: {'failed: ' + ', '.join(failed) if failed else 'complete'}")
    return 1 if failed else 0
