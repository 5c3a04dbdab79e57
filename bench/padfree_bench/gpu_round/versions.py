"""What machine this is and what its software says of itself, as one line of JSON; nothing is set, only read."""

import hashlib
import json
import subprocess
from pathlib import Path

import torch
import triton

from padfree_bench import machine


def compiler() -> dict[str, str]:
    """What decides whether a cache of compiled kernels serves here."""
    from triton.runtime.cache import triton_key

    package = Path(triton.__file__).parent
    ptxas = package / "backends" / "nvidia" / "bin" / "ptxas"
    said = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256((package / "_C" / "libtriton.so").read_bytes()).hexdigest()
    return {
        "triton": triton.__version__,
        "libtriton_sha256": digest[:16],
        "triton_key_sha256": hashlib.sha256(triton_key().encode()).hexdigest()[:16],
        "ptxas": said.strip().splitlines()[-1] if said.strip() else "?",
    }


def main() -> None:
    device = machine.pick_device()
    found = machine.environment(device, ["gpu-round"])
    found |= {"folder": machine.device_slug(device), "compiler": compiler()}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        found["memory_free_gib"], found["memory_total_gib"] = round(free / 2**30, 1), round(total / 2**30, 1)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
