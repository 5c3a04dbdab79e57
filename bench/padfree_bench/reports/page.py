"""One static HTML page from all result files, the conclusion first; no script, no outside resource."""

import re
from html import escape
from pathlib import Path

from padfree_bench.measuring.cases import SUITES
from padfree_bench.measuring.results import (
    COLUMNS,
    FAULT,
    NOT_RUN,
    UPPER_BOUND,
    Result,
    Row,
    cell,
    grouped,
    used_columns,
)
from padfree_bench.reports.conclusion import conclusion
from padfree_bench.reports.legend import legend
from padfree_bench.reports.standing import PACKED, is_ours, suite_of

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 1rem auto; max-width: 90rem; padding: 0 1rem;
  color: #1b1f24; background: #fff; overflow-wrap: anywhere; }
h1 { margin-bottom: .3rem; } h2 { margin-top: 2.2rem; border-bottom: 2px solid #d8dee4; } h3 { margin: 1.2rem 0 .3rem; }
h4 { margin: .8rem 0 0; } p, ul { margin: .3rem 0; } ul { padding-left: 1.3rem; } li { margin: .3rem 0; }
.scroll { overflow-x: auto; border: 1px solid #d8dee4; margin: .4rem 0 1rem; width: fit-content; max-width: 100%; }
.scroll:focus-visible, summary:focus-visible { outline: 3px solid #0b5cad; }
table { border-collapse: collapse; font-size: 14px; overflow-wrap: normal; }
th, td { border-bottom: 1px solid #d8dee4; padding: .25rem .55rem; text-align: right; white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; }
th:first-child, td.remark, th.remark { text-align: left; }
th:first-child { position: sticky; left: 0; background: #fff; }
td.remark { white-space: normal; min-width: 13rem; max-width: 26rem; color: #4a525a; }
@media (max-width: 40rem) { tbody th { white-space: normal; min-width: 6rem; max-width: 12rem; overflow-wrap: break-word; } }
tr.ours > * { background: #fff4e8; } tr.upper { font-style: italic; }
tr.fault > *, tr.fault td.remark { background: #b00020; color: #fff; }
.warning, .lost { color: #a3001b; } .meta { font-size: 14px; color: #4a525a; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1rem; align-items: start; }
.pictures svg { display: block; width: 100%; height: auto; max-width: 30rem; }
details { margin: .3rem 0; } summary { cursor: pointer; font-weight: 600; padding: .15rem 0; }
code { background: #f3f4f6; padding: 0 .2rem; } .not-run, details > p { font-size: 14px; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: .5rem 1.5rem; font-size: 14px; }
dt { font-weight: 600; } dd { margin: 0; }
"""


INTRODUCTION = """
<p>Attention over padded batches, each implementation beside the others in one run. Every one was checked against fp64
before it was timed; times are medians of interleaved repetitions, on a GPU with a cold L2 cache.</p>
"""
RULE = f"""
<p class='meta'>A case is won among those that take the same padded input: {", ".join(PACKED)} take it packed beforehand and stay
out. Level means that the intervals from p20 to p80 overlap.</p>
"""


def render(results: list[tuple[str, Result]], pictures: dict[str, list[Path]]) -> str:
    """The page. results: (folder, result); pictures: the SVG files by "folder/suite"."""
    devices: dict[str, list[Result]] = {}
    for folder, result in results:
        devices.setdefault(folder, []).append(result)
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'><title>padfree benchmarks</title>",
        f"<style>{STYLE}</style></head><body><main><h1>padfree benchmarks</h1>",
        INTRODUCTION,
        "<section id='conclusion'><h2>In short</h2>",
    ]
    if not any(result.environment.get("device_type") == "cuda" for _, result in results):
        parts.append("<p><strong>No GPU was measured yet.</strong></p>")
    parts += [conclusion(folder, these) for folder, these in devices.items()]
    parts += [RULE, "</section>", legend()]
    for suite in dict.fromkeys(result.suite for _, result in results):
        of_suite = [(folder, result) for folder, result in results if result.suite == suite]
        parts.append(f"<h2>{escape(suite)}</h2><p>{escape(SUITES.get(suite_of(of_suite[0][1]), ''))}</p>")
        for folder, result in of_suite:
            parts.append(_section(folder, result, pictures.get(f"{folder}/{suite}", [])))
    return "\n".join([*parts, "</main></body></html>"]) + "\n"


def _section(folder: str, result: Result, pictures: list[Path]) -> str:
    lines = [
        f"<section><h3>{escape(result.device)}{' (quick)' if result.quick else ''}</h3>",
        f"<p class='meta'>{_origin(result)}</p>",
    ]
    if pictures:
        lines.append("<div class='pictures'>")
        lines += [_inline(path, folder) for path in pictures]
        lines.append("</div>")
    for index, (name, rows) in enumerate(_tables(result).items()):
        opened, name = " open" if index < 2 else "", escape(name)
        lines.append(f"<details{opened}><summary>{name}</summary>{_table(rows, name, folder)}</details>")
    return "\n".join([*lines, "</section>"])


def _tables(result: Result) -> dict[str, list[Row]]:
    """By name, what was timed together: a case of two groups was measured in each of them."""
    tables: dict[str, list[Row]] = {}
    for (case, direction), rows in grouped(result.rows).items():
        several = len({row.group for row in rows}) > 1
        for row in rows:
            group = f" (group {row.group})" if several else ""
            tables.setdefault(f"{case}, {direction}{group}", []).append(row)
    return tables


def _origin(result: Result) -> str:
    """How the figures came about: command, commit, when, load, versions."""
    environment = result.environment
    changed = " with changes that were not committed" if environment.get("commit_is_clean") is False else ""
    load = environment.get("load_before", "not noted")
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    lines = [
        f"<code>{escape(str(environment.get('command')))}</code>",
        escape(f"commit {str(environment.get('commit'))[:10]}{changed}, {environment.get('started')}"),
        escape(f"load before the run: {load}; {versions}"),
    ]
    return "<br>".join(lines)


def _inline(path: Path, folder: str) -> str:
    """The SVG element itself, named for those who do not see it; ids are made unique, since many share one document."""
    text = path.read_text()
    text = text[text.index("<svg") :]
    prefix = f"{folder}-{path.stem}".replace(".", "-")
    title = re.search(r"<title>(.*?)</title>", text, re.DOTALL)
    label = escape(title[1] if title else path.stem, quote=True).replace("&amp;", "&")
    return (
        text.replace('id="', f'id="{prefix}-')
        .replace("url(#", f"url(#{prefix}-")
        .replace('href="#', f'href="#{prefix}-')
        .replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    )


def _table(rows: list[Row], name: str, folder: str) -> str:
    """What was timed, in a box of its own that scrolls; who has no figure stands in the device's list."""
    timed = [row for row in rows if row.status != NOT_RUN]
    if not timed:
        return f"<p>Nothing ran: <a href='#{escape(folder)}'>why</a>.</p>"
    columns = used_columns(timed)
    head = "".join(f"<th scope='col' class='{column}'>{escape(COLUMNS[column])}</th>" for column in columns)
    body = "".join(_line(row, columns) for row in timed)
    return (
        f"<div class='scroll' role='region' aria-label='{name}' tabindex='0'>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _line(row: Row, columns: list[str]) -> str:
    kind = {UPPER_BOUND: "upper", FAULT: "fault"}.get(row.status, "")
    if is_ours(row.peer) and not kind:
        kind = "ours"
    cells = "".join(
        f"<th scope='row'>{escape(row.peer)}</th>"
        if name == "peer"
        else f"<td{' class=remark' if name == 'remark' else ''}>{escape(cell(row, name))}</td>"
        for name in columns
    )
    return f"<tr class='{kind}'>{cells}</tr>"
