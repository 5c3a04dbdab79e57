"""Who won a case: ours beside the usual choice and the best of the others, of rows that may be compared."""

from dataclasses import dataclass, replace

from padfree_bench.measuring import headline
from padfree_bench.measuring.cases import parse_case
from padfree_bench.measuring.results import AGAIN, OK, SECOND_WAVE, Result, Row, grouped

# The first that ran speaks for us, whatever the others of ours took.
OURS = ("padfree-skip", "padfree", "padfree-qkv", "ours-padfree", "ours-sdpa")
BASELINES = ("notebook", "sdpa")
# They take input that somebody packed before the clock started.
PACKED = ("varlen_attn", "flash-attn", "xformers", "nested")
HEADLINE_CASES = (*headline.HEADLINE, "B64-H12-D64-S512-full-bf16")
HEADLINE = {(case, direction) for case in HEADLINE_CASES for direction in ("forward", "both")}
# What stands for a headline's case where other sizes were measured: the same heads and kind of lengths.
KINDS = {(case.heads, case.head_dim, case.lengths) for case in map(parse_case, HEADLINE_CASES)}
STEP_SUITES = ("train", "encoder", "epoch", "hf")
CALL, GRAPH = ("ms_p20", "ms_p50", "ms_p80"), ("graph_p20", "graph_ms", "graph_p80")


@dataclass(frozen=True)
class Standing:
    """One case and direction: the rows that compete, fastest first, and by peer how long each took beside the others.

    `ours` is None where none of OURS ran; `best` is the fastest of the others. PACKED stay out.
    """

    ranking: list[Row]
    times: dict[str, float]
    ours: Row | None
    baseline: Row
    best: Row

    @property
    def key(self) -> tuple[str, str]:
        return self.best.case, self.best.direction

    @property
    def fastest(self) -> Row:
        return self.ranking[0]

    @property
    def rival(self) -> Row | None:
        """Whom the fastest beat: the best other where ours ran, else the second of the others."""
        if self.ours:
            return self.best
        return next((row for row in self.ranking if row is not self.best), None)

    @property
    def outcome(self) -> str:
        """How ours, or without ours the best of the others, did against its rival: "won", "level" or "lost".

        Level means that their intervals from p20 to p80 have a point in common.
        """
        one, other = self.ours or self.best, self.rival
        if other is not None and one.wave == other.wave:
            (low, _, high), (other_low, _, other_high) = spans(one, other)
            if low <= other_high and other_low <= high:
                return "level"
        return "won" if self.ours is None or self.ours is self.fastest else "lost"

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
        row
        for peer, row in by_name.items()
        if not is_ours(peer) and not peer.endswith((SECOND_WAVE, AGAIN)) and peer not in PACKED
    ]
    if not others:
        return None
    reference = ours or usual(others)
    # Only rows of one wave were interleaved: each is compared with the reference as timed in its own.
    in_wave = {2: by_name.get(reference.peer + SECOND_WAVE), reference.wave: reference}
    beside = {row.peer: mine for row in others if (mine := in_wave.get(row.wave)) is not None}
    others = [row for row in others if row.peer in beside]
    if not others:
        return None
    times = {row.peer: ratio(row, beside[row.peer]) for row in others} | ({ours.peer: 1.0} if ours else {})
    # By its shortest time and not by ratio: one without a graph is compared with our own call, host and all.
    best = min(others, key=lambda row: shortest(row) / shortest(beside[row.peer]))
    ranking = sorted([*others, *([ours] if ours else [])], key=lambda row: times[row.peer])
    return Standing(ranking, times, ours, usual(others), best)


def usual(rows: list[Row]) -> Row:
    """The first of BASELINES among these rows, else the first row."""
    return next((row for name in BASELINES for row in rows if row.peer == name), rows[0])


def shortest(row: Row) -> float:
    """Milliseconds as a graph where there is one, else of a call."""
    return row.graph_ms or row.ms_p50 or float("inf")


def spans(one: Row, other: Row) -> list[tuple[float, float, float]]:
    """(p20, median, p80) of both rows: as graphs where both have one, else of calls."""
    columns = GRAPH if one.graph_ms and other.graph_ms else CALL
    low, middle, high = ([getattr(row, column) or 0.0 for row in (one, other)] for column in columns)
    return list(zip(low, middle, high, strict=True))


def ratio(row: Row, ours: Row) -> float:
    """How many times as long as ours."""
    (_, time, _), (_, our_time, _) = spans(row, ours)
    return time / our_time


def suite_of(name: str) -> str:
    """The suite without its label."""
    return name.partition("-")[0]


def started(result: Result) -> str:
    return str(result.environment.get("started", ""))


def on_gpu(result: Result) -> bool:
    return result.environment.get("device_type") == "cuda"


def standings(result: Result) -> list[Standing]:
    """Of every case and direction that has one, as it was measured first: a case may be in two groups."""
    first = ([row for row in rows if row.group == rows[0].group] for rows in grouped(result.rows).values())
    return [found for rows in first if (found := standing(rows)) is not None]


def without_later_ones(results: list[tuple[str, Result]]) -> list[tuple[str, Result]]:
    """Each result less the cases that the same device measured again later, as the round's tables do its first figures.

    A later run takes a case over only where it says as much: a few peers alone, or none of ours, replace nothing.
    """
    told = [(*item, {found.key: found.ours for found in standings(item[1])}) for item in results]
    kept = []
    for folder, result, ours in told:
        later = {
            key
            for other_folder, other, others in told
            if other_folder == folder and suite_of(other.suite) == suite_of(result.suite)
            if started(other) > started(result)
            for key, row in others.items()
            if row or not ours.get(key)
        }
        rows = [row for row in result.rows if (row.case, row.direction) not in later]
        kept.append((folder, replace(result, rows=rows)))
    return kept


def headlines(results: list[Result]) -> list[Standing]:
    """What one device's conclusion is about: whole models all, of attention calls the headline's shapes.

    Where a shape was measured with other sizes (a CPU's batches are smaller), the first of its heads, kind of lengths and
    dtype stands for it; where none was measured, the first case does.
    """
    chosen: dict[tuple[object, ...], Standing] = {}
    spare: list[Standing] = []
    every = [(suite_of(result.suite), found) for result in results for found in standings(result)]
    for suite, found in every:
        row, kind = found.best, (found.best.heads, found.best.head_dim, found.best.lengths)
        whole_model = suite in STEP_SUITES
        if not whole_model and (row.direction == "backward" or kind not in KINDS):
            spare.append(found)
            continue
        slot = (suite, *found.key) if whole_model else (suite, *kind, row.dtype, row.direction)
        if slot not in chosen or found.key in HEADLINE:
            chosen[slot] = found
    return list(chosen.values()) or [found for found in spare if found.key[0] == spare[0].key[0]]
