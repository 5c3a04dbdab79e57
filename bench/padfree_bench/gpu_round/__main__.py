"""A process of the round: `python -m padfree_bench.gpu_round MODULE [ARGUMENT] [--rehearse]` calls that module's main.

Each prints what it knows as a line of JSON again and again, so that a run that is stopped says how far it came.
"""

import sys
from importlib import import_module

from padfree_bench.measuring.processes import die_with_parent

if __name__ == "__main__":
    die_with_parent()  # which may be compute-sanitizer
    _, module, *arguments = sys.argv
    sys.exit(import_module(f"padfree_bench.gpu_round.{module}").main(*arguments))
