"""A function of many items, each in a forked process of its own that may crash, stall or print what it likes."""

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from typing import Any

import torch
from triton.runtime.cache import triton_key

from padfree_bench.measuring.processes import children_die_too, die_with_parent

Found = dict[str, Any]
# CPU seconds that one candidate may compile for; by the clock four times as many.
COMPILE_SECONDS = 20


class Child:
    """One call in a forked process: what a compiler prints is swallowed, a crash or a stall is a reason in one line."""

    def __init__(self, function: Callable[[Any], Found], item: Any, seconds: int) -> None:
        self.item, self.limit, self.until = item, f"{seconds} s", time.monotonic() + 4 * seconds
        self.answer, end = get_context("fork").Pipe(duplex=False)
        self.process = get_context("fork").Process(target=self._run, args=(end, function, seconds))
        self.process.start()
        end.close()

    def _run(self, end: Any, function: Callable[[Any], Found], seconds: int) -> None:
        die_with_parent()
        children_die_too()
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            end.send(function(self.item))
        except Exception as error:  # noqa: BLE001 - a compiler fails in many ways; each is a reason
            end.send({"refused": first_line(error)})

    def outcome(self) -> Found | None:
        """None while it runs."""
        if late := self.process.is_alive():
            if time.monotonic() < self.until:
                return None
            self.process.kill()
        self.process.join()
        try:
            return self.answer.recv()
        except EOFError:
            stalled = late or self.process.exitcode == -signal.SIGXCPU
            return {"refused": f"not compiled within {self.limit}" if stalled else "the compiler crashed"}


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def in_children(
    function: Callable[[Any], Found], items: list[Any], jobs: int, seconds: int = COMPILE_SECONDS,
    until: float = float("inf"),
) -> Iterator[tuple[Any, Found]]:  # fmt: skip
    """function(item) of every item, `jobs` at a time, in a process each; as they end, and none that ends after `until`."""
    # What a first compilation costs beside compiling is paid once here, and children inherit it.
    triton_key()
    torch.empty_like(torch.empty(0, device="meta"))
    waiting, running = items[::-1], list[Child]()
    try:
        while (waiting or running) and time.monotonic() < until:
            while waiting and len(running) < jobs:
                running.append(Child(function, waiting.pop(), seconds))
            for child in list(running):
                if (found := child.outcome()) is not None:
                    running.remove(child)
                    yield child.item, found
            time.sleep(0.01)
    finally:
        for child in running:
            child.process.kill()
