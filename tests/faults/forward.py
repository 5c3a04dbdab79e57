"""Faults of the forward kernel."""

from functools import partial

from faults.fault import Fault

forward = partial(Fault, file="_triton/forward.py")

FAULTS = [
    forward(
        "rows past the end are stored", "bounds",
        fragment="in_m = m < rows", replacement="in_m = m <= rows",
    ),
    forward(
        "the last partial tile of rows is skipped", "bounds",
        fragment="call.grid(call.max_q, config.block_m,", replacement="call.grid(call.max_q // config.block_m, 1,",
    ),
    forward(
        "keys past the end reach an attn_mask tile", "bounds",
        fragment="in_mn = live_m[:, None] & (n < stop)[None, :]", replacement="in_mn = live_m[:, None] & (n <= stop)[None, :]",
        file="_triton/tiles.py",
    ),
    forward(
        "tiles with holes are taken for full ones", "mask",
        fragment="m_first, m_last, first, stop, holes, window_left", replacement="m_first, m_last, first, stop, m_first < 0, window_left",
        file="_triton/tiles.py",
    ),
    forward(
        "edge tiles are not masked", "mask",
        fragment="if keep_n is not None:\n        scores = hide_keys", replacement="if False:\n        scores = hide_keys",
        file="_triton/tiles.py",
    ),
    forward(
        "the tiles left of the window's full ones are skipped", "window",
        fragment="lo, full_lo, stop, m, live_m", replacement="lo, lo, stop, m, live_m",
    ),
    forward(
        "the edge tiles on the right are skipped", "window",
        fragment="tl.minimum(full_hi, hi), hi", replacement="tl.minimum(full_hi, hi), tl.minimum(full_hi, hi)",
        file="_triton/tiles.py",
    ),
    forward(
        "sequence 0's padding hides every sequence's keys", "addressing",
        fragment="mask_ptr += b * mask_strides[0]", replacement="mask_ptr += 0 * mask_strides[0]",
    ),
    forward(
        "the mask's last stride is taken as 1", "addressing",
        fragment="m_first, m_last, mask_ptr, mask_strides[1], keys", replacement="m_first, m_last, mask_ptr, 1, keys",
    ),
    forward(
        "values are found by the strides of keys", "addressing",
        fragment="v_ptr += head_offset(v_strides",
        replacement="v_ptr += head_offset(k_strides",
    ),
    forward(
        "head and sequence are swapped", "addressing",
        fragment="b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)",
        replacement="b, h = (bh % sequences).to(tl.int64), (bh // sequences).to(tl.int64)",
    ),
    forward(
        "grouped heads take keys in turn", "addressing",
        fragment="kv_h = h // GROUP", replacement="kv_h = h % (heads // GROUP)",
    ),
    forward(
        "the attn_mask of head 0 serves every head", "addressing",
        fragment="b * attn_mask_strides[0] + h * attn_mask_strides[1]", replacement="b * attn_mask_strides[0]",
    ),
    forward(
        "the LSE's offset is 32 bits wide", "offset width",
        fragment="lse2_ptr += b * lse2_strides[0] + h * lse2_strides[1] + q_start",
        replacement="lse2_ptr += (b * lse2_strides[0] + h * lse2_strides[1] + q_start).to(tl.int32)",
    ),
    forward(
        "batch and head are 32 bits wide", "offset width",
        fragment="b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)", replacement="b, h = bh // heads, bh % heads",
    ),
    forward(
        "the accumulator is not rescaled", "online softmax",
        fragment="acc * rescale[:, None]", replacement="acc",
    ),
    forward(
        "the sum is missing from the LSE", "conventions",
        fragment="row_max * factor + tl.log2(row_sum), float", replacement="row_max * factor, float",
    ),
    forward(
        "rows that see nothing are not written", "coverage",
        fragment="out_strides, in_m, HEAD_DIM", replacement="out_strides, live_m, HEAD_DIM",
    ),
    forward(
        "rows that see nothing keep an LSE of zero", "conventions",
        fragment="tl.log2(row_sum), float(\"-inf\"))", replacement="tl.log2(row_sum), 0.0)",
    ),
    forward(
        "rows that see nothing divide by zero", "masked rows",
        fragment="    row_sum = tl.where(live_m, row_sum, 1.0)\n"
        "    # One reciprocal a row, where a division an element costs four instructions each.\n"
        "    out = tl.where(live_m[:, None], acc, 0.0) * (1.0 / (row_sum * kept))[:, None]",
        replacement="    out = acc * (1.0 / (row_sum * kept))[:, None]",
    ),
    forward(
        "kept weights are not scaled up", "dropout",
        fragment="kept = 1.0 if seed_ptr is None else 1.0 - dropout_p", replacement="kept = 1.0",
    ),
    forward(
        "dropout counts in the softmax denominator", "dropout",
        fragment="            q.dtype == tl.float32,\n        )  # fmt: skip\n",
        replacement="            q.dtype == tl.float32,\n        )  # fmt: skip\n"
        "        if stream is not None:\n            row_sum -= tl.sum(tl.where("
        "dropout_keep(stream, m[:, None], n[None, :], dropout_p), 0.0, probs), 1)\n",
    ),
    forward(
        "skipped queries are computed", "mask",
        fragment="load_keep_n(mask_ptr, mask_strides[1], m, rows) if SKIP_QUERIES else in_m", replacement="in_m",
    ),
    forward(
        "tiles of skipped queries at the sequence's first key are cut", "mask",
        fragment="(m_first < stop) & (m_last >= first)", replacement="(m_first < stop) & (m_first >= first)",
        file="_triton/tiles.py",
    ),
]  # fmt: skip
