"""Processes that end: a time limit that reaches everything a command started, and a pool for what is slow to compile."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from padfree_bench.machine import usable_cores


def run_limited(command: Sequence[str], seconds: float, **options: Any) -> int | None:
    """The command's exit status, or None where it ran past `seconds`; nothing it started outlives the call."""
    process = subprocess.Popen(command, process_group=0, **options)
    try:
        return process.wait(timeout=max(seconds, 0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def stop_on_sigterm() -> None:
    """Leave by an exception when told to stop, so that `run_limited` takes its command along."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def workers(on_gpu: bool) -> int:
    """Processes side by side: compiling is what takes the time on a GPU machine; elsewhere a machine is shared."""
    return max(1, min(12, usable_cores() - 2)) if on_gpu else 1


@contextlib.contextmanager
def pool(on_gpu: bool) -> Iterator[ProcessPoolExecutor]:
    """Fresh interpreters, since CUDA does not survive a fork."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers(on_gpu), context, initializer=torch.set_num_threads, initargs=(1,)
    ) as executor:
        try:
            yield executor
        finally:
            executor.shutdown(cancel_futures=True)
