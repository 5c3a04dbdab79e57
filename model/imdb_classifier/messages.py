"""What a run says on standard error: warnings, notes, and the errors that end a command with one line and a status."""

import sys


class UserError(Exception):
    """Input or surroundings the user can put right; the command prints the line and exits with status 2."""

    exit_status = 2


class NonFiniteError(Exception):
    """A loss, gradient or parameter became NaN or infinite; training stopped before the optimizer step."""

    exit_status = 3


class Stopped(Exception):
    """A signal asked the run to stop; its state has been saved and it can be resumed."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_status = 128 + signal_number


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def note(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)
