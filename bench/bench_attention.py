"""The attention cases under pytest-benchmark: `pytest bench`, a group a case and direction.

`--benchmark-save`, `--benchmark-compare` and `--benchmark-disable` work as usual. The cases, peers, inputs and the
check against fp64 are those of `python -m bench attention --quick`; a peer that cannot run is skipped with its reason.
"""

import functools
from dataclasses import replace

import pytest

from padfree_bench.measuring.cases import DIRECTIONS, Case, quick_cases
from padfree_bench.measuring.ceilings import Ceilings, measure_ceilings
from padfree_bench.measuring.check import Truth, compute_truth
from padfree_bench.measuring.inputs import Inputs, make_inputs
from padfree_bench.measuring.machine import pick_device
from padfree_bench.measuring.timing import synchronize
from padfree_bench.peers import PEERS
from padfree_bench.suites.attention import MAKE_CALL, admit, fill_speed, peers_for

DEVICE = pick_device()
CASES = quick_cases(DEVICE.type)
ROUNDS, WARMUP = 20, 3


@functools.lru_cache(maxsize=1)
def prepared_case(case: Case) -> tuple[Inputs, Truth]:
    inputs = make_inputs(case, DEVICE)
    return inputs, compute_truth(inputs)


@functools.cache
def ceilings() -> Ceilings:
    return measure_ceilings(DEVICE, {case.dtype for case in CASES})


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_attention(benchmark, case: Case, direction: str, peer: str) -> None:  # type: ignore[no-untyped-def]
    inputs, truth = prepared_case(case)
    chosen = next(candidate for candidate in peers_for(None, DEVICE) if candidate.name == peer)
    contender = admit(chosen, inputs, truth, training=direction != "forward")
    row = replace(contender.row, direction=direction)
    if contender.prepared is None:
        (pytest.fail if row.reason.startswith("wrong answer") else pytest.skip)(row.reason)
    call = MAKE_CALL[direction](contender.prepared)

    def timed() -> None:
        call()
        synchronize(DEVICE)

    benchmark.group = f"{case.id} {direction}"
    told = {name: value for name, value in vars(row).items() if value not in (None, "")}
    benchmark.extra_info.update({name: told[name] for name in told if name not in ("peer", "suite")})
    benchmark.pedantic(timed, rounds=ROUNDS, iterations=1, warmup_rounds=WARMUP)
    # None under --benchmark-disable.
    if benchmark.stats is not None:
        row.ms_p50 = benchmark.stats.stats.median * 1e3
        fill_speed(row, inputs, direction, ceilings())
        rates = ("tflops", "gb_per_s", "tokens_per_s", "reviews_per_s", "fraction", "bound")
        benchmark.extra_info.update({name: getattr(row, name) for name in rates})
