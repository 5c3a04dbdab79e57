"""Cases computed on a CPU and replayed elsewhere: compiled code against the interpreter and fp64 truth.

Every row of the configuration table has a case, and so have scale 1.0, head_dim 32, one token, one query, every
road. A case holds its inputs, so that a replay does not hang on two machines drawing the same random numbers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from padfree import _configs, attention, reference, testing
from padfree.testing import Inputs, Results
from padfree_bench.processes import pool, workers

DTYPES = {"half": (torch.bfloat16, torch.float16), "float": (torch.float32,)}


@dataclass(frozen=True)
class Case:
    """One call: sizes, dtype and the options of `padfree.attention`."""

    name: str
    queries: int
    keys: int
    head_dim: int
    dtype: torch.dtype
    padding: str = "right"
    bias: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    # The interpreter is the slow part: cases whose tiles are many go without.
    interpret: bool = True
    # One of those that slow tools run: every road, and every kernel at two head_dims.
    few: bool = True

    def inputs(self) -> Inputs:
        made = testing.make_inputs(
            2,
            2,
            self.queries,
            self.keys,
            self.head_dim,
            dtype=self.dtype,
            padding=self.padding,
            lse_gradient=True,
        )
        if not self.bias:
            return made
        bias = torch.randn(2, 2, self.queries, self.keys, generator=torch.Generator().manual_seed(1)).to(
            self.dtype
        )
        return Inputs(**{**vars(made), "attn_mask": bias})


def table_cases() -> list[Case]:
    """One case for every row of the table, at a length that the row serves."""
    cases = []
    for (passname, kind, head_dim), rows in _configs.TABLE.items():
        for index, row in enumerate(rows):
            limit = rows[index - 1].max_length if index else _configs.ANY
            keys = 100 if limit == _configs.ANY else limit + 5
            for dtype in DTYPES[kind]:
                name = f"{passname} {kind} {head_dim} row {index} {dtype} {tuple(row.config)}"
                queries = 1 if passname == "single_query" else keys
                interpret = kind == "float" and head_dim == 16
                bias = passname == "attn_mask_gradient"
                few = head_dim in (16, 64) and dtype != torch.float16
                cases.append(
                    Case(name, queries, keys, head_dim, dtype, bias=bias, interpret=interpret, few=few)
                )
    return cases


def road_cases() -> list[Case]:
    """The corners in which compilers and kernels have been wrong."""
    half, single = torch.bfloat16, torch.float32
    return [
        Case("unit scale", 70, 70, 32, half, options=(("scale", 1.0),), interpret=False),
        Case("unit scale, fp32", 70, 70, 32, single, options=(("scale", 1.0),)),
        Case("one token", 1, 1, 32, half, "none", interpret=False),
        Case("head_dim 13", 70, 70, 13, single),
        Case("notebook heads", 400, 400, 8, half, interpret=False),
        Case("skipped queries", 70, 70, 32, half, options=(("skip_padded_queries", True),), interpret=False),
        Case("holes", 70, 70, 32, single, "holes"),
        Case("left padding", 70, 70, 32, single, "left"),
        Case("no padding", 128, 128, 64, half, "none", interpret=False),
        Case("window", 150, 150, 32, half, options=(("window", (20, 10)),), interpret=False),
        Case("causal", 150, 150, 32, half, options=(("window", (None, 0)),), interpret=False),
        Case("bias", 70, 70, 32, half, bias=True, interpret=False),
        Case("bias, fp32", 70, 70, 32, single, bias=True),
    ]


def export(path: Path) -> dict[str, Any]:
    """Write every case with its truth and eager result, and in fp32 the interpreter's."""
    stored = []
    for case in (*road_cases(), *table_cases()):
        inputs, options = case.inputs(), dict(case.options)
        stored.append({
            "name": case.name,
            "options": options,
            "few": case.few,
            "inputs": vars(inputs),
            "truth": tuple(testing.run(reference, inputs.to(torch.float64), **options)),
            "low": tuple(testing.run(testing.eager_attention, inputs, **options)),
            "interpreted": tuple(testing.run(attention, inputs, impl="triton", **options)) if case.interpret else None,
        })  # fmt: skip
    torch.save(stored, path)
    return {"cases": len(stored), "interpreted": sum(case["interpreted"] is not None for case in stored)}


def load(path: Path, on_gpu: bool, few: bool) -> list[dict[str, Any]]:
    """The exported cases: on a GPU all, or a `few` that touch every kernel; on a CPU those worth interpreting."""
    stored = torch.load(path, weights_only=False)
    if not on_gpu:
        return [case for case in stored if case["interpreted"] is not None]
    return [case for case in stored if not few or case["few"]]


def replay(path: Path, device: torch.device, few: bool) -> dict[str, Any]:
    """Run the exported cases on this device and hold each to the error rule; AssertionError names all that fail.

    On a GPU nearly all the time is compiling, which several processes share unless the cases are few.
    """
    on_gpu = device.type == "cuda"
    shares = 1 if few else workers(on_gpu)
    arguments = [(path, device, few, share, shares) for share in range(shares)]
    if shares == 1:
        found = [replay_share(*arguments[0])]
    else:
        with pool(on_gpu) as executor:
            found = list(executor.map(replay_share, *zip(*arguments, strict=True)))
    failures = [failure for share, _, _ in found for failure in share]
    count = sum(cases for _, _, cases in found)
    if failures:
        raise AssertionError(f"{len(failures)} of {count} cases: " + " | ".join(failures)[:3000])
    deviation = max(share for _, share, _ in found)
    return {"cases": count, "largest_deviation_from_the_interpreter": deviation}


def replay_share(
    path: Path, device: torch.device, few: bool, share: int, shares: int
) -> tuple[list[str], float, int]:
    """(failures, largest deviation from the interpreter, cases) of every `shares`-th case."""
    stored = load(path, device.type == "cuda", few)[share::shares]
    failures, deviation = [], 0.0
    for case in stored:
        tensors: dict[str, Any] = {k: None if v is None else v.to(device) for k, v in case["inputs"].items()}
        inputs = Inputs(**tensors)
        results = testing.run(attention, inputs, impl="triton", **case["options"])
        got = Results._make(None if x is None else x.cpu() for x in results)
        try:
            compare(case, got)
        except AssertionError as error:
            failures.append(f"{case['name']}: {error}")
            print(failures[-1], flush=True)
        if case["interpreted"] is not None:
            pairs = zip(got, case["interpreted"], strict=True)
            finite = [(a - b).masked_fill(~torch.isfinite(b), 0) for a, b in pairs if a is not None]
            deviation = max([deviation, *(float(x.abs().max()) for x in finite)])
    return failures, deviation, len(stored)


def compare(case: dict[str, Any], got: Results) -> None:
    """The error rule of padfree.testing on every result of one case."""
    for field, value, low, truth in zip(Results._fields, got, case["low"], case["truth"], strict=True):
        if value is None:
            continue
        if field == "lse":
            if not torch.equal(torch.isinf(value), torch.isinf(truth)):
                raise AssertionError("lse: -inf must stand exactly where a row sees no key")
            value, low, truth = (x.masked_fill(torch.isinf(x), 0) for x in (value, low, truth))
        factor = testing.FORWARD_FACTOR if field in ("out", "lse") else testing.BACKWARD_FACTOR
        testing.assert_within_reference_error(value, low, truth, factor=factor, name=field)
