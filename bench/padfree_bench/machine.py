"""Which machine and which versions: the header of every result file."""

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "numpy",
    "flash-attn-4",
    "flash-attn",
    "xformers",
    "nvidia-cudnn-frontend",
    "liger-kernel",
)
CLOCK_FIELDS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {usable_cores()} cores"


def device_slug(device: torch.device) -> str:
    """The folder of this device's results, such as nvidia-h200 or cpu-2-cores."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=False, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def clocks() -> dict[str, str] | None:
    """SM and memory clock, temperature and power as nvidia-smi reads them now; None without it."""
    answer = _output("nvidia-smi", f"--query-gpu={','.join(CLOCK_FIELDS)}", "--format=csv,noheader")
    if not answer:
        return None
    return dict(
        zip(CLOCK_FIELDS, (field.strip() for field in answer.splitlines()[0].split(",")), strict=False)
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def environment(device: torch.device, command: list[str]) -> dict[str, object]:
    """Everything a reader needs to judge or repeat a figure."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
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
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "versions": versions,
        # A copy of the tree without its history is told which commit it is.
        "commit": os.environ.get("PADFREE_COMMIT") or _output("git", "rev-parse", "HEAD"),
        "commit_is_clean": None if changed is None else not changed,
        "command": " ".join(["python -m bench", *command]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "clocks_before": clocks(),
        "fp32_matmul": torch.get_float32_matmul_precision(),
    }
