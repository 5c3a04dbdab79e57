"""Faults of the forward kernel."""

from functools import partial

from faults.fault import Fault

forward = partial(Fault, file="_triton/forward.py")

FAULTS = [
    forward(
        "rows past the end are stored", "bounds",
        fragment="in_m = m < sequence.queries", replacement="in_m = m <= sequence.queries",
    ),
    forward(
        "the last partial tile of rows is skipped", "bounds",
        fragment="call.grid(call.max_q, config.block_m,", replacement="call.grid(call.max_q // config.block_m, 1,",
    ),
    forward(
        "the accumulator is not rescaled", "online softmax",
        fragment="state.acc * rescale[:, None]", replacement="state.acc",
    ),
    forward(
        "the sum is missing from the LSE", "conventions",
        fragment="state.row_max * factor + tl.log2(row_sum), float", replacement="state.row_max * factor, float",
    ),
    forward(
        "rows that see nothing are not written", "coverage",
        fragment="result, m_first, in_m, BLOCK_M, TILE)", replacement="result, m_first, live_m, BLOCK_M, TILE)",
    ),
    forward(
        "rows that see nothing keep an LSE of zero", "conventions",
        fragment="tl.log2(row_sum), float(\"-inf\"))", replacement="tl.log2(row_sum), 0.0)",
    ),
    forward(
        "rows that see nothing divide by zero", "masked rows",
        fragment="result = tl.where(live_m[:, None], state.acc, 0.0) * (1.0 / (row_sum * keep_probability))[:, None]",
        replacement="result = state.acc * (1.0 / (state.row_sum * keep_probability))[:, None]",
    ),
    forward(
        "kept weights are not scaled up", "dropout",
        fragment="keep_probability = 1.0 if inputs.dropout.seed_ptr is None else 1.0 - inputs.dropout.p", replacement="keep_probability = 1.0",
    ),
    forward(
        "dropout counts in the softmax denominator", "dropout",
        fragment="        probs = tl.where(kept, probs, 0.0)\n",
        replacement="        row_sum -= tl.sum(tl.where(kept, 0.0, probs), 1)\n        probs = tl.where(kept, probs, 0.0)\n",
    ),
    forward(
        "skipped queries are computed", "mask",
        fragment="load_keep_n(inputs.padding, head.padding_start, m, sequence.keys) if TILE.SKIP_QUERIES else in_m", replacement="in_m",
    ),
    forward(
        "edge tiles of the forward are not masked", "mask",
        fragment="keep_n = None if HIDDEN == NOTHING else visible_in_tile(inputs, head, n, stop, HIDDEN)", replacement="keep_n = None",
    ),
    forward(
        "what was found is stored by the second tile", "lengths",
        fragment='(tile == 0) & (h == 0)', replacement='(tile == 1) & (h == 0)',
    ),
]  # fmt: skip
