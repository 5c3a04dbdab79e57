"""README's headline table: written from the result files, never by hand."""

from padfree_bench.measuring.results import Result, Row
from padfree_bench.reports import standing
from padfree_bench.reports.standing import Standing, on_gpu, suite_of

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
SKIPS = ("padfree-skip", "padfree-qkv")
HEAD = "| device, case | baseline | best other | ours | faster than baseline | than best other |\n|---|---|---|---|---|---|"
NO_GPU = "On a GPU: not measured yet. The kernel's own rows will stand here once one was at hand."
CAPTION = "Medians [p20, p80] of one run each; bold is ours, also where it loses. "
GPU_CAPTION = (
    "On a GPU an attention call is timed with a cold L2 cache, and again as a CUDA graph, which leaves out what the host "
    "needs to issue it; models and steps are wall-clock time. Ratios are of graph to graph where both rows have one, else "
    "of call to call; a peer that compiles for every shape is held against ours as timed beside it. "
)
SKIPS_CAPTION = f"{' and '.join(SKIPS)} leave rows at padding uncomputed, all others compute them. "


def table(results: list[tuple[str, Result]]) -> str:
    """The Markdown between the markers: headline cases of every device that was fully measured."""
    full = [(folder, result) for folder, result in results if not result.quick]
    parts = [] if any(on_gpu(result) for _, result in full) else [NO_GPU, ""]
    found = [(folder, result, _lines(result)) for folder, result in standing.without_later_ones(full)]
    shown = [item for item in found if item[2]]
    if shown:
        lines = [line for *_, lines in shown for line in lines]
        caption = CAPTION + (GPU_CAPTION if any(on_gpu(result) for _, result, _ in shown) else "")
        caption += SKIPS_CAPTION if any(f"**{name} " in line for line in lines for name in SKIPS) else ""
        sources = "; ".join(_source(folder, result) for folder, result, _ in shown)
        parts += [HEAD, *lines, "", f"{caption}Made by {sources}."]
    return "\n".join(parts).rstrip()


def _lines(result: Result) -> list[str]:
    whole_models = suite_of(result.suite) in standing.STEP_SUITES
    return [
        _line(result, found, found.ours)
        for found in standing.standings(result)
        if found.ours and (whole_models or found.key in standing.HEADLINE)
    ]


def _line(result: Result, found: Standing, ours: Row) -> str:
    """One case: the usual choice, the fastest that is not ours and takes the same padded input, and ours."""
    others = (found.baseline, found.best)
    cells = [f"{result.device}: {suite_of(result.suite)} {', '.join(found.key)}"]
    cells += [*map(_figure, others), _figure(ours, bold=True)]
    cells += [f"{found.times_of(row, ours):.2f}x" for row in others]
    return f"| {' | '.join(cells)} |"


def _figure(row: Row, bold: bool = False) -> str:
    """`sdpa 0.21 ms, graph 0.19`; in bold with what lies between p20 and p80."""
    # Epochs are read in seconds.
    scale, unit = (1e3, "s") if (row.ms_p50 or 0.0) >= 1e4 else (1.0, "ms")
    figures = [f"{(value or 0.0) / scale:.4g}" for value in (row.ms_p20, row.ms_p50, row.ms_p80)]
    call = f"{row.peer} {figures[1]} {unit}"
    graph = f"{row.graph_ms:.4g}" if row.graph_ms else ""
    if bold:
        call = f"**{call}** [{figures[0]}, {figures[2]}]"
        spread = f" [{row.graph_p20:.4g}, {row.graph_p80:.4g}]" if row.graph_p20 else ""
        graph = f"**{graph}**{spread}" if graph else ""
    return f"{call}, graph {graph}" if graph else call


def _source(folder: str, result: Result) -> str:
    """Which command, version and commit made a file, and where it is."""
    environment = result.environment
    changed = " with changes" if environment.get("commit_is_clean") is False else ""
    commit = f"commit {str(environment.get('commit'))[:10]}{changed}"
    made = f"torch {environment['versions']['torch']}, {commit}, `bench/results/{folder}/{result.suite}.json`"
    return f"`{environment['command']}` ({made})"


def rewrite(readme: str, content: str) -> str:
    """README's text with the part between the markers replaced; ValueError where the markers are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README must hold the lines {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"
