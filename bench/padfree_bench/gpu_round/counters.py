"""What binds the headline's kernels: each launched once under Nsight Compute, its counters kept in counters.json.

Every counter, and the samples of every instruction, are left as CSV in the folder's logs/. Caches are flushed before
each of a kernel's replays; clocks are left as they are.
"""

import csv
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from padfree_bench.gpu_round.steps import worker
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
    places = ("opt/nvidia/nsight-compute/*/ncu", "usr/local/cuda*/bin/ncu")
    others = (str(path) for place in places for path in sorted(Path("/").glob(place), reverse=True))
    return shutil.which("ncu") or next(others, None)


def number(text: str) -> float | str:
    """A counter's value, in ncu's notation with commas between thousands; text where it is none."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def read_counters(text: str) -> list[dict[str, Any]]:
    """Of ncu's raw page as CSV (a row of names, one of units, one a kernel) the counters worth keeping, in base units."""
    names, units, *kernels = csv.reader(line for line in text.splitlines() if line.startswith('"'))
    keys = [f"{name} [{unit}]" if unit else name for name, unit in zip(names, units, strict=True)]
    found = []
    for values in kernels:
        kept = zip(names, keys, values, strict=True)
        counters = {key: number(value) for name, key, value in kept if KEPT.fullmatch(name) and value}
        found.append({"kernel": values[names.index("Kernel Name")], **counters})
    return found


def main(folder: str) -> int:
    ncu, logs = find_ncu(), Path(folder) / "logs"
    if ncu is None:
        print("Nsight Compute's ncu is not installed")
        return 1
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        report = f"{scratch}/headline.ncu-rep"
        line = [ncu, "--set", "full", "--clock-control", "none", "--kernel-name", KERNELS, "-f", "-o", report]
        subprocess.run([*line, *worker("checks", "headline")], check=True, preexec_fn=die_with_parent)
        read = [ncu, "--import", report, "--csv", "--print-units", "base", "--page"]
        raw = subprocess.run([*read, "raw"], capture_output=True, text=True, check=True).stdout
        (logs / "counters-raw.csv").write_text(raw)
        counters = read_counters(raw)
        write_whole(Path(folder) / "counters.json", json.dumps(counters, indent=1) + "\n")
        print(json.dumps({"kernels": len(counters)}), flush=True)
        line = [*read, "source", "--print-source", "sass"]
        source = subprocess.run(line, capture_output=True, text=True, check=False)
        (logs / "counters-source.csv").write_text(source.stdout)
    return 0
