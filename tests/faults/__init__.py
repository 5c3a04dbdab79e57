"""The fault audit: seeded faults of the library, planted one at a time, and the suite that must notice each.

`python -m faults` (with tests/ on the path) runs all of them; see `faults.audit`.
"""

from faults import backward, forward, host, tiles
from faults.fault import Fault

FAULTS: list[Fault] = [*forward.FAULTS, *backward.FAULTS, *tiles.FAULTS, *host.FAULTS]

__all__ = ["FAULTS", "Fault"]
