"""The processes of `python -m bench gpu-check`: one step each, its findings as one line of JSON."""

import argparse
import ast
import json
import os
import resource
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from padfree import attention, testing
from padfree_bench import agreement
from padfree_bench.machine import pick_device
from padfree_bench.processes import workers

ROOT = Path(__file__).resolve().parents[2]
STORM = 8


def call(device: torch.device, seq: int, head_dim: int = 32, batch: int = 8, heads: int = 4) -> Any:
    """A function that runs forward and backward on fixed inputs and returns all results."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = testing.make_inputs(
        batch, heads, seq, seq, head_dim, dtype=dtype, padding="right", device=device
    )
    return lambda: testing.run(attention, inputs, impl="triton", skip_padded_queries=True)


def same(first: testing.Results, second: testing.Results) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None
    )


def repeats(device: torch.device) -> dict[str, Any]:
    """Results equal bit for bit while another stream keeps the GPU busy."""
    on_gpu = device.type == "cuda"
    count, changed = (1000 if on_gpu else 2), 0
    runs = [call(device, 400, 64), call(device, 333, 8)] if on_gpu else [call(device, 40, 16, 1, 1)]
    expected = [run() for run in runs]
    load = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16) if on_gpu else None
    stream = torch.cuda.Stream() if on_gpu else None
    for _ in range(count):
        if load is not None:
            with torch.cuda.stream(stream):
                load @ load
        changed += sum(not same(run(), first) for run, first in zip(runs, expected, strict=True))
    assert changed == 0, f"{changed} of {count * len(runs)} repeats differ"
    return {"repeats": count * len(runs), "device": device.type, "under_load": on_gpu}


def graph(device: torch.device) -> dict[str, Any]:
    """A captured forward and backward replayed on new inputs while another stream allocates."""
    inputs = testing.make_inputs(
        16, 4, 400, 400, 64, dtype=torch.bfloat16, padding="right", lse_gradient=False, device=device
    )
    run = lambda: testing.run(attention, inputs, impl="triton", skip_padded_queries=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        static = run()
    other = torch.cuda.Stream()
    for round_ in range(50):
        fresh = testing.make_inputs(
            16, 4, 400, 400, 64, dtype=torch.bfloat16, padding="right", seed=round_, device=device
        )
        for name in ("query", "key", "value", "d_out", "key_padding_mask"):
            getattr(inputs, name).copy_(getattr(fresh, name))
        with torch.cuda.stream(other):
            noise = [torch.full((2**20,), float("nan"), device=device) for _ in range(20)]
        captured.replay()
        torch.cuda.synchronize()
        del noise
        assert same(static, run()), f"replay {round_} differs from an eager call"
    return {"replays": 50}


def storm(device: torch.device) -> dict[str, Any]:
    """STORM processes begin with one empty cache and all come to the same bits."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-m", "padfree_bench.gpu_steps", "storm-one"]
        count = STORM if device.type == "cuda" else 2
        started = [
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for _ in range(count)
        ]
        answers = [process.communicate() for process in started]
    failed = [
        error[-300:] for process, (_, error) in zip(started, answers, strict=True) if process.returncode
    ]
    assert not failed, f"{len(failed)} of {count} processes failed: {failed[0]}"
    digests = {output.strip().splitlines()[-1] for output, _ in answers}
    assert len(digests) == 1, f"{len(digests)} different results from {count} processes"
    return {"processes": count, "device": device.type, "compiled": device.type == "cuda"}


def storm_one(device: torch.device) -> dict[str, Any]:
    results = call(device, 100 if device.type == "cuda" else 20, 32, 2, 2)()
    return {"sums": [float(x.double().sum()) for x in results if x is not None and x.isfinite().all()]}


def memory(device: torch.device) -> dict[str, Any]:
    """Steps of changing length leave neither GPU memory nor host memory behind."""
    on_gpu = device.type == "cuda"
    count, lengths = (1000, (400, 397, 256, 130)) if on_gpu else (8, (20, 17))
    runs = [call(device, seq, 32, 2, 2) for seq in lengths]

    def usage() -> tuple[int, int]:
        return (torch.cuda.memory_allocated() if on_gpu else 0), resource.getrusage(
            resource.RUSAGE_SELF
        ).ru_maxrss

    for run in runs:
        run()
    before = usage()
    for step in range(count):
        runs[step % len(runs)]()
    after = usage()
    growth = {"gpu_bytes": after[0] - before[0], "host_kib": after[1] - before[1]}
    assert growth["gpu_bytes"] == 0 and growth["host_kib"] < 32 * 1024, f"grew by {growth} over {count} steps"
    return {"steps": count, "device": device.type, **growth}


def giant(device: torch.device) -> dict[str, Any]:
    """Identities on tensors of more than 2**31 elements: a constant value comes back; dv sums to d_out."""
    batch, heads, seq, head_dim = 129, 4, 65536, 64
    query = torch.randn(batch, seq, heads, head_dim, device=device, dtype=torch.bfloat16).transpose(1, 2)
    assert query.numel() > 2**31
    level = (torch.arange(batch, device=device) % 7 + 1).to(torch.bfloat16)
    value = (
        level[:, None, None, None]
        .expand(batch, seq, heads, head_dim)
        .contiguous()
        .transpose(1, 2)
        .requires_grad_()
    )
    out = attention(query, query, value, window=(32, 32), impl="triton")
    assert isinstance(out, torch.Tensor)
    for b in (0, batch // 2, batch - 1):
        assert torch.all((out[b] - level[b]).abs() <= level[b] * 2**-7), f"sequence {b} is not its constant"
    out.backward(torch.ones_like(out))
    assert value.grad is not None
    for b in (0, batch - 1):
        total = value.grad[b].double().sum(1)
        assert torch.all((total / seq - 1).abs() < 1e-2), f"dv of sequence {b} does not sum to d_out"
    return {"elements": query.numel(), "seq": seq, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def imported(path: Path) -> set[str]:
    """Top-level modules that a file imports, and the names it takes from them."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom | ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
            names |= {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) else set()
    return names


def kernel_tests() -> list[Path]:
    """Test files about compiled kernels: they import padfree, but not the model, the bench or the interpreter's checker."""
    files = {path: imported(path) for path in sorted((ROOT / "tests").glob("test_*.py"))}
    others = {"imdb_classifier", "padfree_bench", "sanitize"}
    return [path for path, names in files.items() if "padfree" in names and not names & others]


def suite(device: torch.device) -> dict[str, Any]:
    """The kernels' tests, each file in a process of its own; on a CPU they are only collected.

    Prints what is known after every file, so that a step that runs out of time says what had passed.
    """
    files, outcomes, failed = kernel_tests(), dict[str, str](), list[str]()
    if find_spec("hypothesis") is None:
        outcomes = {p.name: "left out: no hypothesis here" for p in files if "hypothesis" in imported(p)}
    only = () if device.type == "cuda" else ("--collect-only",)

    def run(path: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--maxfail=20",
            "-p",
            "no:cacheprovider",
            *only,
            str(path),
        ]
        return path, subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(workers(device.type == "cuda")) as executor:
        started = [executor.submit(run, path) for path in files if path.name not in outcomes]
        for future in as_completed(started):
            path, done = future.result()
            outcomes[path.name] = next(
                (line for line in reversed(done.stdout.splitlines()) if line.strip()), ""
            )
            if done.returncode:
                failed.append(path.name)
                print(done.stdout[-20000:], done.stderr[-5000:])
            print(json.dumps({"files": outcomes, "failed": failed}))
    assert not failed, f"tests failed in {', '.join(failed)}"
    return {"files": outcomes, "failed": failed}


STEPS = {
    "repeats": repeats, "graph": graph, "storm": storm, "storm-one": storm_one, "memory": memory, "giant": giant,
    "suite": suite,
}  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("step", choices=[*STEPS, "export", "replay"])
    options.add_argument("path", nargs="?", type=Path)
    options.add_argument("--few", action="store_true", help="two head_dims in one process, for slow tools")
    chosen, device = options.parse_args(), pick_device()
    torch.set_num_threads(min(4, os.cpu_count() or 1))
    if chosen.step == "export":
        found = agreement.export(chosen.path)
    elif chosen.step == "replay":
        found = agreement.replay(chosen.path, device, chosen.few)
    else:
        found = STEPS[chosen.step](device)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
