"""What can go wrong with one figure, in one line, and what ends a whole run."""

import torch


class DeviceLost(Exception):
    """After this error the GPU fails every call of this process."""


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)


def first_line(error: BaseException) -> str:
    """One line that says what went wrong, for a row; DeviceLost where no later row could be measured either."""
    if out_of_memory(error):
        return "out of memory"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    line = f"{type(error).__name__}: {text[:200]}"
    if isinstance(error, torch.AcceleratorError):
        # An error such as an illegal access is there to stay; a refused launch or capture is not.
        try:
            torch.cuda.synchronize()
        except torch.AcceleratorError:
            raise DeviceLost(line) from error
    return line
