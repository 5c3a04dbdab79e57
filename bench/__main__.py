"""`python -m bench ...` from the repository root: put the source roots on the path and hand on to the suite."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for folder in ("kernels", "model", "bench"):
    if str(ROOT / folder) not in sys.path:
        sys.path.insert(0, str(ROOT / folder))

from padfree_bench.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
