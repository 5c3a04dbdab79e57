"""README's headline table: written from the result files, never by hand."""

from dataclasses import replace
from pathlib import Path

from padfree_bench.results import OK, SECOND_WAVE, Result, Row

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
OURS = ("padfree-skip", "padfree", "padfree-qkv", "ours-padfree", "ours-sdpa")
SKIPS = ("padfree-skip", "padfree-qkv")
PACKED = ("varlen_attn", "flash-attn", "xformers", "nested")
HEADLINE = {
    ("attention", "B64-H12-D64-S400-imdb-bf16", "forward"),
    ("attention", "B64-H12-D64-S400-imdb-bf16", "both"),
    ("attention", "B64-H4-D8-S400-imdb-bf16", "forward"),
    ("attention", "B64-H4-D8-S400-imdb-bf16", "both"),
    ("attention", "B64-H12-D64-S512-full-bf16", "forward"),
    ("attention", "B64-H12-D64-S512-full-bf16", "both"),
}
STEP_SUITES = ("train", "encoder", "hf")
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


def without_later_ones(folder: str, result: Result, everything: list[tuple[str, Result]]) -> Result:
    """The result less the cases that the same device measured again later, as the round's tables do its first figures."""
    later = {
        (row.case, row.direction)
        for other_folder, other in everything
        if other_folder == folder and _suite(other) == _suite(result) and started(other) > started(result)
        for row in other.rows
        if row.timed
    }
    return replace(result, rows=[row for row in result.rows if (row.case, row.direction) not in later])


def started(result: Result) -> str:
    return str(result.environment.get("started", ""))


def _suite(result: Result) -> str:
    return result.suite.split("-")[0]


def _lines(result: Result) -> list[str]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in result.rows:
        wanted = _suite(result) in STEP_SUITES or (_suite(result), row.case, row.direction) in HEADLINE
        if wanted and row.timed and row.status == OK:
            groups.setdefault((row.case, row.direction), []).append(row)
    lines = (_line(result, case, direction, rows) for (case, direction), rows in groups.items())
    return [line for line in lines if line]


def _line(result: Result, case: str, direction: str, rows: list[Row]) -> str:
    """One case: the usual choice, the fastest that is not ours and takes the same padded input, and ours."""
    by_name = {row.peer: row for row in rows}
    ours = next((by_name[name] for name in OURS if name in by_name), None)
    if ours is None:
        return ""
    # Only rows of one wave were interleaved: each is held against ours of its own.
    beside = {None: ours, 2: by_name.get(ours.peer + SECOND_WAVE)}
    ratios = {
        row.peer: ratio(row, mine)
        for row in rows
        if not row.peer.startswith(("padfree", "ours"))
        and not row.peer.endswith(SECOND_WAVE)
        and row.peer not in PACKED
        and (mine := beside.get(row.wave)) is not None
    }
    if not ratios:
        return ""
    baseline = next((peer for peer in ("notebook", "sdpa") if peer in ratios), next(iter(ratios)))
    best = min(ratios, key=lambda peer: ratios[peer])
    cells = [f"{result.device}: {_suite(result)} {case}, {direction}"]
    cells += [_figure(by_name[peer]) for peer in (baseline, best)]
    cells += [_figure(ours, bold=True), f"{ratios[baseline]:.2f}x", f"{ratios[best]:.2f}x"]
    return f"| {' | '.join(cells)} |"


def ratio(row: Row, ours: Row) -> float:
    """How many times as long as ours: of graph to graph where both have one, else of call to call."""
    if row.graph_ms and ours.graph_ms:
        return row.graph_ms / ours.graph_ms
    return (row.ms_p50 or 0) / (ours.ms_p50 or 1)


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
        f"commit {str(result.environment.get('commit'))[:10]}, `bench/results/{folder}/{result.suite}.json`)"
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
