"""One seeded fault: a fragment of the library's source and what it is replaced by."""

import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"


@dataclass(frozen=True)
class Fault:
    """`fragment` stands `count` times in `file` (beneath padfree/); the fault replaces all of them.

    An empty fragment is no fault: the copy is planted unchanged. `reason` says why a survivor cannot be noticed.
    """

    name: str
    kind: str
    file: str
    fragment: str
    replacement: str
    count: int = 1
    reason: str = ""

    def found(self, kernels: Path = KERNELS) -> int:
        """How often the fragment stands in the source."""
        return (kernels / "padfree" / self.file).read_text().count(self.fragment)

    def plant(self, folder: Path) -> Path:
        """A copy of the kernels beneath `folder` with this fault in it.

        Raises:
            ValueError: the fragment is not there as often as stated, so that the fault would test nothing
        """
        if self.fragment and self.found() != self.count:
            raise ValueError(
                f"fault {self.name!r}: expected {self.count} x {self.fragment!r} in {self.file}, found {self.found()}"
            )
        kernels = folder / "kernels"
        shutil.copytree(KERNELS, kernels, ignore=shutil.ignore_patterns("__pycache__"))
        if self.fragment:
            path = kernels / "padfree" / self.file
            path.write_text(path.read_text().replace(self.fragment, self.replacement))
        return kernels
