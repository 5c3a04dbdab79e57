"""README's headline table: written from the result files, never by hand."""

from pathlib import Path

from padfree_bench.measuring.results import Result, Row
from padfree_bench.reports.standing import (
    HEADLINE,
    STEP_SUITES,
    Standing,
    standings,
    suite_of,
    without_later_ones,
)

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
SKIPS = ("padfree-skip", "padfree-qkv")
HEAD = "| device, case | baseline | best other | ours | faster than baseline | than best other |\n|---|---|---|---|---|---|"

GPU_CAPTION = (
    "On a GPU an attention call is timed with a cold L2 cache, and again as a CUDA graph, which leaves out what the host "
    "needs to issue it; models and steps are wall-clock time. Ratios are of graph to graph where both rows have one, else "
    "of call to call; a peer that compiles for every shape is held against ours as timed beside it. "
)


def table(results: list[tuple[str, Result]]) -> str:
    """The Markdown between the markers: headline cases of every device that was fully measured."""
    full = [(folder, result) for folder, result in results if not result.quick]
    lines = []
    if not any(result.environment.get("device_type") == "cuda" for _, result in full):
        lines += [
            "On a GPU: not measured yet. The kernel's own rows will stand here once one was at hand.",
            "",
        ]
    full = [(folder, without_later_ones(folder, result, full)) for folder, result in full]
    rows = [line for _, result in full for line in _lines(result)]
    if rows:
        lines += [HEAD, *rows, "", _sources(full)]
    return "\n".join(lines).rstrip()


def _lines(result: Result) -> list[str]:
    return [
        _line(result, found)
        for found in standings(result)
        if found.ours and (suite_of(result) in STEP_SUITES or (found.case, found.direction) in HEADLINE)
    ]


def _line(result: Result, found: Standing) -> str:
    """One case: the usual choice, the fastest that is not ours and takes the same padded input, and ours."""
    assert found.ours is not None
    cells = [f"{result.device}: {suite_of(result)} {found.case}, {found.direction}"]
    cells += [_figure(row) for row in (found.baseline, found.best)]
    cells += [_figure(found.ours, bold=True)]
    cells += [f"{found.times_of(row, found.ours):.2f}x" for row in (found.baseline, found.best)]
    return f"| {' | '.join(cells)} |"


def _figure(row: Row, bold: bool = False) -> str:
    """`sdpa 0.21 ms, graph 0.19`; in bold with what lies between p20 and p80."""
    call = f"{row.peer} {row.ms_p50:.4g} ms"
    graph = f"{row.graph_ms:.4g}" if row.graph_ms else ""
    if bold:
        call = f"**{call}** [{row.ms_p20:.4g}, {row.ms_p80:.4g}]"
        spread = f" [{row.graph_p20:.4g}, {row.graph_p80:.4g}]" if row.graph_p20 else ""
        graph = f"**{graph}**{spread}" if graph else ""
    return f"{call}, graph {graph}" if graph else call


def _sources(results: list[tuple[str, Result]]) -> str:
    used = [(folder, result) for folder, result in results if _lines(result)]
    sources = (
        f"`{result.environment['command']}` (torch {result.environment['versions']['torch']}, "
        f"commit {str(result.environment.get('commit'))[:10]}"
        f"{' with changes' if result.environment.get('commit_is_clean') is False else ''}, `bench/results/{folder}/{result.suite}.json`)"
        for folder, result in used
    )
    skips = any(f"**{name} " in line for _, result in used for line in _lines(result) for name in SKIPS)
    return (
        "Medians [p20, p80] of one run each; bold is ours, also where it loses. "
        + (GPU_CAPTION if any(result.environment.get("device_type") == "cuda" for _, result in used) else "")
        + (
            f"{' and '.join(SKIPS)} leave rows at padding uncomputed, all others compute them. "
            if skips
            else ""
        )
        + f"Made by {'; '.join(sources)}."
    )


def rewrite(readme: str, content: str) -> str:
    """README's text with the part between the markers replaced; ValueError where the markers are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README must hold the lines {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def agrees(readme: Path, results: list[tuple[str, Result]]) -> bool:
    """Whether README says what the files say."""
    text = readme.read_text()
    return rewrite(text, table(results)) == text
