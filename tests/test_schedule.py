"""The price of a call is its real tokens: the tiles the kernels visit are those the lengths need."""

import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

import padfree
from padfree._triton.configs import choose
from padfree.testing import PADDING_PATTERNS, make_inputs, run, visited_tiles

kernel = partial(padfree.attention, impl="triton")

# matrix products in one tile: scores and output; scores, dP and dq; scores, dP, dk and dv
DOTS = {"forward": 2, "query_gradient": 3, "key_gradient": 4}
KERNELS = {
    "forward": "attention_forward_kernel",
    "query_gradient": "query_gradient_kernel",
    "key_gradient": "key_gradient_kernel",
}
LENGTHS = Path(__file__).parent.parent / "bench" / "padfree_bench" / "data" / "imdb_token_lengths.json"


@pytest.fixture(autouse=True)
def interpreted(sanitizer_report):
    if sanitizer_report is None:
        pytest.skip("tiles are counted in the interpreter; a compiled kernel runs the same program")


def tiles(report, passname: str) -> float:
    return report.kernels[KERNELS[passname]]["dots"] / DOTS[passname]


@pytest.mark.parametrize("padding", PADDING_PATTERNS)
@pytest.mark.parametrize("window", (None, (None, 0), (20, None), (7, 3), (100, 40)), ids=str)
@pytest.mark.parametrize("skip", (False, True))
def test_visited_tiles_equal_the_model_in_every_pass(sanitizer_report, device, padding, window, skip):
    length, heads, dtype = 150, 2, torch.float16
    inputs = make_inputs(
        2, heads, length, length, 16, dtype=dtype, device=device, kv_heads=1, padding=padding
    )
    run(kernel, inputs, window=window, skip_padded_queries=skip)
    mask = inputs.key_padding_mask
    mask = torch.zeros(2, length, dtype=torch.bool) if mask is None else mask
    for passname in KERNELS:
        # grouped heads make that pass, and no other, walk in half steps
        config = choose(passname, dtype, 16, length, device, extras=int(passname == "key_gradient"))
        counted = visited_tiles(
            mask, length, config.block_m, config.block_n, window=window, skip_padded_queries=skip
        )
        needed = counted.keys if passname == "key_gradient" else counted.queries
        assert tiles(sanitizer_report, passname) == needed * heads, passname


@pytest.mark.parametrize("queries, keys", ((70, 150), (150, 70)))
def test_visited_tiles_equal_the_model_where_queries_and_keys_differ(sanitizer_report, device, queries, keys):
    inputs = make_inputs(3, 1, queries, keys, 16, dtype=torch.float16, device=device, padding="right")
    run(kernel, inputs, window=(30, 10))
    for passname in KERNELS:
        config = choose(passname, torch.float16, 16, keys, device)
        counted = visited_tiles(
            inputs.key_padding_mask, queries, config.block_m, config.block_n, window=(30, 10)
        )
        needed = counted.keys if passname == "key_gradient" else counted.queries
        assert tiles(sanitizer_report, passname) == needed, passname


def test_a_packed_batch_visits_the_tiles_of_the_padded_one_with_skipped_queries(sanitizer_report, device):
    lengths = torch.tensor([5, 70, 0, 129], device=device)
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    query, key, value = (torch.randn(204, 1, 16, device=device).half() for _ in range(3))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    padfree.attention_varlen(*leaves, cu, cu, 129, 129, impl="triton").sum().backward()
    padding = torch.arange(129) >= lengths.cpu()[:, None]
    for passname in KERNELS:
        config = choose(passname, torch.float16, 16, 129, device)
        counted = visited_tiles(padding, 129, config.block_m, config.block_n, skip_padded_queries=True)
        needed = counted.keys if passname == "key_gradient" else counted.queries
        assert tiles(sanitizer_report, passname) == needed, passname


def test_more_padding_costs_no_tile(sanitizer_report, device):
    counts = []
    for keys in (64, 640):
        inputs = make_inputs(1, 1, 64, keys, 16, dtype=torch.float16, device=device)
        padding = torch.arange(keys, device=device)[None] >= 50
        before = sanitizer_report.total["dots"]
        kernel(inputs.query, inputs.key, inputs.value, padding)
        counts.append(sanitizer_report.total["dots"] - before)
    assert counts == [2, 2]


def test_imdb_reviews_cut_at_400_need_048_of_the_dense_tiles_and_065_with_every_query():
    """The share by the model that the tests above hold the kernels to, over the 25,000 training reviews."""
    if not LENGTHS.exists():
        pytest.skip(f"{LENGTHS.name} is not there")
    shares = {}
    for skip in (True, False):
        visited, dense = Counter[str](), 0
        for length, reviews in Counter(min(n, 400) for n in imdb_lengths()).items():
            padding = torch.arange(400)[None] >= length
            counted = visited_tiles(padding, 400, 64, 64, skip_padded_queries=skip)
            visited["queries"] += counted.queries * reviews
            visited["keys"] += counted.keys * reviews
            dense += counted.dense * reviews
        shares[skip] = visited["queries"] / dense
        assert visited["keys"] <= visited["queries"] + (0 if skip else dense)
    assert shares[True] == pytest.approx(0.48, abs=0.005) and shares[False] == pytest.approx(
        0.65, abs=0.005
    ), shares


def imdb_lengths() -> list[int]:
    stored = json.loads(LENGTHS.read_text())
    return [n for n, count in zip(stored["lengths"], stored["counts"], strict=True) for _ in range(count)]
