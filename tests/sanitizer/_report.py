"""What the sanitizer saw: counts per kernel, and findings with the program and the source line."""

import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

import triton

MAX_FINDINGS = 50
_FOREIGN_CODE = tuple(f"{folder}/" for folder in (Path(triton.__file__).parent, Path(__file__).parent))


class SanitizerError(AssertionError):
    """An interpreted kernel did something a GPU would punish or leave undefined."""


@dataclass
class Finding:
    """One fault of one source line; `times` counts its repetitions by further programs and iterations."""

    kind: str
    kernel: str
    where: str
    program: tuple[int, int, int]
    message: str
    times: int = 1

    def __str__(self) -> str:
        often = f", {self.times} times" if self.times > 1 else ""
        return f"{self.kernel}: {self.kind} at {self.where} (program {self.program}{often}): {self.message}"


@dataclass
class Report:
    """Counts of launches, programs, loads, stores, atomics and dots by kernel name, and the findings."""

    kernels: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    findings: list[Finding] = field(default_factory=list)

    @property
    def total(self) -> Counter[str]:
        """The counts over all kernels."""
        return sum(self.kernels.values(), Counter())

    def __str__(self) -> str:
        return describe(self.findings)


def add_finding(findings: list[Finding], new: Finding) -> None:
    """Append a finding, or count it as a repetition of the same fault of the same line."""
    for known in findings:
        if (known.kind, known.kernel, known.where) == (new.kind, new.kernel, new.where):
            known.times += new.times
            return
    if len(findings) < MAX_FINDINGS:
        findings.append(replace(new))


def describe(findings: list[Finding]) -> str:
    """One line a finding."""
    return "\n".join(str(finding) for finding in findings) or "no findings"


def kernel_line() -> str:
    """The source lines now executing, from the innermost device function out to the kernel."""
    lines: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "run_programs":
        path = frame.f_code.co_filename
        if not path.startswith(_FOREIGN_CODE):
            lines.append(f"{Path(path).name}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines) or "launch"
