"""The processes that prove the kernels: agreement, repeats, graph, steps, and what compute-sanitizer and Nsight Compute launch.

Without a GPU the reference takes the kernel's place, which proves the plumbing and nothing else.
"""

import json
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from padfree import attention, testing
from padfree._dispatch import Impl
from padfree._triton import configs
from padfree_bench.gpu_round import agreement
from padfree_bench.gpu_round.steps import REHEARSE
from padfree_bench.measuring.cases import parse_case
from padfree_bench.measuring.headline import HEADLINE
from padfree_bench.measuring.inputs import make_inputs
from padfree_bench.measuring.machine import pick_device
from padfree_bench.measuring.timing import capture_graph, own_stream
from padfree_bench.tuning.work import Work

REPEATS = 5000
Results = Callable[[], list[Tensor]]


def say(**found: Any) -> None:
    print(json.dumps(found), flush=True)


def impl_on(device: torch.device) -> Impl:
    return "triton" if device.type == "cuda" else "reference"


def check_agreement(device: torch.device) -> list[str]:
    """Every case by the error rule; the failures by name."""
    on_gpu, impl = device.type == "cuda", impl_on(device)
    cases = agreement.all_cases(configs.architecture(device) if on_gpu else 90)
    # A rehearsal takes some, and not the figures' own shapes, which are too much for a CPU's fp64.
    cases = cases if on_gpu else [case for case in cases if case.batch < 16][::6]
    failed, nearest = list[str](), (0.0, "")
    for done, case in enumerate(cases, start=1):
        try:
            nearest = max(nearest, (agreement.check_case(case, device, impl), case.name))
        except (AssertionError, RuntimeError, ValueError) as error:
            failed.append(f"{case.name}: {str(error).splitlines()[0]}")
            print(failed[-1], flush=True)
            if isinstance(error, torch.AcceleratorError):
                break  # every later call of this process would fail
        say(cases=done, of=len(cases), impl=impl, nearest_to_the_limit=nearest, failed=failed)
    return failed


def touch(device: torch.device) -> list[str]:
    """Each kernel once, for compute-sanitizer."""
    for case in agreement.touching_cases():
        call = agreement.call_of(case, impl_on(device))
        testing.run(call, case.inputs(device, 0), **case.options)
        say(touched=case.name)
    return []


def launch_headline(device: torch.device) -> list[str]:
    """Each pass over each of the headline's cases once, for Nsight Compute."""
    for case in HEADLINE:
        # Forward and query gradient are launched for what this one reads.
        Work(make_inputs(parse_case(case), device)).launch("key_gradient")
        say(launched=case)
    return []


def results_of(inputs: testing.Inputs, impl: Impl) -> Results:
    """Forward and backward on these tensors, as a function that returns all results."""
    call = lambda *tensors, **options: attention(*tensors, impl=impl, **options)
    run = lambda: testing.run(call, inputs, skip_padded_queries=True)
    return lambda: [result for result in run() if result is not None]


def replayed(run: Results) -> Results:
    """The same results from replays of one captured graph, always in the same tensors."""
    static: list[Tensor] = []

    def call() -> None:
        static[:] = run()

    replay = capture_graph(lambda: call)

    def again() -> list[Tensor]:
        replay()
        return static

    return again


def busy(device: torch.device) -> Iterator[None]:
    """Something for the rest of the GPU to do, on a stream of its own: matrix products and copies by turns."""
    stream = torch.cuda.Stream()
    square = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    block, copy = torch.randn(2**24, device=device), torch.empty(2**24, device=device)
    while True:
        for turn in range(3):
            with torch.cuda.stream(stream):
                square @ square if turn else copy.copy_(block)
            yield


def count_changed(call: Results, expected: list[Tensor], count: int, load: Iterator[None]) -> int:
    """The tensors that differ in a bit in `count` repeats, each beside a piece of the `load`."""
    changed = torch.zeros((), dtype=torch.int64, device=expected[0].device)
    for turn in range(count):
        next(load)
        for ours, theirs in zip(call(), expected, strict=True):
            # Results of padded rows are finite or -inf, never NaN; the device is not waited for.
            changed += (ours != theirs).any()
        if turn % 100 == 99 and changed.is_cuda:
            torch.cuda.synchronize()  # bounds the queue
    return int(changed)


def check_repeats(device: torch.device) -> list[str]:
    """Bits of forward and backward, launched and replayed, while the GPU has other work; what differed.

    Triton 3.6.0 compiles the forward and dq without the proxy fence that wgmma may need after cp.async: if it ever
    shows, it shows here.
    """
    on_gpu, failed = device.type == "cuda", list[str]()
    count, load = (REPEATS, busy(device)) if on_gpu else (3, repeat(None))
    for case in map(parse_case, HEADLINE):
        batch, seq = (case.batch, case.seq) if on_gpu else (2, 40)
        sizes = (batch, case.heads, seq, seq, case.head_dim)
        inputs = testing.make_inputs(*sizes, dtype=torch.bfloat16, padding="right", device=device)
        run = results_of(inputs, impl_on(device))
        expected = run()
        for form, call in {"launched": run, **({"replayed": replayed(run)} if on_gpu else {})}.items():
            begin, name = time.monotonic(), f"H{case.heads} D{case.head_dim} {form}"
            if differing := count_changed(call, expected, count, load):
                failed.append(f"{name}: {differing} tensors of {count} repeats differ")
            seconds = time.monotonic() - begin
            say(repeats=name, count=count, differing=differing, seconds=seconds, failed=failed)
    return failed


def check_graph(device: torch.device) -> list[str]:
    """A captured forward and backward replayed on new inputs, while another stream fills memory with NaN."""
    make = lambda seed: testing.make_inputs(
        16, 4, 400, 400, 64, dtype=torch.bfloat16, padding="right", seed=seed, device=device
    )
    inputs, failed = make(0), list[str]()
    run = results_of(inputs, "triton")
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


def check_steps(device: torch.device) -> list[str]:
    from padfree_bench.gpu_round import step_checks  # imports transformers, which takes seconds

    failed = step_checks.check_steps(device)
    say(steps=step_checks.STEPS, failed=failed)
    return failed


CHECKS = {
    "agreement": check_agreement, "repeats": check_repeats, "graph": check_graph, "steps": check_steps,
    "touch": touch, "headline": launch_headline,
}  # fmt: skip


def main(name: str, *flags: str) -> int:
    device = pick_device()
    if device.type != "cuda" and REHEARSE not in flags:
        print("this process finds no CUDA GPU")
        return 1
    if device.type == "cuda":
        # As torch's default has it: eager's products are IEEE's, and padfree's what it takes by default.
        torch.backends.cuda.matmul.fp32_precision = "none"
    with own_stream(device):
        failed = CHECKS[name](device)
    for line in failed:
        print(line)
    return 1 if failed else 0
