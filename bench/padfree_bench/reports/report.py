"""`python -m bench report`: plots and one HTML page from every result file, and README's table."""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from padfree_bench.measuring import results as files
from padfree_bench.measuring.cases import SUITES
from padfree_bench.measuring.machine import busy
from padfree_bench.measuring.results import NOT_RUN, RESULTS, Result, Row, counted, grouped, load
from padfree_bench.reports import plots, readme, standing

# report.html.j2 holds the page's words and looks; here are its facts.
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    undefined=StrictUndefined,
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)


def collect(folder: Path) -> list[tuple[str, Result]]:
    """(device folder, result) of every file under bench/results, GPUs first, then by name."""
    # Other tools leave their JSON beside the results; ours say which suite they are.
    paths = [path for path in sorted(folder.glob("*/*.json")) if '"suite"' in path.read_text()[:200]]
    found = [(path.parent.name, load(path)) for path in paths]
    return sorted(found, key=lambda item: (not standing.on_gpu(item[1]), item[1].quick, item[0]))


def build_page(folder: Path) -> Path:
    """Draw every picture and write folder/index.html; ValueError where there is nothing to show."""
    results = collect(folder)
    if not results:
        raise ValueError(f"no result files under {folder}; run a suite first")
    pictures = {
        f"{name}/{result.suite}": plots.draw_all(result, folder / name / "plots") for name, result in results
    }
    page = folder / "index.html"
    page.write_text(render(results, pictures))
    return page


def render(results: list[tuple[str, Result]], pictures: dict[str, list[Path]]) -> str:
    """The page. results: (folder, result); pictures: the SVG files by "folder/suite"."""
    devices: dict[str, list[Result]] = {}
    suites: dict[str, list[tuple[str, Result]]] = {}
    for folder, result in results:
        devices.setdefault(folder, []).append(result)
        suites.setdefault(result.suite, []).append((folder, result))
    return TEMPLATES.get_template("report.html.j2").render(
        devices=[conclusion(folder, these) for folder, these in devices.items()],
        any_gpu=any(standing.on_gpu(result) for _, result in results),
        suites=suites,
        pictures=pictures,
        files=files,
        suite_summaries=SUITES,
        standing=standing,
        shape_of=plots.shape_of,
        tables=tables,
        inline=inline,
    )


def conclusion(folder: str, results: list[Result]) -> dict[str, Any]:
    """What the page says of one device first: what was measured, who won, and what was not run and why."""
    rows = [row for result in results for row in result.rows]
    padfree = [row for row in rows if "padfree" in row.peer]
    why_not = "; ".join(dict.fromkeys(row.reason for row in padfree if row.reason)) or "it took no part"
    last = [result for _, result in standing.without_later_ones([(folder, result) for result in results])]
    every = [found for result in last for found in standing.standings(result)]
    ours = [found for found in every if found.ours and "padfree" in found.ours.peer]
    missing = files.by_reason([row for row in rows if row.status == NOT_RUN])
    return {
        "folder": folder,
        "results": results,
        "busy": [f"{result.suite} ({load})" for result in results if (load := busy(result.environment))],
        "measured": list(map(measured, results)),
        "why_not": "" if any(row.status != NOT_RUN for row in padfree) else why_not,
        "outcomes": Counter(found.outcome for found in ours),
        "launched": sum(found.outcome == "won" and found.faster_call is not None for found in ours),
        "winners": standing.headlines(last),
        "missing": {reason: whom(these, rows) for reason, these in missing.items()},
        "missing_peers": len({row.peer for these in missing.values() for row in these}),
    }


def measured(result: Result) -> str:
    """Which suite, how much of it, when, and on a CPU on which: two machines may share a folder."""
    count = len({row.case for row in result.rows if row.status != NOT_RUN})
    cpu = "" if standing.on_gpu(result) else str(result.environment.get("cpu", ""))
    facts = ", ".join(filter(None, (counted(count, "case"), standing.started(result)[:10], cpu)))
    return f"{result.suite} ({facts})"


def whom(missing: list[Row], rows: list[Row]) -> dict[str, list[str]]:
    """{cases: peers} of these rows, those together that miss the same; who never ran needs no list of cases."""
    ran = {row.peer for row in rows if row.status != NOT_RUN}
    directions: dict[str, set[str]] = {}
    for case, direction in grouped(rows):
        directions.setdefault(case, set()).add(direction)
    places: dict[str, dict[str, list[str]]] = {row.peer: {} for row in missing}
    for row in missing:
        if row.peer in ran:
            places[row.peer].setdefault(row.case, []).append(row.direction)
    together: dict[str, list[str]] = {}
    for peer, cases in places.items():
        named = []
        for case, ways in cases.items():
            everywhere = set(ways) == directions[case]
            named.append(case if everywhere else f"{case} {' and '.join(ways)}")
        together.setdefault(", ".join(named), []).append(peer)
    return together


def tables(result: Result) -> dict[str, list[Row]]:
    """By name, what was timed together: a case of two groups was measured in each of them."""
    tables: dict[str, list[Row]] = {}
    for (case, direction), rows in grouped(result.rows).items():
        several = len({row.group for row in rows}) > 1
        for row in rows:
            group = f" (group {row.group})" if several else ""
            tables.setdefault(f"{case}, {direction}{group}", []).append(row)
    return tables


def inline(path: Path, folder: str) -> Markup:
    """The SVG element itself, named for those who do not see it; ids are made unique, since many share one document."""
    text = path.read_text()
    text = text[text.index("<svg") :]
    prefix = f"{folder}-{path.stem}".replace(".", "-")
    label = text.partition("<title>")[2].partition("</title>")[0].replace('"', "&quot;")
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with one folder per device")
    parser.add_argument("--readme", type=Path, help="rewrite the table between the markers of this file")
    options = parser.parse_args(argv)
    try:
        if options.readme:
            text = readme.rewrite(options.readme.read_text(), readme.table(collect(options.results)))
            options.readme.write_text(text)
            print(f"rewrote the table in {options.readme}")
        else:
            print(f"wrote {build_page(options.results)}")
    except (OSError, ValueError) as error:
        print(f"python -m bench report: {error}", file=sys.stderr)
        return 2
    return 0
