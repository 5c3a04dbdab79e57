"""Launches on a GPU that is not there, the direct way beside Triton's own: `python launches.py CHECK`.

A process of its own, in which Triton does not interpret; it fails with the first launch that differs.
"""

import gc
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton import JITFunction, knobs

from padfree._triton import (
    attn_mask_gradient,
    forward,
    key_gradient,
    launch,
    operators,
    query_gradient,
    single_query,
)
from padfree._triton.configs import Config
from standin_driver import Driver, standin_driver

MODULES = attn_mask_gradient, forward, key_gradient, query_gradient, single_query
KERNELS = [kernel for module in MODULES for name, kernel in vars(module).items() if name.endswith("_kernel")]
TENSORS, SEED, CU_Q, SPANS = operators.TENSORS, 5, 6, 9
OPTIONS = {"max_q": 10, "max_k": 11, "scale": 12, "dropout_p": 13, "left": 14, "right": 15, "skip": 16}
CALLS = 60
Arguments = list[Any]


def tensor(
    draw: random.Random, batch: int, seq: int, heads: int, head_dim: int, dtype: torch.dtype
) -> Tensor:
    """[B,H,S,D] in one of three layouts."""
    layout = draw.choice(["heads last", "heads first", "fused"])
    if layout == "heads first":
        return torch.empty(batch, heads, seq, head_dim, dtype=dtype)
    if layout == "heads last":
        return torch.empty(batch, seq, heads, head_dim, dtype=dtype).transpose(1, 2)
    return torch.empty(batch, seq, 3, heads, head_dim, dtype=dtype)[:, :, 1].transpose(1, 2)


def drawn_call(draw: random.Random) -> Arguments:
    """The arguments of the operator `forward`: sizes with a 1, multiples of 16 and neither, all options, packed too."""
    dtype = draw.choice([torch.float32, torch.float16, torch.bfloat16])
    batch, kv_heads, group = draw.choice([1, 2, 16]), draw.choice([1, 3]), draw.choice([1, 1, 2])
    queries, keys = draw.choice([(1, 33), (33, 33), (48, 48), (17, 1), (1, 64)])
    head_dim = draw.choice([1, 8, 16, 24, 61])
    packed = draw.random() < 0.25
    rows = (1, batch * queries, batch * keys) if packed else (batch, queries, keys)
    offsets = torch.zeros(batch + 1, dtype=torch.int32) if packed else None
    attn_mask = None
    if not packed and draw.random() < 0.4:
        shape = [draw.choice([1, size]) for size in (batch, kv_heads * group, queries, keys)]
        attn_mask = torch.empty(shape, dtype=draw.choice([torch.bool, dtype, torch.float32]))
    dropout = draw.random() < 0.3
    told = "nothing" if packed else draw.choice(["mask", "mask", "mask", "lengths", "spans", "nothing"])
    return [
        tensor(draw, rows[0], rows[1], kv_heads * group, head_dim, dtype),
        tensor(draw, rows[0], rows[2], kv_heads, head_dim, dtype),
        tensor(draw, rows[0], rows[2], kv_heads, head_dim, dtype),
        torch.empty(batch, keys, dtype=torch.bool) if told in ("mask", "spans") else None,
        attn_mask,
        torch.empty(1, dtype=torch.int64) if dropout else None,
        offsets, offsets,
        torch.empty(batch, dtype=torch.int32) if told == "lengths" else None,
        torch.empty(batch, 3, dtype=torch.int32) if told == "spans" else None,
        queries, keys,
        draw.choice([0.125, 1.0]), 0.1 if dropout else 0.0,
        draw.choice([-1, 1, 16, 1000]), draw.choice([-1, 0, 7]), draw.random() < 0.5,
    ]  # fmt: skip


def moved(tensor: Tensor) -> Tensor:
    """Of the same layout, one element further on in memory."""
    return torch.empty(
        tensor.untyped_storage().nbytes() // tensor.element_size() + 1, dtype=tensor.dtype
    ).as_strided(tensor.shape, tensor.stride(), 1)


def with_gaps(tensor: Tensor) -> Tensor:
    """Of the same shape, with an odd stride between the first dimension's members."""
    strides = (2 * tensor.numel() + 1, *tensor.stride()[1:])
    return torch.empty(strides[0] * len(tensor) * 3, dtype=tensor.dtype).as_strided(tensor.shape, strides)


def variations(call: Arguments) -> Iterator[Arguments]:
    """The call, and with one thing changed at a time: each tensor moved or spread, and each option."""
    yield call
    for place, value in enumerate(call[:TENSORS]):
        if isinstance(value, Tensor):
            for change in (moved, with_gaps):
                if change is moved or place < 5:
                    yield [*call[:place], change(value), *call[place + 1 :]]
    if isinstance(call[4], Tensor) and call[4].dtype != torch.bool:
        yield [*call[:4], call[4].double().to(torch.bool), *call[5:]]
    if isinstance(call[0], Tensor) and len(call[0]) > 1 and call[4] is None:
        shorter = [x[:-1] if isinstance(x, Tensor) and place != SEED else x for place, x in enumerate(call)]
        if call[CU_Q] is None:
            yield shorter
    changes = {"scale": 0.5, "left": 5, "right": 3, "skip": not call[OPTIONS["skip"]]}
    if call[CU_Q] is not None:
        changes |= {"max_q": call[OPTIONS["max_q"]] + 15, "max_k": call[OPTIONS["max_k"]] + 16}
    if call[SEED] is not None:
        changes["dropout_p"] = 0.25
    for name, value in changes.items():
        place = OPTIONS[name]
        yield [*call[:place], value, *call[place + 1 :]]


def run(call: Arguments, d_out: Callable[[Tensor], Tensor] = torch.empty_like, lse: bool = False) -> None:
    """The call's forward and backward."""
    out, lse2, found = operators._forward(*call)
    wants_mask = isinstance(call[4], Tensor) and call[4].is_floating_point()
    call = [*call[:SPANS], found if len(found) else call[SPANS], *call[SPANS + 1 :]]
    operators._backward(out, lse2, d_out(out), torch.empty_like(lse2) if lse else None, *call, wants_mask)


@contextmanager
def compared(driver: Driver, direct: list[str]) -> Iterator[None]:
    """Every launch is repeated in Triton's own way, which must reach the driver alike; `direct` notes the direct ones."""
    ordinary = []
    its_run = JITFunction.run

    def noted(self: JITFunction, *args: object, **kwargs: object) -> object:
        ordinary.append(self.fn.__name__)
        return its_run(self, *args, **kwargs)

    def both(kernel: JITFunction, describe: Callable[[], launch.Launch], *key: Any) -> None:
        driver.reached.clear()
        ordinary.clear()
        launch.launch(kernel, describe, *key)
        direct.extend([] if ordinary else [kernel.fn.__name__])
        launch.ordinary_launch(kernel, describe())
        ours, tritons = driver.reached
        assert ours == tritons, f"launched\n{ours}\nwhere Triton launches\n{tritons}"

    with ExitStack() as patches:
        patches.enter_context(patch.object(JITFunction, "run", noted))
        for module in MODULES:
            patches.enter_context(patch.object(module, "launch", both))
        yield


def alike() -> None:
    """Generated calls, and each with one thing changed at a time; kept the second time, so the third is direct."""
    direct: list[str] = []
    asked = 0
    with standin_driver(*KERNELS) as driver, compared(driver, direct):
        for seed in range(CALLS):
            for call in variations(drawn_call(random.Random(seed))):
                for _ in range(3):
                    run(call, lse=seed % 3 == 0)
                run(call, d_out=lambda out: moved(out), lse=seed % 3 == 0)
                asked += 1
    assert set(direct) == {kernel.fn.__name__ for kernel in KERNELS}, set(direct)
    assert len(direct) > asked, f"{len(direct)} direct launches in {asked} calls"
    with standin_driver(*KERNELS) as driver, compared(driver, direct):
        call = [
            x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
            for x in drawn_call(random.Random(1))
        ]
        for precision in ("none", "ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            for _ in range(3):
                run(call)
        asked_for = operators.Call(*drawn_call(random.Random(0)))
        for config in (None, Config(32, 32), Config(32, 32, max_registers=64)) * 3:
            forward.launch_forward(asked_for, config)
        noted = len(direct)
        driver.get_current_device = lambda: 1
        forward.launch_forward(asked_for)
        assert len(direct) == noted, "another GPU's kernel was launched"


class Recording:
    """A hook of somebody's own, with a list of that name."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def __call__(self, metadata: object) -> None:
        self.calls.append(metadata)


def hooks() -> None:
    """Where somebody watches Triton's launches, all of them are Triton's own."""
    seen: list[object] = []
    call = drawn_call(random.Random(0))
    with standin_driver(*KERNELS) as driver:
        for _ in range(3):
            run(call)
        launches = len(driver.reached) // 3
        for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
            chain.add(seen.append)
            run(call)
            chain.remove(seen.append)
        assert len(seen) == 2 * launches, f"{len(seen)} of {2 * launches} launches seen"
        recording = Recording()
        with patch.object(knobs.runtime, "launch_enter_hook", recording):
            run(call)
        assert len(recording.calls) == launches, f"{len(recording.calls)} of {launches} launches recorded"
        for kernel in KERNELS:
            kernel.add_pre_run_hook(lambda *args, **kwargs: seen.append(args))
        run(call)
        assert len(seen) == 3 * launches, f"{len(seen)} of {3 * launches} launches seen"


def memory() -> None:
    """What is kept holds no tensor and has an end."""
    with standin_driver(*KERNELS):
        call = drawn_call(random.Random(0))
        held = [weakref.ref(x) for x in call if isinstance(x, Tensor)]
        for _ in range(3):
            run(call)
        assert launch._kept
        del call
        gc.collect()
        assert not [x for x in held if x() is not None]
        with patch.object(launch, "MOST_KEPT", 5):
            for seed in range(20):
                for _ in range(2):
                    run(drawn_call(random.Random(seed)))
                assert len(launch._kept) <= 5 and len(launch._seen) <= 5
        launch.forget()
        assert not launch._kept


def threads() -> None:
    """Several threads launch at once, as autograd's does beside the forward's."""
    wrong: list[str] = []

    def several(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(40):
                run(calls[draw.randrange(len(calls))])
        except Exception as error:  # noqa: BLE001 - a thread's failure is the check's
            wrong.append(repr(error))

    with standin_driver(*KERNELS) as driver, patch.object(launch, "MOST_KEPT", 12):
        calls = [drawn_call(random.Random(seed)) for seed in range(6)]
        for call in calls:
            run(call)
        wanted = {
            (x.kernel, x.grid, *[a for a in x.arguments if isinstance(a, float)]) for x in driver.reached
        }
        running = [threading.Thread(target=several, args=(seed,)) for seed in range(4)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        got = {(x.kernel, x.grid, *[a for a in x.arguments if isinstance(a, float)]) for x in driver.reached}
    assert not wrong, wrong
    assert got == wanted


CHECKS = {check.__name__: check for check in (alike, hooks, memory, threads)}

if __name__ == "__main__":
    CHECKS[sys.argv[1]]()
    print("done")
