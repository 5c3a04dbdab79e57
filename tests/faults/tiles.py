"""Faults of the device code that every kernel shares, and of the single query's kernels."""

from functools import partial

from faults.fault import Fault

tiles = partial(Fault, file="_triton/tiles.py")
single = partial(Fault, file="_triton/single_query.py")

FAULTS = [
    tiles(
        "log2(e) is cut to four digits", "constants",
        fragment="1.4426950408889634", replacement="1.4427",
    ),
    tiles(
        "the mask's polarity is inverted", "mask",
        fragment="mask=keep_n, other=1) == 0)", replacement="mask=keep_n, other=1) != 0)",
    ),
    tiles(
        "one key past the end is visible", "bounds",
        fragment="keep_n = n < stop\n", replacement="keep_n = n <= stop\n",
    ),
    tiles(
        "hidden scores are a finite number", "mask",
        fragment="return tl.where(keep, scores, float(\"-inf\"))",
        replacement="return tl.where(keep, scores, -10000.0)",
    ),
    tiles(
        "hidden columns are a finite number", "mask",
        fragment="cap = tl.where(keep_n, float(\"inf\"), float(\"-inf\"))\n        scores", replacement="cap = tl.where(keep_n, float(\"inf\"), -10000.0)\n        scores",
    ),
    tiles(
        "hidden keys are multiplied by zero, not left unread", "masked-lane fill",
        fragment="tile = tl.load(ptrs, mask=keep_r[:, None], other=0.0)", replacement="tile = tl.load(ptrs)",
    ),
    tiles(
        "hidden rows of a tile hold what they like", "masked-lane fill",
        fragment="mask=keep_r[:, None] & in_d, other=0.0)", replacement="mask=keep_r[:, None] & in_d)",
    ),
    tiles(
        "a running maximum of -inf is not guarded", "online softmax",
        fragment="    if SOME_HIDDEN:\n", replacement="    if False:\n",
    ),
    tiles(
        "the running sum is not rescaled", "online softmax",
        fragment="row_sum * rescale + tl.sum(probs, 1)", replacement="row_sum + tl.sum(probs, 1)",
    ),
    tiles(
        "the running maximum is not carried", "online softmax",
        fragment="row_max_new = tl.maximum(row_max, tl.max(scores, 1))", replacement="row_max_new = tl.max(scores, 1)",
    ),
    tiles(
        "rows that see nothing keep a finite LSE", "masked rows",
        fragment="return tl.where(live_m, lse2, float(\"inf\")), live_m", replacement="return tl.where(live_m, lse2, 0.0), live_m",
        reason="such rows read query and incoming gradient as zeros, so any finite weight meets zeros: a second guard",
    ),
    tiles(
        "row offsets are 32 bits wide", "offset width",
        fragment="return tl.cast(start, tl.int64) * stride_r + (r * stride_r + d * strides[3])",
        replacement="return (start * stride_r + (r * stride_r + d * strides[3])).to(tl.int32)",
    ),
    tiles(
        "attn_mask offsets are 32 bits wide", "offset width",
        fragment="ptrs = attn_mask_ptr + m.to(tl.int64) * strides[2] + n.to(tl.int64) * strides[3]",
        replacement="ptrs = attn_mask_ptr + (m * strides[2] + n * strides[3]).to(tl.int32)",
    ),
    tiles(
        "padding offsets are 32 bits wide", "offset width",
        fragment="mask_ptr + n.to(tl.int64) * stride_n", replacement="mask_ptr + (n * stride_n).to(tl.int32)",
    ),
    tiles(
        "the last stride of a row is taken as 1", "addressing",
        fragment="d * strides[3]", replacement="d",
    ),
    tiles(
        "the heads' stride is not used", "addressing",
        fragment="h * aligned(strides[1], ALIGN)", replacement="h * aligned(strides[2], ALIGN)",
    ),
    tiles(
        "strides are rounded to eight", "addressing",
        fragment="return stride // ALIGN * ALIGN", replacement="return stride // 8 * 8",
    ),
    tiles(
        "columns past the head_dim are stored", "bounds",
        fragment="mask=in_r[:, None] & in_d)", replacement="mask=in_r[:, None])",
    ),
    tiles(
        "the mask is scanned in its first block only", "mask",
        fragment="for start in range(0, num_keys, SCAN_BLOCK):", replacement="for start in range(0, SCAN_BLOCK, SCAN_BLOCK):",
    ),
    tiles(
        "holes are not noticed", "mask",
        fragment="holes = count < stop - first", replacement="holes = count < 0",
    ),
    tiles(
        "the first visible key is skipped", "mask",
        fragment="first = tl.min(firsts, 0)", replacement="first = tl.min(firsts, 0) + 1",
    ),
    tiles(
        "the last visible key is skipped", "mask",
        fragment="stops = tl.where(keep_n, n + 1, stops)", replacement="stops = tl.where(keep_n, n, stops)",
    ),
    tiles(
        "the window's left side is off by one", "window",
        fragment="n >= m - window_left", replacement="n > m - window_left",
    ),
    tiles(
        "the window's right side is off by one", "window",
        fragment="n <= m + window_right", replacement="n < m + window_right",
    ),
    tiles(
        "the window's last tile is cut", "window",
        fragment="hi = tl.minimum(stop, own_last + after + 1)", replacement="hi = tl.minimum(stop, own_last + after)",
    ),
    tiles(
        "a tile that the window cuts on the right counts as full", "window",
        fragment="full_stop = tl.minimum(stop, own_first + after + 1)", replacement="full_stop = tl.minimum(stop, own_last + after + 1)",
    ),
    tiles(
        "a tile that the window cuts on the left counts as full", "window",
        fragment="tl.cdiv(tl.maximum(own_last - before - first, 0), BLOCK) * BLOCK", replacement="tl.maximum(own_last - before - first, 0) // BLOCK * BLOCK",
    ),
    tiles(
        "a bool attn_mask is read upside down", "mask",
        fragment="hide(scores, attn_mask == 0)", replacement="hide(scores, attn_mask != 0)",
    ),
    tiles(
        "a bias is added in the wrong base", "constants",
        fragment="bias2 = bias * LOG2E\n", replacement="bias2 = bias\n",
    ),
    tiles(
        "a finite bias overflows to -inf", "mask",
        fragment="tl.where((bias2 < LOWEST) & (bias > float(\"-inf\")), LOWEST, bias2)", replacement="bias2",
    ),
    tiles(
        "a NaN in the bias hides its key on a GPU", "mask",
        fragment="tl.where((bias2 < LOWEST) & (bias > float(\"-inf\")), LOWEST, bias2)",
        replacement="tl.where(bias == float(\"-inf\"), bias, tl.maximum(bias2, LOWEST))",
    ),
    tiles(
        "dropout is the same for every head", "dropout",
        fragment="tl.philox(tl.load(seed_ptr), bh, bh * 0", replacement="tl.philox(tl.load(seed_ptr), bh * 0, bh * 0",
    ),
    tiles(
        "dropout keeps what it should drop", "dropout",
        fragment="return word >= ", replacement="return word < ",
    ),
    tiles(
        "a packed sequence ends where the next begins its own count", "packing",
        fragment="tl.load(cu_seqlens_ptr + b + 1) - start, length", replacement="tl.load(cu_seqlens_ptr + b + 1), length",
    ),
    tiles(
        "every packed sequence starts at 0", "packing",
        fragment="return start.to(tl.int64),", replacement="return start.to(tl.int64) * 0,",
    ),
    single(
        "a single query's lanes are not rescaled", "online softmax",
        fragment="acc = acc * rescale + probs * v", replacement="acc = acc + probs * v",
    ),
    single(
        "a single query's lanes keep their own maximum", "online softmax",
        fragment="weight = tl.exp2(lane_max2 - tl.where(row_max2 == float(\"-inf\"), 0.0, row_max2)[None, :])",
        replacement="weight = tl.exp2(lane_max2 - lane_max2)",
    ),
    single(
        "a single query's NaN passes for a row that sees no key", "mask",
        fragment="live = row_sum != 0.0", replacement="live = row_max2 > float(\"-inf\")",
    ),
    tiles(
        "a packed sequence is longer than the call says", "packing",
        fragment="tl.minimum(tl.load(cu_seqlens_ptr + b + 1) - start, length)",
        replacement="tl.load(cu_seqlens_ptr + b + 1) - start",
    ),
    single(
        "a single query's keys need no visibility", "mask",
        fragment="return hide(scores * factor, keep), k, keep_n", replacement="return scores * factor, k, keep_n",
    ),
    single(
        "a single query's dk lacks the scale", "gradient factors",
        fragment="d_scores * q * scale", replacement="d_scores * q",
    ),
    single(
        "a single query's dv uses weights that were dropped", "dropout",
        fragment="dropped * inverse", replacement="probs * inverse",
    ),
    single(
        "a single query's keys past the end are stored", "bounds",
        fragment="in_n = start + tl.arange(0, BLOCK_N) < keys", replacement="in_n = start + tl.arange(0, BLOCK_N) <= keys",
    ),
]  # fmt: skip
