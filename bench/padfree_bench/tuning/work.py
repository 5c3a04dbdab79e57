"""One pass over one case of the benchmark, launched alone, in every way that `python -m bench tune` knows to launch it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from padfree._triton import configs
from padfree._triton.call import OPEN, Call
from padfree._triton.configs import Config, Row
from padfree._triton.forward import launch_forward
from padfree._triton.key_gradient import launch_key_gradient
from padfree._triton.query_gradient import launch_query_gradient
from padfree_bench.compiled.aot import Compiled, compile_only
from padfree_bench.compiled.aot_calls import KERNELS
from padfree_bench.measuring.cases import DTYPES, Case
from padfree_bench.measuring.inputs import Inputs

ARCH = 90
PASSES = ("forward", "query_gradient", "key_gradient")
# How a call is told which keys are real: the fields of Call that say it, each with the same result. The first is the table's.
TOLD: dict[str, Callable[[Inputs], dict[str, Tensor]]] = {
    "mask": lambda inputs: {"padding": inputs.padding},
    "lengths": lambda inputs: {"key_lengths": inputs.lengths.to(torch.int32)},
}
MASK = next(iter(TOLD))
# (rows that a program owns, rows of a step that it walks in): wgmma wants 64 rows.
TILES = ((64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128), (32, 64))
# What is tried of Config's other fields.
TRIED: dict[str, tuple[Any, ...]] = {"num_warps": (4, 8), "num_stages": (2, 3, 4), "one_loop": (False, True)}

# A pass, a case's name, a configuration and how keys are told: what a process can be sent, through JSON too.
Item = tuple[str, str, Config, str]


def config_of(stored: Mapping[str, Any] | Sequence[Any]) -> Config:
    """A configuration from its fields by name, or in order as files held it until 2026-11-27."""
    return Config(**stored) if isinstance(stored, Mapping) else Config(*stored)


def name_of(config: Config) -> str:
    """A configuration in a few words: "64x32 w4 s3", and what else of it is not as usual."""
    usual = config._field_defaults | {"block_m": config.block_m, "block_n": config.block_n}
    shown = {"num_warps": f"w{config.num_warps}", "num_stages": f"s{config.num_stages}"}
    more = [
        f"{name}={value}"
        for name, value in config._asdict().items()
        if name not in shown and value != usual[name]
    ]
    return " ".join([f"{config.block_m}x{config.block_n}", *shown.values(), *more])


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

    def row(self, told: str = MASK) -> Row:
        """The row that the table has for it today, where keys are told so: lengths are known but where a mask says them."""
        asked = self.passname, torch.bfloat16, self.case.head_dim, self.case.seq, ARCH
        return configs.row_for(*asked, known=told != MASK)

    def item(self, config: Config, told: str = MASK) -> Item:
        return self.passname, self.case.id, config, told

    def configs(self) -> list[Config]:
        """The current rows' first, then whatever the screening compiles beside them."""
        order = -1 if self.passname == "key_gradient" else 1
        others = (
            Config(*tile[::order], **dict(zip(TRIED, values, strict=True)))
            for tile, *values in product(TILES, *TRIED.values())
        )
        return list(dict.fromkeys([*(self.row(told).config for told in TOLD), *others]))


class Work:
    """One case on one device, ready for each pass to be launched alone, as the peer padfree-skip launches it."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, case = inputs, inputs.case
        # No attn_mask, seed or cu_seqlens; every query sees every real key.
        arguments: dict[str, Any] = {field.name: None for field in fields(Call) if field.default is MISSING}
        arguments |= {
            "query": inputs.query, "key": inputs.key, "value": inputs.value, "max_q": case.seq, "max_k": case.seq,
            "scale": case.head_dim**-0.5, "dropout_p": 0.0, "left": OPEN, "right": OPEN, "skip_padded_queries": True,
        }  # fmt: skip
        self.calls = {name: Call(**(arguments | tell(inputs))) for name, tell in TOLD.items()}
        self.out, self.lse2, found = launch_forward(self.calls[MASK])
        # A backward reads what the forward found in the mask.
        self.backward_calls = self.calls | {MASK: replace(self.calls[MASK], spans=found)}
        self.delta = self.launch("query_gradient")["delta"]

    def launch(self, passname: str, config: Config | None = None, told: str = MASK) -> dict[str, Tensor]:
        """What one launch of the pass writes, into new memory as in a backward; without a config by the table's row."""
        call, d_out = self.backward_calls[told], self.inputs.d_out
        if passname == "forward":
            out, lse2, _ = launch_forward(self.calls[told], config)
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


def compile_candidate(passname: str, case: Case, config: Config, told: str = MASK) -> Compiled:
    """Compile exactly what a GPU run of `tune` launches, into Triton's cache on disk; no GPU is touched."""
    with compile_only(ARCH, ()):
        work = Work(blank_inputs(case, torch.device("meta")))
    with compile_only(ARCH, KERNELS[passname]) as compiled:
        work.launch(passname, config, told)
    return compiled[0]
