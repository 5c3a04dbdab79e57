"""Processes that end: a time limit that reaches everything a command started, and a pool for what is slow to compile."""

import argparse
import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Be killed when the process that started this one ends in whatever way; on Linux, elsewhere nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def children_die_too() -> None:
    """Let what this process starts from now on by `subprocess` be killed when it ends: an assembler of Triton's, say."""

    subprocess.Popen = partial(subprocess.Popen, preexec_fn=die_with_parent)  # type: ignore[misc, assignment]


def run_limited(command: Sequence[str], seconds: float, **options: Any) -> int | None:
    """The command's exit status, or None where it ran past `seconds`; nothing it started outlives the call."""
    # prctl is all that runs between fork and exec, which threads cannot disturb.
    process = subprocess.Popen(command, process_group=0, preexec_fn=die_with_parent, **options)  # noqa: PLW1509
    try:
        return process.wait(timeout=max(seconds, 0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # A process that hangs in a driver cannot be killed, and must not hold the rest of the round.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


def stop_on_sigterm() -> None:
    """Leave by an exception when told to stop, so that `run_limited` takes its command along."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def positive_minutes(text: str) -> float:
    """A time budget; nan and less than nothing are refused."""
    minutes = float(text)
    if not minutes > 0:
        raise argparse.ArgumentTypeError(f"minutes must be more than 0, got {text}")
    return minutes


def _start_worker() -> None:
    import torch

    die_with_parent()
    torch.set_num_threads(1)


@contextlib.contextmanager
def pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh interpreters with one thread each, since CUDA does not survive a fork."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_start_worker) as executor:
        try:
            yield executor
        finally:
            executor.shutdown(cancel_futures=True)


def in_pool(
    function: Callable[[Any], Any], items: Iterable[Any], jobs: int
) -> Iterator[tuple[Any, Future[Any]]]:
    """(item, its finished future) as they end, in `jobs` processes; one that crashes costs its own item alone.

    A process that dies breaks its whole pool. So no more items are out than processes, and those that were out then
    are asked once more, each in a pool of its own, before the others go on in a new one.
    """
    waiting = deque(items)
    while waiting:
        suspects, out = list[Any](), dict[Future[Any], Any]()
        with pool(jobs) as executor:
            while out or (waiting and not suspects):
                while waiting and len(out) < jobs and not suspects:
                    try:
                        out[executor.submit(function, waiting[0])] = waiting[0]
                    except BrokenProcessPool:
                        suspects.append(waiting[0])
                    waiting.popleft()
                for future in wait(out, return_when=FIRST_COMPLETED).done:
                    item = out.pop(future)
                    if isinstance(future.exception(), BrokenProcessPool):
                        suspects.append(item)
                    else:
                        yield item, future
        with contextlib.ExitStack() as pools:
            alone = {pools.enter_context(pool(1)).submit(function, item): item for item in suspects}
            for future in as_completed(alone):
                yield alone[future], future
