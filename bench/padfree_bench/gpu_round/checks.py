"""The processes of the GPU round that prove the kernels: `python -m padfree_bench.gpu_round.checks NAME`.

Each prints what it knows as a line of JSON again and again, so that a run that is stopped says how far it came.
Without a GPU the reference takes the kernel's place, which proves the plumbing and nothing else.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from padfree import attention, testing
from padfree._dispatch import Impl
from padfree._triton import configs
from padfree_bench.gpu_round import agreement
from padfree_bench.gpu_round.steps import HEADLINE, REHEARSE
from padfree_bench.measuring.cases import parse_case
from padfree_bench.measuring.inputs import make_inputs
from padfree_bench.measuring.machine import pick_device
from padfree_bench.measuring.processes import die_with_parent
from padfree_bench.measuring.timing import capture_graph, own_stream
from padfree_bench.tuning.tune_candidates import Work

REPEATS = 5000
# (heads, head_dim) at B 64, S 400: BERT's and the notebook's
SHAPES = ((12, 64), (4, 8))


def say(**found: Any) -> None:
    print(json.dumps(found), flush=True)


def impl_on(device: torch.device) -> Impl:
    return "triton" if device.type == "cuda" else "reference"


def check_agreement(device: torch.device) -> list[str]:
    """Every case by the error rule; the failures by name."""
    on_gpu = device.type == "cuda"
    cases = agreement.all_cases(configs.architecture(device) if on_gpu else 90)
    # A rehearsal takes some, and not the figures' own shapes, which are too much for a CPU's fp64.
    cases = cases if on_gpu else [case for case in cases if case.batch < 16][::6]
    failed: list[str] = []
    nearest = (0.0, "")
    for done, case in enumerate(cases, start=1):
        try:
            nearest = max(nearest, (agreement.check_case(case, device, impl_on(device)), case.name))
        except (AssertionError, RuntimeError, ValueError) as error:
            failed.append(f"{case.name}: {str(error).splitlines()[0]}")
            print(failed[-1], flush=True)
            if isinstance(error, torch.AcceleratorError):
                break  # every later call of this process would fail
        say(cases=done, of=len(cases), impl=impl_on(device), nearest_to_the_limit=nearest, failed=failed)
    return failed


def touch(device: torch.device) -> list[str]:
    """Each kernel once, for compute-sanitizer."""
    for case in agreement.touching_cases():
        call = agreement.call_of(case, impl_on(device))
        testing.run(call, case.inputs(device, 0), **dict(case.options))
        say(touched=case.name)
    return []


def launch_headline(device: torch.device) -> list[str]:
    """Each pass over each of the headline's cases once, for Nsight Compute."""
    for case in HEADLINE:
        inputs = make_inputs(parse_case(case), device)
        Work(inputs).launch("key_gradient")  # forward and query gradient are launched for what it reads
        say(launched=case)
    return []


def call_at(heads: int, head_dim: int, device: torch.device) -> Callable[[], list[Tensor]]:
    """Forward and backward of B 64, S 400 in bf16 on fixed tensors, as a function that returns all results."""
    batch, seq = (64, 400) if device.type == "cuda" else (2, 40)
    inputs = testing.make_inputs(
        batch, heads, seq, seq, head_dim, dtype=torch.bfloat16, padding="right", device=device
    )
    call = lambda *tensors, **options: attention(*tensors, impl=impl_on(device), **options)
    run = lambda: testing.run(call, inputs, skip_padded_queries=True)
    return lambda: [result for result in run() if result is not None]


def replayed(run: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """The same results from replays of one captured graph, always in the same tensors."""
    static: list[Tensor] = []

    def call() -> None:
        static[:] = run()

    replay = capture_graph(lambda: call)

    def again() -> list[Tensor]:
        replay()
        return static

    return again


def count_changed(changed: Tensor, got: list[Tensor], expected: list[Tensor]) -> None:
    """Add the number of tensors that differ in a bit, without waiting for the device."""
    for ours, theirs in zip(got, expected, strict=True):
        changed += (ours != theirs).any()  # results of padded rows are finite or -inf, never NaN


def busy(device: torch.device) -> Callable[[int], None]:
    """Something for the rest of the GPU to do, on a stream of its own: matrix products and copies by turns."""
    if device.type != "cuda":
        return lambda turn: None
    stream = torch.cuda.Stream()
    square = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    block, copy = torch.randn(2**24, device=device), torch.empty(2**24, device=device)

    def load(turn: int) -> None:
        with torch.cuda.stream(stream):
            square @ square if turn % 3 else copy.copy_(block)

    return load


def check_repeats(device: torch.device) -> list[str]:
    """Bits of forward and backward, launched and replayed, while the GPU has other work; what differed.

    Triton 3.6.0 compiles the forward and dq without the proxy fence that wgmma may need after cp.async: if it ever
    shows, it shows here.
    """
    on_gpu, failed = device.type == "cuda", list[str]()
    count, load = REPEATS if on_gpu else 3, busy(device)
    for heads, head_dim in SHAPES:
        run = call_at(heads, head_dim, device)
        expected = run()
        forms = {"launched": run, **({"replayed": replayed(run)} if on_gpu else {})}
        for form, call in forms.items():
            changed, begin = torch.zeros((), dtype=torch.int64, device=device), time.monotonic()
            for turn in range(count):
                load(turn)
                count_changed(changed, call(), expected)
                if turn % 100 == 99 and on_gpu:
                    torch.cuda.synchronize()  # bounds the queue
            name = f"H{heads} D{head_dim} {form}"
            if differing := int(changed):
                failed.append(f"{name}: {differing} tensors of {count} repeats differ")
            say(
                repeats=name,
                count=count,
                differing=int(changed),
                seconds=time.monotonic() - begin,
                failed=failed,
            )
    return failed


def check_graph(device: torch.device) -> list[str]:
    """A captured forward and backward replayed on new inputs, while another stream fills memory with NaN."""
    make = lambda seed: testing.make_inputs(
        16, 4, 400, 400, 64, dtype=torch.bfloat16, padding="right", seed=seed, device=device
    )
    inputs, failed = make(0), list[str]()
    call = lambda *tensors, **options: attention(*tensors, impl="triton", **options)
    run = lambda: [r for r in testing.run(call, inputs, skip_padded_queries=True) if r is not None]
    replay, other = replayed(run), torch.cuda.Stream()
    for seed in range(1, 31):
        fresh = make(seed)
        for name in ("query", "key", "value", "d_out", "key_padding_mask"):
            getattr(inputs, name).copy_(getattr(fresh, name))
        with torch.cuda.stream(other):
            noise = [torch.full((2**20,), float("nan"), device=device) for _ in range(20)]
        got = replay()
        torch.cuda.synchronize()
        del noise
        if not all(torch.equal(a, b) for a, b in zip(got, run(), strict=True)):
            failed.append(f"replay {seed} differs from a call")
        say(replays=seed, failed=failed)
    return failed


CHECKS = {
    "agreement": check_agreement,
    "repeats": check_repeats,
    "graph": check_graph,
    "touch": touch,
    "headline": launch_headline,
}


def main() -> int:
    die_with_parent()  # which may be compute-sanitizer
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("name", choices=CHECKS)
    options.add_argument(
        REHEARSE, action="store_true", help="without a GPU: the reference in the kernel's place"
    )
    given, device = options.parse_args(), pick_device()
    check = CHECKS[given.name]
    if device.type != "cuda" and not given.rehearse:
        print("this process finds no CUDA GPU")
        return 1
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    with own_stream(device):
        failed = check(device)
    for line in failed:
        print(line)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
