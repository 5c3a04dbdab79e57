"""Who won a case: ours beside the usual choice and the best of the others, of rows that may be compared."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from padfree_bench.measuring.cases import parse_case
from padfree_bench.measuring.results import AGAIN, OK, SECOND_WAVE, Result, Row, grouped

# The first that ran speaks for us, whatever the others of ours took.
OURS = ("padfree-skip", "padfree", "padfree-qkv", "ours-padfree", "ours-sdpa")
BASELINES = ("notebook", "sdpa")
# They take input that somebody packed before the clock started.
PACKED = ("varlen_attn", "flash-attn", "xformers", "nested")
HEADLINE = {
    ("B64-H12-D64-S400-imdb-bf16", "forward"),
    ("B64-H12-D64-S400-imdb-bf16", "both"),
    ("B64-H4-D8-S400-imdb-bf16", "forward"),
    ("B64-H4-D8-S400-imdb-bf16", "both"),
    ("B64-H12-D64-S512-full-bf16", "forward"),
    ("B64-H12-D64-S512-full-bf16", "both"),
}
STEP_SUITES = ("train", "encoder", "hf")


@dataclass(frozen=True)
class Standing:
    """One case and direction. `times`: how many times as long as the first of them each peer took, fastest first.

    `ours` is None where none of OURS ran; `best` is the fastest of the others. PACKED stay out.
    """

    case: str
    direction: str
    rows: dict[str, Row]
    times: dict[str, float]
    ours: Row | None
    baseline: Row
    best: Row

    @property
    def fastest(self) -> Row:
        return self.rows[next(iter(self.times))]

    @property
    def rival(self) -> Row | None:
        """Whom the fastest beat: the best other where ours ran, else the second of the others."""
        if self.ours:
            return self.best
        return next((self.rows[peer] for peer in self.times if self.rows[peer] is not self.best), None)

    @property
    def level(self) -> bool:
        """Whether the intervals of the two that compete overlap, so that none of them won."""
        one, other = self.ours or self.best, self.rival
        return other is not None and one.wave == other.wave and overlap(one, other)

    @property
    def outcome(self) -> str:
        """How ours did against the best of the others: "won", "level" or "lost"; "" where ours did not run."""
        if self.ours is None:
            return ""
        return "level" if self.level else "won" if self.fastest is self.ours else "lost"

    @property
    def faster_call(self) -> Row | None:
        """The baseline or best other that beats ours once the host issues each call, where ours has a graph; else None."""
        if self.ours is None or not self.ours.graph_ms:
            return None
        other = min((self.baseline, self.best), key=lambda row: row.ms_p50 or float("inf"))
        return other if (self.ours.ms_p20 or 0.0) > (other.ms_p80 or float("inf")) else None

    def times_of(self, row: Row, base: Row) -> float:
        """How many times as long as `base` a row took."""
        return self.times[row.peer] / self.times[base.peer]


def is_ours(peer: str) -> bool:
    return peer.startswith(("padfree", "ours"))


def standing(rows: list[Row]) -> Standing | None:
    """The standing of one case's rows; None where nobody but us has a figure that counts."""
    by_name = {row.peer: row for row in rows if row.timed and row.status == OK}
    ours = next((by_name[name] for name in OURS if name in by_name), None)
    others = [
        peer
        for peer in by_name
        if not is_ours(peer) and not peer.endswith((SECOND_WAVE, AGAIN)) and peer not in PACKED
    ]
    if not others:
        return None
    reference = ours or by_name[next((peer for peer in BASELINES if peer in others), others[0])]
    # Only rows of one wave were interleaved: each is held against the reference of its own.
    beside = {2: by_name.get(reference.peer + SECOND_WAVE), reference.wave: reference}
    ratios = {
        peer: ratio(by_name[peer], mine)
        for peer in others
        if (mine := beside.get(by_name[peer].wave)) is not None
    }
    if not ratios:
        return None
    baseline = next((peer for peer in BASELINES if peer in ratios), next(iter(ratios)))
    times = ratios | ({ours.peer: 1.0} if ours else {})
    least = min(times.values())
    return Standing(
        rows[0].case,
        rows[0].direction,
        by_name,
        {peer: times[peer] / least for peer in sorted(times, key=lambda peer: times[peer])},
        ours,
        by_name[baseline],
        # By its shortest time and not by ratio: one without a graph is held against our own call, host and all.
        by_name[
            min(
                ratios,
                key=lambda peer: shortest(by_name[peer]) / shortest(beside[by_name[peer].wave] or reference),
            )
        ],
    )


def shortest(row: Row) -> float:
    """Milliseconds as a graph where there is one, else of a call."""
    return row.graph_ms or row.ms_p50 or float("inf")


def ratio(row: Row, ours: Row) -> float:
    """How many times as long as ours: of graph to graph where both have one, else of call to call."""
    if row.graph_ms and ours.graph_ms:
        return row.graph_ms / ours.graph_ms
    return (row.ms_p50 or 0) / (ours.ms_p50 or 1)


def overlap(one: Row, other: Row) -> bool:
    """Whether the intervals from p20 to p80 of what `ratio` compares have a point in common."""
    if one.graph_ms and other.graph_ms:
        spans = [(row.graph_p20 or 0.0, row.graph_p80 or 0.0) for row in (one, other)]
    else:
        spans = [(row.ms_p20 or 0.0, row.ms_p80 or 0.0) for row in (one, other)]
    (low, high), (other_low, other_high) = spans
    return low <= other_high and other_low <= high


def suite_of(result: Result) -> str:
    """The suite without its label."""
    return result.suite.split("-")[0]


def started(result: Result) -> str:
    return str(result.environment.get("started", ""))


def standings(result: Result) -> list[Standing]:
    """Of every case and direction that has one, as it was measured first: a case may be in two groups."""
    first = ([row for row in rows if row.group == rows[0].group] for rows in grouped(result.rows).values())
    return [found for rows in first if (found := standing(rows)) is not None]


def without_later_ones(folder: str, result: Result, everything: list[tuple[str, Result]]) -> Result:
    """The result less the cases that the same device measured again later, as the round's tables do its first figures.

    A later run takes a case over only where it says as much: a few peers alone, or none of ours, replace nothing.
    """
    mine = {(found.case, found.direction): found for found in standings(result)}
    later = {
        (found.case, found.direction)
        for other_folder, other in everything
        if other_folder == folder and suite_of(other) == suite_of(result) and started(other) > started(result)
        for found in standings(other)
        if found.ours or not (before := mine.get((found.case, found.direction))) or not before.ours
    }
    return replace(result, rows=[row for row in result.rows if (row.case, row.direction) not in later])


def headlines(results: Iterable[Result]) -> list[Standing]:
    """What one device's conclusion is about: whole models all, of attention calls the headline's shapes.

    Where a shape was measured with other sizes (a CPU's batches are smaller), the first of its heads, kind of lengths and
    dtype stands for it; where none was measured, the first case does.
    """
    chosen: dict[tuple[str, ...], Standing] = {}
    spare: list[Standing] = []
    for result in results:
        suite = suite_of(result)
        for found in standings(result):
            slot = _slot(suite, found)
            if slot is None:
                spare.append(found)
            elif slot not in chosen or (found.case, found.direction) in HEADLINE:
                chosen[slot] = found
    return list(chosen.values()) or [found for found in spare if found.case == spare[0].case]


def _slot(suite: str, found: Standing) -> tuple[str, ...] | None:
    if suite in STEP_SUITES:
        return suite, found.case, found.direction
    kinds = {(c.heads, c.head_dim, c.lengths) for c in (parse_case(name) for name, _ in HEADLINE)}
    row = found.best
    if found.direction == "backward" or (row.heads, row.head_dim, row.lengths) not in kinds:
        return None
    return suite, f"H{row.heads} D{row.head_dim} {row.lengths}", row.dtype, found.direction
