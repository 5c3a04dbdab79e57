"""`python -m faults`: run the audit, print each verdict, and exit 1 where fewer than 95 % are killed."""

import argparse
import sys
from pathlib import Path

from faults import FAULTS
from faults.audit import DATA, audit, check_baseline, write

REQUIRED = 0.95


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="faults whose name or file contains TEXT")
    parser.add_argument("--names", nargs="+", default=[], metavar="NAME", help="these faults and no others")
    parser.add_argument("--workers", type=int, default=2, help="suites run at a time")
    parser.add_argument("--output", type=Path, default=DATA, help="where the verdicts go, as JSON")
    parser.add_argument(
        "--no-baseline", action="store_true", help="trust that the suite passes without a fault"
    )
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if options.only in fault.name or options.only in fault.file]
    faults = [fault for fault in faults if not options.names or fault.name in options.names]
    missing = [fault for fault in faults if fault.found() != fault.count]
    for fault in missing:
        print(
            f"stale: {fault.name}: its fragment stands {fault.found()} times in {fault.file}, not {fault.count}"
        )
    if missing:
        return 2
    if not options.no_baseline:
        check_baseline()
    verdicts = []
    for verdict in audit(faults, options.workers):
        verdicts.append(verdict)
        write([verdict], options.output)
        fate = f"killed by {verdict.by}" if verdict.killed else "SURVIVED"
        print(
            f"{len(verdicts):4}/{len(faults)} {verdict.seconds:6.1f} s  {verdict.file}: {verdict.name}: {fate}",
            flush=True,
        )
    killed = sum(verdict.killed for verdict in verdicts)
    print(f"{killed} of {len(verdicts)} faults killed")
    return 0 if verdicts and killed >= REQUIRED * len(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
