"""`python -m bench report`: plots and one HTML page from every result file, and README's table."""

import argparse
import sys
from pathlib import Path

from padfree_bench.measuring.results import RESULTS, Result, load


def collect(folder: Path) -> list[tuple[str, Result]]:
    """(device folder, result) of every file under bench/results, GPUs first, then by name."""
    found = [(path.parent.name, load(path)) for path in sorted(folder.glob("*/*.json")) if is_result(path)]
    return sorted(
        found, key=lambda item: (item[1].environment.get("device_type") != "cuda", item[1].quick, item[0])
    )


def is_result(path: Path) -> bool:
    """Other tools leave their JSON beside the results; ours say which suite they are."""
    return '"suite"' in path.read_text()[:200]


def build_page(folder: Path) -> Path:
    """Draw every picture and write folder/index.html; ValueError where there is nothing to show."""
    from padfree_bench.reports.page import render
    from padfree_bench.reports.plots import draw_all

    results = collect(folder)
    if not results:
        raise ValueError(f"no result files under {folder}; run a suite first")
    pictures = {
        f"{name}/{result.suite}": draw_all(result, folder / name / "plots") for name, result in results
    }
    page = folder / "index.html"
    page.write_text(render(results, pictures))
    return page


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with one folder per device")
    parser.add_argument("--readme", type=Path, help="rewrite the table between the markers of this file")
    options = parser.parse_args(argv)
    try:
        if options.readme:
            from padfree_bench.reports.readme import rewrite, table

            text = rewrite(options.readme.read_text(), table(collect(options.results)))
            options.readme.write_text(text)
            print(f"rewrote the table in {options.readme}")
        else:
            print(f"wrote {build_page(options.results)}")
    except (OSError, ValueError) as error:
        print(f"python -m bench report: {error}", file=sys.stderr)
        return 2
    return 0
