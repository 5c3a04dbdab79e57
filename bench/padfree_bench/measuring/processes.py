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
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
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


def output(*command: str) -> str | None:
    """What a command prints, run in this folder; None where there is no such command or it fails."""
    options: dict[str, Any] = {"capture_output": True, "text": True, "cwd": Path(__file__).parent}
    try:
        done = subprocess.run(command, timeout=20, check=False, **options)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def stop_on_sigterm() -> None:
    """Leave by an exception when told to stop, so that `run_limited` takes its command along."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def positive_minutes(text: str) -> float:
    """A time budget on a command line; nan and less than nothing are refused."""
    if not (minutes := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"minutes must be more than 0, got {text}")
    return minutes


def _start_worker() -> None:
    import torch

    die_with_parent()
    torch.set_num_threads(1)


def in_pool(
    function: Callable[[Any], Any], items: Iterable[Any], jobs: int
) -> Iterator[tuple[Any, Future[Any]]]:
    """(item, its finished future) as they end, in `jobs` processes; one that crashes costs its own item alone.

    Fresh interpreters with one thread each, since CUDA does not survive a fork. A process that dies breaks its whole
    pool, so each has a pool of its own.
    """
    new_pool = partial(ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"), _start_worker)
    waiting, free = deque(items), list[ProcessPoolExecutor]()
    out: dict[Future[Any], tuple[Any, ProcessPoolExecutor]] = {}
    with contextlib.ExitStack() as pools:
        while waiting or out:
            while waiting and len(out) < jobs:
                pool = free.pop() if free else pools.enter_context(new_pool())
                # A process that died while it had nothing to do leaves the item to the next one.
                with contextlib.suppress(BrokenProcessPool):
                    out[pool.submit(function, waiting[0])] = waiting[0], pool
                    waiting.popleft()
            for future in wait(out, return_when=FIRST_COMPLETED).done:
                item, pool = out.pop(future)
                if not isinstance(future.exception(), BrokenProcessPool):
                    free.append(pool)
                yield item, future
