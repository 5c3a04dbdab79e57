"""`python -m bench tune`: which rows of the configuration table should change.

On a GPU several processes compile the candidates; then every one is timed as a CUDA graph beside the current row,
interleaved, and one that wins by more than noise (its 80th percentile below the row's 20th) is accepted. Without a GPU candidates are compiled and ranked by the
cost model: a prediction, never accepted. The result is a JSON of proposals; a person edits the table.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from padfree import _configs, attention, attention_varlen
from padfree._configs import Config
from padfree_bench import machine
from padfree_bench.aot import Arch, arch_number, parse_arch, why_not_compile
from padfree_bench.aot_calls import Target, only_config, roads_of
from padfree_bench.aot_facts import facts_of_target
from padfree_bench.cli import positive_minutes
from padfree_bench.cost_model import predict
from padfree_bench.lengths import make_lengths
from padfree_bench.processes import pool, stop_on_sigterm
from padfree_bench.results import RESULTS
from padfree_bench.timing import Call, Effort, capture_graph, measure, own_stream

# Out of shared memory or registers, or a tile that the compiler does not take.
REFUSALS = (CompilationError, OutOfResources, PTXASError, RuntimeError)
BATCH, MODEL_WIDTH = 64, 768
LENGTHS = (400, 1024, 4096)
# The notebook's and BERT's heads first.
HEAD_DIMS = (64, 16, 32, 128, 256)
LAYOUTS = ("padded", "packed")
DTYPES = {"half": "bfloat16", "float": "float32"}
TILES = {
    "half": ((64, 32), (64, 64), (64, 128), (128, 64), (128, 128), (32, 64), (32, 128)),
    "float": ((16, 16), (32, 16), (16, 32), (32, 32), (64, 32)),
}
BASIS = {"measured": "measured on this GPU", "predicted": "predicted by a static cost model, nothing was run"}


@dataclass(frozen=True)
class Question:
    """One row to question: which pass, kind, head_dim, in which layout and at which length."""

    passname: str
    kind: str
    head_dim: int
    length: int
    layout: str

    @property
    def heads(self) -> int:
        return max(1, MODEL_WIDTH // self.head_dim)

    @property
    def batch(self) -> int:
        return max(1, BATCH * 400 // self.length)

    def current(self, arch: int) -> Config:
        return _configs._choose(self.passname, self.kind, self.head_dim, self.length, arch)


@dataclass
class Proposal:
    question: Question
    current: Config
    basis: str
    candidates: list[dict[str, Any]] = field(default_factory=list)
    best: Config | None = None
    accepted: bool = False

    def to_json(self) -> dict[str, Any]:
        names = ("current", "basis", "best", "accepted", "candidates")
        return {**vars(self.question), **{name: getattr(self, name) for name in names}}


def candidates(question: Question, current: Config) -> Iterator[Config]:
    """The current row first, then every tile, warp count and pipeline depth worth a try."""
    yield current
    if question.passname == "single_query":
        options = (
            (1, n, w, s) for n, w, s in itertools.product((16, 32, 64, 128, 256, 512), (1, 2, 4, 8), (1, 2))
        )
    else:
        stages = (1, 2, 3) if question.kind == "half" else (1,)
        options = ((m, n, w, s) for (m, n), w, s in itertools.product(TILES[question.kind], (4, 8), stages))
    yield from (Config(*option) for option in options if option != current)


def make_run(question: Question, device: torch.device) -> Callable[[], object]:
    """The call that the question's kernel dominates: forward, or backward of a graph that is kept."""
    dtype = getattr(torch, DTYPES[question.kind])
    lengths = make_lengths("scaled", question.batch, question.length)
    rows = 1 if question.passname == "single_query" else question.length
    shape = (question.batch, question.length, question.heads, question.head_dim)
    key, value = (
        torch.randn(shape, device=device, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(2)
    )
    query = torch.randn_like(key[:, :, :rows]).requires_grad_()
    padding = torch.arange(question.length, device=device) >= torch.as_tensor(lengths, device=device)[:, None]
    skip = rows == question.length

    leaves = [query, key, value]
    if question.layout == "packed":
        leaves = [x.transpose(1, 2)[~padding].detach().requires_grad_() for x in leaves]
    cu_seqlens = torch.as_tensor([0, *lengths.cumsum()], dtype=torch.int32, device=device)

    def forward() -> Any:
        q, k, v = leaves
        if question.layout == "padded":
            return attention(q, k, v, padding, skip_padded_queries=skip, impl="triton")
        return attention_varlen(
            q, k, v, cu_seqlens, cu_seqlens, question.length, question.length, impl="triton"
        )

    if "gradient" not in question.passname:
        return forward
    out = forward()
    d_out = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True)


def with_config(question: Question, config: Config, run: Callable[[], object]) -> Call:
    def call() -> object:
        with only_config(question.passname, question.kind, question.head_dim, config):
            return run()

    return call


# One question at a time; its tensors are the same for all candidates.
prepared_run = lru_cache(maxsize=1)(make_run)


def compile_candidate(question: Question, config: Config, device: torch.device) -> str | None:
    """Call once in this process, which leaves the kernels in Triton's cache on disk; why it was refused, or None."""
    try:
        with_config(question, config, prepared_run(question, device))()
        torch.cuda.synchronize()
    except torch.AcceleratorError:
        # An illegal access is a fault to look into, and this process's GPU context is gone.
        raise
    except REFUSALS as error:
        return (str(error).splitlines() or [type(error).__name__])[0][:120]
    return None


def measured(question: Question, device: torch.device, seconds: float, executor: Executor) -> Proposal:
    """Time all candidates that compile, interleaved; accept a winner that is clear of the noise."""
    current = question.current(_configs.architecture(device))
    proposal, calls = Proposal(question, current, BASIS["measured"]), dict[str, Call]()
    configs = list(candidates(question, current))
    refusals = executor.map(compile_candidate, *zip(*((question, c, device) for c in configs), strict=True))
    with own_stream(device):
        run = make_run(question, device)
        for config, refused in zip(configs, list(refusals), strict=True):
            row: dict[str, Any] = (
                {"config": config} if refused is None else {"config": config, "refused": refused}
            )
            proposal.candidates.append(row)
            if refused is None:
                # The host needs longer to issue such a call than a GPU to run it; a replay shows the kernel.
                call = with_config(question, config, run)
                calls[repr(config)] = capture_graph(lambda call=call: call)  # type: ignore[misc]
        samples = measure(calls, device, Effort(seconds=seconds, least=10, most=100))
    for row in proposal.candidates:
        if sample := samples.get(repr(row["config"])):
            row |= {"p20_us": sample.p20 * 1e3, "p50_us": sample.p50 * 1e3, "p80_us": sample.p80 * 1e3}
    return decide(proposal, "p50_us")


def decide(proposal: Proposal, figure: str) -> Proposal:
    """Name the fastest; accept it only when measured and its 80th percentile is below the current row's 20th."""
    usable = [row for row in proposal.candidates if figure in row]
    proposal.candidates.sort(key=lambda row: row.get(figure, float("inf")))
    now = next((row for row in usable if row["config"] == proposal.current), None)
    if usable:
        winner = min(usable, key=lambda row: row[figure])
        proposal.best = winner["config"]
        clear = now is None or winner.get("p80_us", float("inf")) < now.get("p20_us", 0.0)
        proposal.accepted = (
            proposal.basis == BASIS["measured"] and clear and proposal.best != proposal.current
        )
    return proposal


def predicted(question: Question, arch: Arch) -> Proposal:
    """Compile the candidates and rank those without spills by the model's floor."""
    current = question.current(arch_number(arch))
    proposal = Proposal(question, current, BASIS["predicted"])
    dtype = DTYPES[question.kind]
    lengths = make_lengths("scaled", question.batch, question.length)
    stages, road = current.num_stages, roads_of(question.passname, ("padded",))[0]
    target = Target(arch, question.passname, dtype, question.head_dim, road=road)
    for config in candidates(question, current):
        if config != current and config.num_stages != stages:
            continue
        row: dict[str, Any] = {"config": config}
        proposal.candidates.append(row)
        try:
            with only_config(question.passname, question.kind, question.head_dim, config):
                fact = facts_of_target(target)[0]
        except REFUSALS as error:
            row["refused"] = str(error).splitlines()[0][:120]
            continue
        row |= {"registers": fact.registers, "stack": fact.stack, "ctas": fact.ctas, "wgmma": fact.wgmma > 0}
        if fact.costs is None or fact.stack or fact.spills or not fact.ctas:
            continue
        itemsize = getattr(torch, dtype).itemsize
        shape = (lengths, question.heads, question.head_dim, question.length, itemsize)
        prediction = predict(fact.kernel, fact.costs, arch, *shape)
        row |= {"predicted_us": prediction.floor, "compute_us": prediction.compute, "bound": prediction.bound}
    return decide(proposal, "compute_us")


def questions(options: argparse.Namespace, on_gpu: bool) -> list[Question]:
    """Every key of the table that the options admit, at each length and layout; on a CPU padded only.

    The gradient of a float mask is compiled and checked, but no workload is worth a tuned row of it.
    """
    layouts = LAYOUTS if on_gpu else LAYOUTS[:1]
    keys = [
        key for key in _configs.TABLE
        if (not options.passes or key[0] in options.passes.split(","))
        and (not options.head_dims or str(key[2]) in options.head_dims.split(","))
        and (not options.kinds or key[1] in options.kinds.split(","))
        and key[0] != "attn_mask_gradient"
        and (on_gpu or key[0] != "single_query")
    ]  # fmt: skip
    keys.sort(key=lambda key: HEAD_DIMS.index(key[2]))
    lengths = [int(length) for length in options.lengths.split(",")]
    made = [Question(*key, length, layout) for length in lengths for layout in layouts for key in keys]
    return [q for q in made if q.passname != "single_query" or q.layout == "padded"]


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m bench tune", description=__doc__)
    options.add_argument(
        "--passes", help=f"of {', '.join(dict.fromkeys(key[0] for key in _configs.TABLE))}, by comma"
    )
    options.add_argument("--head-dims", help="padded head dims, by comma")
    options.add_argument("--kinds", default="half", help="half, float, by comma; default half")
    options.add_argument(
        "--lengths", default="400", help=f"sequence lengths, by comma, such as {LENGTHS}; default 400"
    )
    options.add_argument("--arch", default="90", help="what to predict for without a GPU; default 90")
    options.add_argument(
        "--minutes", type=positive_minutes, default=8.5, help="ask nothing more after this many minutes"
    )
    options.add_argument("--output", default=str(RESULTS), help="folder for results")
    return options


def main(argv: list[str]) -> int:
    """Print and write the proposals after each question; status 2 with one line for a wrong argument."""
    options, device = parser().parse_args(argv), machine.pick_device()
    on_gpu = device.type == "cuda"
    try:
        arch = parse_arch(options.arch)
        asked = questions(options, on_gpu)
        if not asked:
            raise ValueError("no row of the table fits --passes, --head-dims and --kinds")
        if not on_gpu and (reason := why_not_compile()):
            raise ValueError(reason)
    except ValueError as error:
        print(f"python -m bench tune: {error}", file=sys.stderr)
        return 2
    folder = Path(options.output) / (machine.device_slug(device) if on_gpu else "compile")
    folder.mkdir(parents=True, exist_ok=True)
    deadline, proposals = time.monotonic() + options.minutes * 60, []
    content: dict[str, Any] = {
        "kind": "tune",
        "basis": BASIS["measured" if on_gpu else "predicted"],
        "arch": _configs.architecture(device) if on_gpu else arch,
        "asked": len(asked),
        "environment": machine.environment(device, ["tune", *argv]),
    }
    stop_on_sigterm()
    with pool(on_gpu) as executor:
        for question in asked:
            if time.monotonic() > deadline:
                break
            proposal = (
                measured(question, device, seconds=2.0, executor=executor)
                if on_gpu
                else predicted(question, arch)
            )
            proposals.append(proposal.to_json())
            temporary = folder / ".tune.json"
            temporary.write_text(
                json.dumps(content | {"answered": len(proposals), "proposals": proposals}, indent=1) + "\n"
            )
            temporary.replace(folder / "tune.json")
            print(line(proposal), flush=True)
    print(
        f"{len(proposals)} of {len(asked)} rows, {content['basis']}: {folder / 'tune.json'}", file=sys.stderr
    )
    return 0


def line(proposal: Proposal) -> str:
    """One row of the table on one line."""
    q, figure = proposal.question, "p50_us" if proposal.basis == BASIS["measured"] else "compute_us"
    figures = {row["config"]: row[figure] for row in proposal.candidates if figure in row}

    def shown(config: Config | None) -> str:
        value = figures.get(config) if config else None
        return f"{tuple(config) if config else '-'} {'spills or refused' if value is None else f'{value:.1f} us'}"

    outcome = "accept" if proposal.accepted else "keep" if proposal.best == proposal.current else "consider"
    return f"{outcome:8} {q.passname} {q.kind} {q.head_dim} S{q.length} {q.layout}: now {shown(proposal.current)}, best {shown(proposal.best)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
