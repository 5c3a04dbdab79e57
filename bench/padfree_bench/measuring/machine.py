"""Which machine and which versions: the header of every result file."""

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from padfree_bench.measuring.clocks import read_clocks
from padfree_bench.measuring.processes import output

ROOT = Path(__file__).resolve().parents[3]
# {"commit", "clean", "sources"}: written beside a copy of the tree that travels without its history.
CARRIED_COMMIT = ROOT / ".carry" / "commit"
CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
SOURCES = (
    "kernels/padfree/**/*.py",
    "model/imdb_classifier/**/*.py",
    "bench/padfree_bench/**/*.py",
    "bench/padfree_bench/data/*.json",
)
PACKAGES = ["torch", "triton", "transformers", "numpy"]
PACKAGES += ["flash-attn-4", "flash-attn", "xformers", "nvidia-cudnn-frontend", "liger-kernel"]


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {usable_cores()} cores"


def device_slug(device: torch.device) -> str:
    """The folder of this device's results, such as h100-80gb-hbm3 or cpu-2-cores."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-").removeprefix("nvidia-")


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory; 0 where nothing tells."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [path.read_text().strip() for path in CPU_CACHES.glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=0)


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def commit() -> tuple[str | None, bool | None]:
    """(commit, whether the tree is as committed) from PADFREE_COMMIT, the file that came with a copy, or git.

    A copy may hold a history that ends before it: the file is right where it was written for these very sources.
    """
    changed = output("git", "status", "--porcelain", "--untracked-files=no")
    clean = None if changed is None else not changed
    if told := os.environ.get("PADFREE_COMMIT"):
        return told, clean
    try:
        carried = json.loads(CARRIED_COMMIT.read_text())
        if carried["sources"] == sources_digest():
            return str(carried["commit"]), bool(carried["clean"])
    except (OSError, KeyError, TypeError, ValueError):
        pass
    return output("git", "rev-parse", "HEAD"), clean


def sources_digest() -> str:
    """Of all that decides which kernels there are, what is in them and how they are measured."""
    digest = hashlib.sha256()
    for file in sorted(file for pattern in SOURCES for file in ROOT.glob(pattern)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _cpu_model() -> str:
    try:
        told = re.search(r"^model name.*?:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return platform.processor()
    return told[1].strip() if told else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def busy(environment: Mapping[str, Any]) -> str:
    """The load in words where other work ran on this machine's cores just before the run, else ""."""
    load, cores = environment.get("load_before"), environment.get("cores")
    return "" if load is None or cores is None or load <= cores else f"load {load} on {cores} cores"


def environment(device: torch.device, command: list[str]) -> dict[str, object]:
    """Everything a reader needs to judge or repeat a figure."""
    known, clean = commit()
    return {
        "device": device_name(device),
        "device_type": device.type,
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "versions": {package: _version(package) for package in PACKAGES},
        "commit": known,
        "commit_is_clean": clean,
        "command": " ".join(["python -m bench", *command]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "clocks_before": read_clocks(),
        "fp32_matmul": torch.get_float32_matmul_precision(),
    }
