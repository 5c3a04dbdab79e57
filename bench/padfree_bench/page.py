"""One static HTML page from all result files, devices side by side; no script, no outside resource."""

from html import escape
from pathlib import Path

from padfree_bench.results import (
    COLUMNS,
    FAULT,
    NOT_RUN,
    UPPER_BOUND,
    Result,
    Row,
    cell,
    fault_line,
    used_columns,
)

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 160rem; padding: 0 1rem; color: #1b1f24; }
table { border-collapse: collapse; font-size: 13px; margin: .4rem 0 1rem; }
th, td { border-bottom: 1px solid #d8dee4; padding: .2rem .55rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, .remark { text-align: left; }
td.remark { white-space: normal; min-width: 12rem; max-width: 26rem; color: #57606a; }
p { overflow-wrap: anywhere; } ul { font-size: 13px; margin: 0 0 1rem; color: #57606a; }
tr.ours { background: #fff4e8; } tr.upper { font-style: italic; }
tr.fault { background: #b00020; color: #fff; }
.devices { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.devices > section { flex: 1 1 60rem; min-width: 0; overflow-x: auto; }
.pictures { display: flex; flex-wrap: wrap; gap: .5rem; } .pictures svg { height: auto; max-width: 100%; }
details { margin: .3rem 0; } summary { cursor: pointer; font-weight: 600; } code { background: #f3f4f6; padding: 0 .2rem; }
"""


INTRODUCTION = """
<p>Every implementation was checked against fp64 before it was timed. Times are medians of interleaved repetitions
with their 20th and 80th percentile, on a GPU with a cold L2 cache; rates count real tokens only. A row without a
figure says why. A FAULT is faster than the machine can be and counts for nothing.</p>
"""


def render(results: list[tuple[str, Result]], pictures: dict[str, list[Path]]) -> str:
    """The page. results: (folder, result); pictures: the SVG files by "folder/suite"."""
    suites = list(dict.fromkeys(result.suite for _, result in results))
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'><title>padfree benchmarks</title>",
        f"<style>{STYLE}</style></head><body><h1>padfree benchmarks</h1>",
        INTRODUCTION,
    ]
    if not any(result.environment.get("device_type") == "cuda" for _, result in results):
        parts.append("<p><strong>No GPU was measured yet.</strong></p>")
    for suite in suites:
        parts.append(f"<h2>{escape(suite)}</h2><div class='devices'>")
        for folder, result in results:
            if result.suite == suite:
                parts.append(_section(folder, result, pictures.get(f"{folder}/{suite}", [])))
        parts.append("</div>")
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _section(folder: str, result: Result, pictures: list[Path]) -> str:
    environment = result.environment
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    lines = [
        f"<section><h3>{escape(result.device)}{' (quick)' if result.quick else ''}</h3>",
        f"<p><code>{escape(str(environment.get('command')))}</code><br>",
        f"commit {escape(str(environment.get('commit')))}, {escape(str(environment.get('started')))}<br>",
        f"{escape(versions)}</p>",
    ]
    if result.not_reached:
        lines.append(f"<p>Not reached within the time given: {escape(', '.join(result.not_reached))}.</p>")
    if result.faults:
        lines.append(f"<p><strong>{escape(fault_line(result))}</strong></p>")
    if pictures:
        lines.append("<div class='pictures'>")
        lines += [_inline(path) for path in pictures]
        lines.append("</div>")
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in result.rows:
        groups.setdefault((row.case, row.direction), []).append(row)
    for index, ((case, direction), rows) in enumerate(groups.items()):
        opened = " open" if index < 2 else ""
        lines.append(
            f"<details{opened}><summary>{escape(case)}, {escape(direction)}</summary>{_table(rows)}</details>"
        )
    return "\n".join([*lines, "</section>"])


def _inline(path: Path) -> str:
    """The SVG element itself; ids are made unique, since several pictures share one document."""
    text = path.read_text()
    text = text[text.index("<svg") :]
    prefix = path.stem.replace(".", "-")
    return (
        text.replace('id="', f'id="{prefix}-')
        .replace("url(#", f"url(#{prefix}-")
        .replace('href="#', f'href="#{prefix}-')
    )


def _table(rows: list[Row]) -> str:
    """What was timed as a table, then each reason for a missing figure once, with those it is about."""
    timed = [row for row in rows if row.status != NOT_RUN]
    columns = used_columns(timed)
    head = "".join(f"<th class={name}>{escape(COLUMNS[name])}</th>" for name in columns)
    body = "".join(_line(row, columns) for row in timed)
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.status == NOT_RUN:
            reasons.setdefault(row.reason, []).append(row.peer)
    refused = "".join(
        f"<li>not run: {escape(', '.join(peers))}: {escape(why)}</li>" for why, peers in reasons.items()
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><ul>{refused}</ul>"


def _line(row: Row, columns: list[str]) -> str:
    kind = {UPPER_BOUND: "upper", FAULT: "fault"}.get(row.status, "")
    if row.peer.startswith(("padfree", "ours")) and not kind:
        kind = "ours"
    cells = "".join(
        f"<td{' class=remark' if name == 'remark' else ''}>{escape(cell(row, name))}</td>" for name in columns
    )
    return f"<tr class='{kind}'>{cells}</tr>"
