"""The first thing the page says of a device: what was measured, who won, and what was not run and why."""

from html import escape

from padfree_bench.measuring.machine import busy
from padfree_bench.measuring.results import NOT_RUN, Result, Row, by_reason, counted, fault_line
from padfree_bench.reports.plots import shape_of
from padfree_bench.reports.standing import (
    STEP_SUITES,
    Standing,
    headlines,
    standings,
    started,
    suite_of,
    without_later_ones,
)


def conclusion(folder: str, results: list[Result]) -> str:
    """One device's part of the conclusion, from all its results."""
    first = results[0]
    kind = "GPU" if first.environment.get("device_type") == "cuda" else "CPU"
    quick = ", quick run" if first.quick else ""
    everything = [(folder, result) for result in results]
    last = [without_later_ones(folder, result, everything) for result in results]
    parts = [
        f"<section id='{escape(folder)}'><h3>{escape(first.device + quick)}</h3>",
        _busy(results),
        *(_faults(result) for result in results if result.faults),
        f"<p>{_measured(results)}</p>",
        _padfree(kind, results, last),
    ]
    lines = [f"<li>{_case(found)} {_winner(found)}</li>" for found in headlines(last)]
    if lines:
        parts.append(f"<h4>Who won</h4><ul>{''.join(lines)}</ul>")
    return "\n".join([*parts, _left_out(results), "</section>"])


def _busy(results: list[Result]) -> str:
    """One warning for all runs that were not alone on their machine."""
    loads = [f"{r.suite} ({load})" for r in results if (load := busy(r.environment))]
    said = f"Busy: other work ran on this machine before {', '.join(loads)}: these figures say little"
    return f"<p class='warning'><strong>{escape(said)}</strong></p>" if loads else ""


def _faults(result: Result) -> str:
    told, names = fault_line(result).split(": ", 2)[1:]
    return (
        f"<details><summary class='warning'>FAULT: {escape(told)} ({escape(result.suite)})</summary>"
        f"<p>{escape(names)}</p></details>"
    )


def _measured(results: list[Result]) -> str:
    """Which suites, how much of each, when, and on a CPU on which: two machines may share a folder."""
    parts = []
    for result in results:
        count = len({row.case for row in result.rows if _has_figure(row)})
        facts = [counted(count, "case"), started(result)[:10]]
        if result.environment.get("device_type") != "cuda":
            facts.append(str(result.environment.get("cpu", "")))
        parts.append(f"{escape(result.suite)} ({escape(', '.join(filter(None, facts)))})")
    return f"Measured: {'; '.join(parts)}."


def _padfree(kind: str, results: list[Result], last: list[Result]) -> str:
    """Whether padfree's kernel ran, and over all cases how it did against the best of the others."""
    rows = [row for result in results for row in result.rows if "padfree" in row.peer]
    if not any(_has_figure(row) for row in rows):
        reasons = "; ".join(dict.fromkeys(row.reason for row in rows if row.reason)) or "it took no part"
        return f"<p><strong>padfree: not run on a {kind}.</strong> {escape(reasons)}.</p>"
    ours = [
        found for result in last for found in standings(result) if found.ours and "padfree" in found.ours.peer
    ]
    outcomes = [found.outcome for found in ours]
    if not outcomes:
        return ""
    launched = sum(found.outcome == "won" and found.faster_call is not None for found in ours)
    counts = ", ".join(
        f"{outcomes.count(outcome)} {words}"
        for outcome, words in (("won", "won"), ("level", "level within the spread"), ("lost", "lost"))
    )
    host = (
        f" Of those won as a graph {launched} are lost where each call is launched by itself."
        if launched
        else ""
    )
    return f"<p><strong>padfree against the best other</strong>, every timed case and direction: {counts}.{host}</p>"


def _has_figure(row: Row) -> bool:
    return row.status != NOT_RUN


def _case(found: Standing) -> str:
    row = found.best
    model = found.case.partition("-B")[0] if suite_of(Result(row.suite, {})) in STEP_SUITES else ""
    shape = ", ".join(part for part in (model, shape_of([row]), row.dtype, found.direction) if part)
    return f"<span class='case'>{escape(shape)}:</span>"


def _winner(found: Standing) -> str:
    """Who was the fastest and by how much; where ours lost, first that it did."""
    first, fastest, rival = found.ours or found.fastest, found.fastest, found.rival

    def name(row: Row) -> str:
        return f"<strong>{escape(row.peer)}</strong>{' (the baseline)' if row is found.baseline else ''}"

    def times(row: Row) -> str:
        return f"{found.times[row.peer] / found.times[first.peer]:.2f}x as long"

    if found.level and rival is not None:
        said = [f"{name(first)} at {_time(first)} and {name(rival)} at {_time(rival)} are level"]
    elif found.outcome == "lost":
        share = found.times[first.peer] / found.times[fastest.peer]
        said = [
            f"<strong class='lost'>{escape(first.peer)} loses</strong>: {_time(first)}, {share:.2f}x as long as"
        ]
        said[0] += f" {name(fastest)}, the fastest, at {_time(fastest)}"
    else:
        said = [f"{name(fastest)} is the fastest at {_time(fastest)}"]
        if rival is not None:
            said.append(f"the next best, {name(rival)}, takes {times(rival)}")
    if found.baseline not in (first, fastest, rival):
        said.append(f"{name(found.baseline)} takes {times(found.baseline)}")
    if found.ours and found.outcome != "lost" and (other := found.faster_call):
        said.append(
            f"launched by itself, host included, it <strong class='lost'>loses</strong>: {found.ours.ms_p50:.4g} ms, "
            f"{escape(other.peer)} {other.ms_p50:.4g}"
        )
    return "; ".join(said) + "."


def _time(row: Row) -> str:
    """The time that decided: of the graph where the row has one."""
    return f"{row.graph_ms:.4g} ms (as a graph)" if row.graph_ms else f"{row.ms_p50:.4g} ms"


def _left_out(results: list[Result]) -> str:
    """What has no figure on this device: each reason once, with whom and, where not everywhere, which cases."""
    rows = [row for result in results for row in result.rows]
    missing = by_reason([row for row in rows if not _has_figure(row)])
    items = [f"<li>{_whom(these, rows)}: {escape(reason)}</li>" for reason, these in missing.items()]
    peers = {row.peer for these in missing.values() for row in these}
    parts = []
    if items:
        parts.append(
            f"<details><summary>Not run, and why: {counted(len(peers), 'implementation')}</summary>"
            f"<ul class='not-run'>{''.join(items)}</ul></details>"
        )
    parts += [
        f"<details><summary>Not reached within the time given: {counted(len(result.not_reached), 'case')} of "
        f"{escape(result.suite)}</summary><p>{escape(', '.join(result.not_reached))}</p></details>"
        for result in results
        if result.not_reached
    ]
    return "\n".join(parts)


def _whom(missing: list[Row], rows: list[Row]) -> str:
    """The peers of these rows, those together that miss the same cases; who never ran needs no list of cases."""
    ran = {row.peer for row in rows if _has_figure(row)}
    directions = {
        case: {row.direction for row in rows if row.case == case} for case in {r.case for r in missing}
    }
    together: dict[str, list[str]] = {}
    for peer in dict.fromkeys(row.peer for row in missing):
        own = [row for row in missing if row.peer == peer]
        places: dict[str, list[str]] = {}
        for row in own if peer in ran else ():
            places.setdefault(row.case, []).append(row.direction)
        where = ", ".join(
            case if set(ways) == directions[case] else f"{case} {' and '.join(ways)}"
            for case, ways in places.items()
        )
        together.setdefault(where, []).append(peer)
    return "; ".join(
        f"<b>{escape(', '.join(peers))}</b>" + (f" (only in {escape(where)})" if where else "")
        for where, peers in together.items()
    )
