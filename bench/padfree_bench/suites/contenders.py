"""What every contest shares: a row for each contender, what it holds, then all that are right on one clock."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from padfree_bench.measuring import profiling
from padfree_bench.measuring.cases import Case
from padfree_bench.measuring.clocks import Watch
from padfree_bench.measuring.errors import first_line
from padfree_bench.measuring.results import NOT_RUN, Row
from padfree_bench.measuring.timing import Call, Sample, capture_graph, measure
from padfree_bench.peers import Refused
from padfree_bench.suites.session import Session, release


def start_row(suite: str, case: Case, direction: str, contender: Any, valid_fraction: float) -> Row:
    """The row of a contender, which has a `name` and a `note`, before anything is known of it."""
    columns = ("group", "dtype", "batch", "heads", "head_dim", "seq", "lengths")
    shape = {column: getattr(case, column) for column in columns}
    told = {"peer": contender.name, "note": contender.note, "valid_fraction": valid_fraction}
    return Row(suite, case.id, direction=direction, **told, **shape)


def refuse(reason: str) -> Callable[..., Any]:
    """What stands in for a contender's preparation where it shall not take part."""

    def refused(*_: object) -> None:
        raise Refused(reason)

    return refused


@contextmanager
def excused(row: Row) -> Iterator[None]:
    """A contender that refuses or fails in here costs no more than its own figures; the row says why."""
    try:
        yield
    except Refused as refusal:
        row.status, row.reason = NOT_RUN, str(refusal)
    except Exception as error:  # noqa: BLE001 - an implementation may fail in its own way
        row.status, row.reason = NOT_RUN, first_line(error)
        release()


def fill_profile(row: Row, call: Call, device: torch.device, result_bytes: int | None = None) -> None:
    """Peak memory, without the results' bytes too, and on a GPU the launches, host waits and the kernel that ran."""
    if row.direction != "backward":
        peak = profiling.peak_bytes(call, device)
        row.peak_mib = peak / profiling.MIB
        if result_bytes is not None:
            row.extra_mib = max(0, peak - result_bytes) / profiling.MIB
    if device.type == "cuda":
        profiling.fill_launches(row, call)


@dataclass
class Contest:
    """The rows of one case in one direction, and by contender the calls of those that may be timed.

    A call is `steps` steps of `tokens` real tokens, and a row's time that of one step. `graphs` makes a call anew, to be
    captured as a CUDA graph. `wall` is the wall clock on a GPU too.
    """

    session: Session
    tokens: float
    wall: bool = True
    steps: int = 1
    rows: list[Row] = field(default_factory=list)
    calls: dict[str, Call] = field(default_factory=dict)
    graphs: dict[str, Callable[[], Call]] = field(default_factory=dict)

    @contextmanager
    def enter(self, row: Row) -> Iterator[Row]:
        """Prepare a contender in here, and leave its call if it may be timed."""
        self.rows.append(row)
        with excused(row):
            yield row

    def time(self, judge: Callable[[list[Row]], None] = lambda timed: None) -> list[Row]:
        """All rows, after the calls were timed in turn; `judge` sees the timed ones before the clocks are remarked on."""
        device = self.session.device
        if self.graphs and device.type == "cuda":
            # After all profiles: a profiler that starts or ends between a capture and its replay has broken graphs before.
            add_graphs(self.calls, self.rows, self.graphs)
            drop_failing(self.calls, self.rows)
        watch = Watch({"case": self.rows[0].case, "direction": self.rows[0].direction})
        samples = measure(self.calls, device, self.session.effort, wall=self.wall, watch=watch)
        if watch.readings:
            self.session.result.clocks.append(watch.entry)
        timed = [row for row in self.rows if row.peer in samples]
        for row in timed:
            fill_times(row, samples, self.steps)
            fill_rates(row, self.tokens)
        judge(timed)
        for row in timed:
            row.remark(watch.remark)
        return self.rows


def add_graphs(calls: dict[str, Call], rows: list[Row], graphs: dict[str, Callable[[], Call]]) -> None:
    """Each call as a CUDA graph beside it, or in its row why there is none."""
    for row in rows:
        if row.peer in graphs and row.syncs:
            row.graph_reason = "no CUDA graph: the call waits for the GPU"
        elif row.peer in graphs:
            try:
                calls[f"{row.peer} graph"] = capture_graph(graphs[row.peer])
            except Exception as error:  # noqa: BLE001 - the row says how it failed
                row.graph_reason = f"no CUDA graph: {first_line(error)}"


def drop_failing(calls: dict[str, Call], rows: list[Row]) -> None:
    """Each call once more, now that the graphs hold their memory: one that fails costs its own figure alone."""
    for row in rows:
        for name in (row.peer, f"{row.peer} graph"):
            try:
                calls.get(name, lambda: None)()
                torch.cuda.synchronize()
            except Exception as error:  # noqa: BLE001 - the row says how it failed
                del calls[name]
                if name == row.peer:
                    row.status, row.reason = NOT_RUN, first_line(error)
                else:
                    row.graph_reason = f"no CUDA graph: {first_line(error)}"


def fill_times(row: Row, samples: dict[str, Sample], steps: int = 1) -> None:
    """Quantiles of the row's call, and of its graph where it has one."""
    sample = samples[row.peer]
    row.ms_p20, row.ms_p50, row.ms_p80 = sample.p20 / steps, sample.p50 / steps, sample.p80 / steps
    row.repetitions = sample.repetitions
    if sample.host_us is not None:  # else what was measured by itself, where at all
        row.host_us = sample.host_us
    if (graph := samples.get(f"{row.peer} graph")) is not None:
        row.graph_p20, row.graph_ms, row.graph_p80 = graph.p20, graph.p50, graph.p80


def fill_rates(row: Row, tokens: float) -> None:
    """Real tokens and reviews a second, from the measured median."""
    assert row.ms_p50 is not None and row.batch is not None
    row.tokens_per_s, row.reviews_per_s = tokens / row.ms_p50 * 1e3, row.batch / row.ms_p50 * 1e3
