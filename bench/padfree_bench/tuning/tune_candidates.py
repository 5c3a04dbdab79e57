"""What `python -m bench tune` asks, and the candidates that a CPU chose for it beforehand.

A question is one pass over one case of the benchmark. `screen` compiles every tile, warp count and pipeline depth worth
a try for sm_90, each in a process of its own, and keeps the few that the cost model ranks first.
"""

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product, zip_longest
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.cache import triton_key

from padfree._triton import configs
from padfree._triton.call import OPEN, Call
from padfree._triton.configs import Config, Row
from padfree._triton.forward import launch_forward
from padfree._triton.key_gradient import launch_key_gradient
from padfree._triton.query_gradient import launch_query_gradient
from padfree_bench.compiled.aot import SHARED_LIMIT, Compiled, compile_only
from padfree_bench.compiled.aot_calls import KERNELS
from padfree_bench.compiled.cost_model import costs_of, occupancy, predict
from padfree_bench.measuring.cases import DTYPES, Case, parse_case
from padfree_bench.measuring.files import write_whole
from padfree_bench.measuring.inputs import Inputs
from padfree_bench.measuring.processes import children_die_too, die_with_parent

ARCH = 90
PASSES = ("forward", "query_gradient", "key_gradient")
CANDIDATES = Path(__file__).parents[1] / "data" / "tune_candidates.json"
# A question's candidates, the current row among them, and how much slower than the best prediction they may be.
MOST, SLOWEST = 12, 1.3
# CPU seconds that one candidate may compile for; by the clock four times as many.
COMPILE_SECONDS = 20
# (rows that a program owns, rows of a step that it walks in): wgmma wants 64 rows.
TILES = ((64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128), (32, 64))
# The model does not see the latency that a pipeline hides: depths in the order in which they are worth a try. On an H200 a
# third stage was worth 10 to 16 % of a launch (NOTES.md, 2026-11-27).
WARPS, STAGES = (4, 8), (3, 4, 2, 1)

Found = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """Which configuration is the fastest for one pass over one case?"""

    passname: str
    case: Case

    def __str__(self) -> str:
        return f"{self.passname} {self.case.id}"

    @property
    def key(self) -> configs.Key:
        """Where the table holds the pass's rows."""
        return self.passname, "half", configs.padded_head_dim(self.case.head_dim)

    @property
    def row(self) -> Row:
        """The row that the table has for it today."""
        return configs.row_for(self.passname, torch.bfloat16, self.case.head_dim, self.case.seq, ARCH)

    def item(self, config: Config) -> "Item":
        return self.passname, self.case.id, config

    def configs(self) -> list[Config]:
        """The current row's first, then whatever the screening compiles beside it."""
        order = -1 if self.passname == "key_gradient" else 1
        options = (Config(*tile[::order], *rest) for tile, *rest in product(TILES, WARPS, STAGES))
        return list(dict.fromkeys([self.row.config, *options]))


# A pass, a case's name and a configuration: what a process can be sent, through JSON too.
Item = tuple[str, str, Config]


class Work:
    """One case on one device, ready for each pass to be launched alone, as the peer padfree-skip launches it."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, case = inputs, inputs.case
        # Every query sees every real key.
        self.call = Call(
            inputs.query, inputs.key, inputs.value, inputs.padding,
            attn_mask=None, seed=None, cu_seqlens_q=None, cu_seqlens_k=None, key_lengths=None, spans=None,
            max_q=case.seq, max_k=case.seq, scale=case.head_dim**-0.5, dropout_p=0.0, left=OPEN, right=OPEN,
            skip_padded_queries=True,
        )  # fmt: skip
        self.out, self.lse2, found = launch_forward(self.call)
        self.backward_call = replace(self.call, spans=found)
        self.delta = self.launch("query_gradient")["delta"]

    def launch(self, passname: str, config: Config | None = None) -> dict[str, Tensor]:
        """What one launch of the pass writes, into new memory as in a backward; without a config by the table's row."""
        call, d_out = self.backward_call, self.inputs.d_out
        if passname == "forward":
            out, lse2, _ = launch_forward(self.call, config)
            return {"out": out, "lse2": lse2}
        if passname == "query_gradient":
            dq, delta = call.empty_like(call.query), torch.empty_like(self.lse2)
            launch_query_gradient(call, self.out, self.lse2, d_out, None, delta, None, None, dq, config)
            return {"d_query": dq, "delta": delta}
        dk, dv = call.empty_like(call.key), call.empty_like(call.value)
        launch_key_gradient(call, self.lse2, d_out, self.delta, None, dk, dv, config)
        return {"d_key": dk, "d_value": dv}


def blank_inputs(case: Case, device: torch.device) -> Inputs:
    """What `make_inputs` returns without its numbers: shapes, strides, dtypes, and which rows are padding."""
    lengths = torch.as_tensor(case.sequence_lengths(), device=device)
    padding = torch.arange(case.seq, device=device) >= lengths[:, None]
    shape = (case.batch, case.seq, case.heads, case.head_dim)
    blank = lambda: padding.new_empty(shape, dtype=DTYPES[case.dtype]).transpose(1, 2)
    return Inputs(case, blank(), blank(), blank(), blank(), padding, lengths)


def compile_candidate(passname: str, case: Case, config: Config) -> Compiled:
    """Compile exactly what a GPU run of `tune` launches, into Triton's cache on disk; no GPU is touched."""
    with compile_only(ARCH, ()):
        work = Work(blank_inputs(case, torch.device("meta")))
    with compile_only(ARCH, KERNELS[passname]) as compiled:
        work.launch(passname, config)
    return compiled[0]


def compile_item(item: Sequence[Any]) -> Found:
    """The same for a process, of an `Item` or what JSON makes of it: only the cache keeps the kernel."""
    passname, case, config = item
    compile_candidate(passname, parse_case(case), Config(*config))
    return {}


def examine(item: Item) -> Found:
    """Compile a candidate and read it: registers, shared bytes, predicted µs, and why no GPU should time it."""
    passname, case = item[0], parse_case(item[1])
    compiled = compile_candidate(passname, case, item[2])
    usage, shared, costs = compiled.resources, compiled.shared_bytes, costs_of(compiled)
    faults = {
        f"{usage['stack']} bytes on the stack": usage["stack"],
        f"{usage['spills']} bytes spilled": usage["spills"],
        f"{shared} bytes of shared memory": shared > SHARED_LIMIT[ARCH],
        f"wgmma serialized ({compiled.serialized})": compiled.serialized,
        "the cost model finds no score loop": costs is None,
    }
    ctas = occupancy(ARCH, usage["registers"], compiled.num_warps, shared)
    found: Found = {"registers": usage["registers"], "shared": shared, "ctas": ctas}
    if costs is not None:
        sizes = (case.sequence_lengths(), case.heads, case.head_dim, case.seq, DTYPES[case.dtype].itemsize)
        found["predicted_us"] = round(predict(compiled.name, costs, ARCH, *sizes).compute, 2)
    if refused := ", ".join(name for name, fault in faults.items() if fault):
        found["refused"] = refused
    return found


class Child:
    """One call in a forked process: what a compiler prints is swallowed, a crash or a stall is a reason in one line."""

    def __init__(self, function: Callable[[Item], Found], item: Item, seconds: int) -> None:
        self.item, self.limit, self.until = item, f"{seconds} s", time.monotonic() + 4 * seconds
        self.answer, end = get_context("fork").Pipe(duplex=False)
        self.process = get_context("fork").Process(target=self._run, args=(end, function, seconds))
        self.process.start()
        end.close()

    def _run(self, end: Any, function: Callable[[Item], Found], seconds: int) -> None:
        die_with_parent()
        children_die_too()
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            end.send(function(self.item))
        except Exception as error:  # noqa: BLE001 - a compiler fails in many ways; each is a reason
            end.send({"refused": first_line(error)})

    def outcome(self) -> Found | None:
        """None while it runs."""
        if late := self.process.is_alive():
            if time.monotonic() < self.until:
                return None
            self.process.kill()
        self.process.join()
        try:
            return self.answer.recv()
        except EOFError:
            stalled = late or self.process.exitcode == -signal.SIGXCPU
            return {"refused": f"not compiled within {self.limit}" if stalled else "the compiler crashed"}


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def in_children(
    function: Callable[[Item], Found], items: list[Item], jobs: int, seconds: int = COMPILE_SECONDS,
    until: float = float("inf"),
) -> Iterator[tuple[Item, Found]]:  # fmt: skip
    """function(item) of every item, `jobs` at a time, in a process each; as they end, and none that ends after `until`."""
    # What a first compilation costs beside compiling is paid once here, and children inherit it.
    triton_key()
    torch.empty_like(torch.empty(0, device="meta"))
    waiting, running = items[::-1], list[Child]()
    try:
        while (waiting or running) and time.monotonic() < until:
            while waiting and len(running) < jobs:
                running.append(Child(function, waiting.pop(), seconds))
            for child in list(running):
                if (found := child.outcome()) is not None:
                    running.remove(child)
                    yield child.item, found
            time.sleep(0.01)
    finally:
        for child in running:
            child.process.kill()


def shortlist(current: Config, found: list[Found]) -> list[Found]:
    """The current row and MOST - 1 others: the first depth of every tile and warp count by prediction, then the second."""
    (now,) = (row for row in found if row["config"] == current)
    now["reason"] = "; ".join(["current row", *filter(None, [now.pop("refused", None)])])
    groups: dict[Config, list[Found]] = {}
    others = [row for row in found if row is not now and "refused" not in row]
    for row in sorted(others, key=lambda row: STAGES.index(row["config"].num_stages)):
        groups.setdefault(row["config"]._replace(num_stages=0), []).append(row)
    fastest = lambda rows: min(row["predicted_us"] for row in rows)
    ranked = sorted(groups.values(), key=fastest)
    near = [rows for rows in ranked if fastest(rows) <= SLOWEST * fastest(ranked[0])]
    for rank, rows in enumerate(near, 1):
        for turn, row in enumerate(rows, 1):
            row["reason"] = f"tile and warps ranked {rank} of {len(ranked)}, depth tried as number {turn}"
    return [now, *filter(None, chain.from_iterable(zip_longest(*near)))][:MOST]


def screen(asked: list[Question], path: Path, jobs: int) -> None:
    """Choose the candidates of these questions anew and write them to the file, after each question."""
    rows: list[Found] = []
    for question in asked:
        found: list[Found] = []
        items = [question.item(config) for config in question.configs()]
        for (*_, config), outcome in in_children(examine, items, jobs):
            found.append({"pass": question.passname, "case": question.case.id, "config": config, **outcome})
            if reason := outcome.get("refused"):
                print(f"{question} {tuple(config)}: {reason}", file=sys.stderr, flush=True)
        rows += (kept := shortlist(question.row.config, found))
        write_lines(path, {"triton": triton.__version__, "arch": ARCH, "rows": rows})
        print(f"{question}: {len(kept)} of {len(found)} kept", flush=True)


def read_candidates(path: Path) -> list[Found]:
    """The rows that `screen` wrote; ValueError in one line where the file holds none."""
    try:
        rows = json.loads(path.read_text())["rows"]
        return [row | {"config": Config(*row["config"])} for row in rows]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"cannot read candidates from {path}: {error}") from None


def write_lines(path: Path, content: dict[str, Any]) -> None:
    """JSON with one entry of a list a line."""
    parts = []
    for name, value in content.items():
        lines = ",\n  ".join(map(json.dumps, value)) if isinstance(value, list) else ""
        parts.append(f' "{name}": ' + (f"[\n  {lines}\n ]" if lines else json.dumps(value)))
    write_whole(path, "{\n" + ",\n".join(parts) + "\n}\n")
