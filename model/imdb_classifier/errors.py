"""The ways a command ends other than well. Each carries one line for the reader and an exit status."""


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
