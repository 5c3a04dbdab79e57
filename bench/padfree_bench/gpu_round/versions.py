"""What machine this is and what its software says of itself, as one line of JSON; nothing is set, only read."""

import json
from importlib.util import find_spec

import torch

from padfree_bench.gpu_round.carry import compiler
from padfree_bench.measuring import machine

# torch and Triton are there, or this would not run; the suites, imdb-train and a transformers model need these.
NEEDED = ("numpy", "tqdm", "transformers", "accelerate", "tokenizers", "safetensors", "pyarrow")


def main() -> None:
    device = machine.pick_device()
    found = machine.environment(device, ["gpu-round"])
    found["not_installed"] = [name for name in NEEDED if find_spec(name) is None]
    found |= {"folder": machine.device_slug(device), "compiler": compiler()}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        found["memory_free_gib"], found["memory_total_gib"] = round(free / 2**30, 1), round(total / 2**30, 1)
    print(json.dumps(found))
