"""Faults of the device code that every kernel shares, and of the single query's kernels."""

from functools import partial

from faults.fault import Fault

tiles = partial(Fault, file="_triton/tiles.py")
spans = partial(Fault, file="_triton/spans.py")
scores = partial(Fault, file="_triton/scores.py")
single = partial(Fault, file="_triton/single_query.py")

FAULTS = [
    scores(
        "log2(e) is cut to four digits", "constants",
        fragment="1.4426950408889634", replacement="1.4427",
    ),
    spans(
        "the mask's polarity is inverted", "mask",
        fragment="tl.load(ptrs, mask=keep_n, other=1) == 0)", replacement="tl.load(ptrs, mask=keep_n, other=1) != 0)",
    ),
    spans(
        "one key past the end is visible", "bounds",
        fragment="keep_n = n < stop\n", replacement="keep_n = n <= stop\n",
    ),
    scores(
        "hidden scores are a finite number", "mask",
        fragment="return tl.where(keep, scores, float(\"-inf\"))",
        replacement="return tl.where(keep, scores, -10000.0)",
    ),
    scores(
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
    scores(
        "a running maximum of -inf is not guarded", "online softmax",
        fragment="    if SOME_HIDDEN:\n", replacement="    if False:\n",
    ),
    scores(
        "the running sum is not rescaled", "online softmax",
        fragment="state.row_sum * rescale + tl.sum(probs, 1)", replacement="state.row_sum + tl.sum(probs, 1)",
    ),
    scores(
        "the running maximum is not carried", "online softmax",
        fragment="row_max = tl.maximum(state.row_max, tl.max(scores, 1))", replacement="row_max = tl.max(scores, 1)",
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
    scores(
        "attn_mask offsets are 32 bits wide", "offset width",
        fragment="ptrs = attn_mask.ptr + m.to(tl.int64) * attn_mask.strides[2] + n.to(tl.int64) * attn_mask.strides[3]",
        replacement="ptrs = attn_mask.ptr + (m * attn_mask.strides[2] + n * attn_mask.strides[3]).to(tl.int32)",
    ),
    spans(
        "padding offsets are 32 bits wide", "offset width",
        fragment="n.to(tl.int64) * padding.strides[1]", replacement="(n * padding.strides[1]).to(tl.int32)",
    ),
    tiles(
        "the last stride of a row is taken as 1", "addressing",
        fragment="d * strides[3]", replacement="d",
    ),
    tiles(
        "the heads' stride is not used", "addressing",
        fragment="aligned(strides[1], TILE.ALIGN)", replacement="aligned(strides[2], TILE.ALIGN)",
    ),
    tiles(
        "strides are rounded to eight", "addressing",
        fragment="return stride // ALIGN * ALIGN", replacement="return stride // 8 * 8",
    ),
    tiles(
        "columns past the head_dim are stored", "bounds",
        fragment="mask=in_r[:, None] & in_d)", replacement="mask=in_r[:, None])",
    ),
    spans(
        "the mask is scanned in its first block only", "mask",
        fragment="for start in range(0, num_keys, SCAN_BLOCK):", replacement="for start in range(0, SCAN_BLOCK, SCAN_BLOCK):",
    ),
    spans(
        "holes are not noticed", "mask",
        fragment="Visible(first, stop, count < stop - first)", replacement="Visible(first, stop, count < 0)",
    ),
    spans(
        "the first visible key is skipped", "mask",
        fragment="first = tl.min(firsts, 0)", replacement="first = tl.min(firsts, 0) + 1",
    ),
    spans(
        "the last visible key is skipped", "mask",
        fragment="stop, count = tl.max(lasts, 0) + 1,", replacement="stop, count = tl.max(lasts, 0),",
    ),
    scores(
        "the window's left side is off by one", "window",
        fragment="n >= m - window.left", replacement="n > m - window.left",
    ),
    scores(
        "the window's right side is off by one", "window",
        fragment="n <= m + window.right", replacement="n < m + window.right",
    ),
    spans(
        "the window's last tile is cut", "window",
        fragment="hi = tl.minimum(stop, own_last + after + 1)", replacement="hi = tl.minimum(stop, own_last + after)",
    ),
    spans(
        "a tile that the window cuts on the right counts as full", "window",
        fragment="full_stop = tl.minimum(stop, own_first + after + 1)", replacement="full_stop = tl.minimum(stop, own_last + after + 1)",
    ),
    spans(
        "a tile that the window cuts on the left counts as full", "window",
        fragment="tl.cdiv(tl.maximum(own_last - before - first, 0), BLOCK) * BLOCK", replacement="tl.maximum(own_last - before - first, 0) // BLOCK * BLOCK",
    ),
    scores(
        "a bool attn_mask is read upside down", "mask",
        fragment="hide(scores, attn_mask == 0)", replacement="hide(scores, attn_mask != 0)",
    ),
    scores(
        "a bias is added in the wrong base", "constants",
        fragment="bias2 = bias * LOG2E\n", replacement="bias2 = bias\n",
    ),
    scores(
        "a finite bias overflows to -inf", "mask",
        fragment="tl.where((bias2 < LOWEST) & (bias > float(\"-inf\")), LOWEST, bias2)", replacement="bias2",
    ),
    scores(
        "a NaN in the bias hides its key on a GPU", "mask",
        fragment="tl.where((bias2 < LOWEST) & (bias > float(\"-inf\")), LOWEST, bias2)",
        replacement="tl.where(bias == float(\"-inf\"), bias, tl.maximum(bias2, LOWEST))",
    ),
    scores(
        "dropout is the same for every head", "dropout",
        fragment="tl.philox(tl.load(inputs.dropout.seed_ptr), bh, bh * 0", replacement="tl.philox(tl.load(inputs.dropout.seed_ptr), bh * 0, bh * 0",
    ),
    scores(
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
        fragment="d_scores * query.q * inputs.scale", replacement="d_scores * query.q",
    ),
    single(
        "a single query's dv uses weights that were dropped", "dropout",
        fragment="dropped * inverse", replacement="probs * inverse",
    ),
    single(
        "a single query's keys past the end are stored", "bounds",
        fragment="in_n = start + tl.arange(0, BLOCK_N) < sequence.key_rows", replacement="in_n = start + tl.arange(0, BLOCK_N) <= sequence.key_rows",
    ),
    scores(
        "keys past the end reach an attn_mask tile", "bounds",
        fragment="in_mn = rows.live_m[:, None] & (n < stop)[None, :]", replacement="in_mn = rows.live_m[:, None] & (n <= stop)[None, :]",
    ),
    spans(
        "tiles with holes are taken for full ones", "mask",
        fragment="m_first, m_last, first, stop, holes, window.left", replacement="m_first, m_last, first, stop, m_first < 0, window.left",
    ),
    scores(
        "edge tiles are not masked", "mask",
        fragment="if keep_n is not None:\n        scores = hide_keys", replacement="if False:\n        scores = hide_keys",
    ),
    spans(
        "the tiles left of the window's full ones are skipped", "window",
        fragment="tl.range(span.lo, span.full_lo, BLOCK, num_stages=1)", replacement="tl.range(span.lo, span.lo, BLOCK, num_stages=1)",
    ),
    spans(
        "the edge tiles on the right are skipped", "window",
        fragment="tl.range(span.full_hi, span.hi, BLOCK, num_stages=1)", replacement="tl.range(span.full_hi, span.full_hi, BLOCK, num_stages=1)",
    ),
    tiles(
        "sequence 0's padding hides every sequence's keys", "addressing",
        fragment="padding_start = b * inputs.padding.strides[0]", replacement="padding_start = 0 * inputs.padding.strides[0]",
    ),
    spans(
        "the mask's last stride is taken as 1", "addressing",
        fragment="n.to(tl.int64) * padding.strides[1]", replacement="n.to(tl.int64)",
    ),
    tiles(
        "values are found by the strides of keys", "addressing",
        fragment="v = at_row(inputs.v, b,", replacement="v = at_row(View(inputs.v.ptr, inputs.k.strides), b,",
    ),
    tiles(
        "head and sequence are swapped", "addressing",
        fragment="(bh // heads).to(tl.int64), (bh % heads).to(tl.int64)",
        replacement="(bh % sequences).to(tl.int64), (bh // sequences).to(tl.int64)",
    ),
    tiles(
        "grouped heads take keys in turn", "addressing",
        fragment="kv_h = sequence.b, h // TILE.GROUP", replacement="kv_h = sequence.b, h % (inputs.sizes.heads // TILE.GROUP)",
    ),
    tiles(
        "the attn_mask of head 0 serves every head", "addressing",
        fragment="return b * inputs.attn_mask.strides[0] + h * inputs.attn_mask.strides[1]", replacement="return b * inputs.attn_mask.strides[0]",
    ),
    tiles(
        "the LSE's offset is 32 bits wide", "offset width",
        fragment="return sequence.b * view.strides[0] + h * view.strides[1] + sequence.q_start",
        replacement="return (sequence.b * view.strides[0] + h * view.strides[1] + sequence.q_start).to(tl.int32)",
    ),
    tiles(
        "the LSE and delta are found without their head", "addressing",
        fragment="return sequence.b * view.strides[0] + h * view.strides[1] + sequence.q_start",
        replacement="return sequence.b * view.strides[0] + sequence.q_start",
    ),
    tiles(
        "batch and head are 32 bits wide", "offset width",
        fragment="(bh // heads).to(tl.int64), (bh % heads).to(tl.int64)", replacement="bh // heads, bh % heads",
    ),
    spans(
        "tiles of skipped queries at the sequence's first key are cut", "mask",
        fragment="(m_first < stop) & (m_last >= first)", replacement="(m_first < stop) & (m_first >= first)",
    ),
    tiles(
        "the gradient of the LSE is ignored", "saved statistics",
        fragment="d_lse = LOG2E * tl.load(", replacement="d_lse = 0 * tl.load(",
    ),
    tiles(
        "the gradient of the LSE has the wrong sign", "saved statistics",
        fragment="d_lse = LOG2E * tl.load(", replacement="d_lse = -LOG2E * tl.load(",
    ),
    scores(
        "every head drops by the stream of its sequence's head 0", "dropout",
        fragment="bh = (b * inputs.sizes.heads + h).to(tl.int32)", replacement="bh = (b * inputs.sizes.heads).to(tl.int32)",
    ),
    tiles(
        "a length beyond the keys is believed", "lengths",
        fragment='tl.minimum(tl.maximum(tl.load(sizes.key_lengths_ptr + b), 0), key_rows)', replacement='tl.minimum(tl.maximum(tl.load(sizes.key_lengths_ptr + b), 0), key_rows + 64)',
    ),
    tiles(
        "every sequence has the first one's length", "lengths",
        fragment='sizes.key_lengths_ptr + b)', replacement='sizes.key_lengths_ptr)',
    ),
    tiles(
        "one key beyond a length is visible", "lengths",
        fragment='tl.load(sizes.key_lengths_ptr + b), 0)', replacement='tl.load(sizes.key_lengths_ptr + b) + 1, 0)',
    ),
    spans(
        "every sequence has the first one's span", "lengths",
        fragment='span = inputs.spans_ptr + sequence.b * 3', replacement='span = inputs.spans_ptr',
    ),
    spans(
        "a span that ends beyond the keys is believed", "lengths",
        fragment='tl.minimum(tl.load(span + 1), sequence.keys)', replacement='tl.minimum(tl.load(span + 1), sequence.keys + 64)',
    ),
    spans(
        "a span that begins before the keys is believed", "lengths",
        fragment='tl.maximum(tl.load(span), 0)', replacement='tl.maximum(tl.load(span), -64)',
    ),
    spans(
        "a span's holes are not read", "lengths",
        fragment='tl.load(span + 2) != 0)', replacement='tl.load(span + 2) < 0)',
    ),
    spans(
        "holes that were found are not stored", "lengths",
        fragment='visible.holes.to(tl.int32), mask', replacement='visible.holes.to(tl.int32) * 0, mask',
    ),
    spans(
        "one loop hides no key", "one loop",
        fragment='END if TILE.ONE_LOOP else NOTHING', replacement='NOTHING',
    ),
    spans(
        "one loop leaves holes out", "one loop",
        fragment='if LAST_EDGE or not TILE.ONE_LOOP:', replacement='if not TILE.ONE_LOOP:',
    ),
    spans(
        "one loop stops before the last tile", "one loop",
        fragment='full_lo, full_hi = lo, hi', replacement='full_lo = lo',
    ),
    tiles(
        "the last group of heads is taken for a full one", "programs",
        fragment='tl.minimum(sizes.sequences * heads - group_first, sizes.together)', replacement='sizes.together',
    ),
    tiles(
        "every group of heads begins with the first program", "programs",
        fragment='tl.program_id(0) - group_first * tiles', replacement='tl.program_id(0)',
    ),
    single(
        "a single query gives keys beyond a length no gradient", "lengths",
        fragment='range(0, sequence.key_rows, BLOCK_N)', replacement='range(0, sequence.keys, BLOCK_N)',
    ),
]  # fmt: skip
