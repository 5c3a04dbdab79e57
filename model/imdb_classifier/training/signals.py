"""SIGTERM and Ctrl-C as a request that the training loop answers between two steps."""

import os
import signal
import sys
from types import FrameType
from typing import Any, Self


class StopRequest:
    """A context manager that notes the first signal in `number` and leaves at once on the second."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:
                # Only the main thread may install handlers; elsewhere nothing is asked of us.
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            os._exit(128 + number)
        self.number = number
        # os.write, because a signal may arrive in the middle of a print.
        os.write(
            sys.__stderr__.fileno() if sys.__stderr__ else 2,
            b"\nstopping after this step; again to stop at once\n",
        )
