"""What binds the headline's kernels: each launched once under Nsight Compute, its counters kept in counters.json.

`python -m padfree_bench.gpu_round.counters FOLDER` also leaves every counter, and the samples of every instruction, as
CSV in FOLDER/logs. Caches are flushed before each of a kernel's replays; clocks are left as they are.
"""

import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from padfree_bench.gpu_round.steps import CHECKS, worker
from padfree_bench.measuring.files import write_whole
from padfree_bench.measuring.processes import die_with_parent

KERNELS = "regex:attention_forward|gradient_kernel"
# Of the thousand counters of the full set: time, bytes, how busy each unit and pipe was, occupancy, why warps waited.
KEPT = re.compile(
    r"gpu__time_duration\.sum|(dram|lts)__(bytes|t_bytes|t_sectors)\w*\.sum"
    r"|\w+__\w*throughput\w*\.avg\.pct_of_peak_sustained_(elapsed|active)"
    r"|sm__(inst_executed_)?pipe_\w+\.avg\.pct_of_peak_sustained_active"
    r"|smsp?__(inst_executed|inst_issued)\.(sum|avg\.per_cycle_active)|smsp__issue_active\.avg\.\w+"
    r"|sm(sp)?__(warps_active|maximum_warps\w*|cycles_active)\.avg\w*(\.\w+)?"
    r"|smsp__average_warps?_issue_stalled_\w+_per_issue_active\.ratio"
    r"|launch__(registers_per_thread|grid_size|block_size|waves_per_multiprocessor|occupancy_\w+|shared_mem_per_block\w*)"
)


def find_ncu() -> str | None:
    """Nsight Compute's command, from PATH or where its packages put it."""
    places = ("/opt/nvidia/nsight-compute/*/ncu", "/usr/local/cuda*/bin/ncu")
    others = (str(path) for place in places for path in sorted(Path("/").glob(place[1:]), reverse=True))
    return shutil.which("ncu") or next(others, None)


def number(text: str) -> float | str:
    """A counter's value, in ncu's notation with commas between thousands; text where it is none."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def read_counters(text: str) -> list[dict[str, Any]]:
    """Of ncu's raw page as CSV (a row of names, one of units, one a kernel) the counters worth keeping, in base units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    names, units, *kernels = csv.reader(lines)
    name_at = names.index("Kernel Name")
    return [
        {"kernel": values[name_at]}
        | {
            f"{name} [{unit}]" if unit else name: number(value)
            for name, unit, value in zip(names, units, values, strict=True)
            if KEPT.fullmatch(name) and value
        }
        for values in kernels
    ]


def main() -> int:
    folder = Path(sys.argv[1])
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    ncu = find_ncu()
    if ncu is None:
        print("Nsight Compute's ncu is not installed")
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        report = str(Path(scratch) / "headline.ncu-rep")
        line = [ncu, "--set", "full", "--clock-control", "none", "--kernel-name", KERNELS, "-f", "-o", report]
        subprocess.run([*line, *worker(CHECKS, "headline")], check=True, preexec_fn=die_with_parent)
        read = [ncu, "--import", report, "--csv", "--print-units", "base", "--page"]
        for page, *options in (("raw",), ("source", "--print-source", "sass")):
            said = subprocess.run(
                [*read, page, *options], capture_output=True, text=True, check=page == "raw"
            )
            (folder / "logs" / f"counters-{page}.csv").write_text(said.stdout)
            if page == "raw":
                found = read_counters(said.stdout)
                write_whole(folder / "counters.json", json.dumps(found, indent=1) + "\n")
                print(json.dumps({"kernels": len(found)}), flush=True)
    return 0


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main())
