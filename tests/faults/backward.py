"""Faults of the two backward kernels and of the attn_mask's gradient."""

from functools import partial

from faults.fault import Fault

query_gradient = partial(Fault, file="_triton/query_gradient.py")
key_gradient = partial(Fault, file="_triton/key_gradient.py")
backward = partial(Fault, file="_triton/backward.py")
mask_gradient = partial(Fault, file="_triton/attn_mask_gradient.py")

FAULTS = [
    query_gradient(
        "delta is left out of dq", "saved statistics",
        fragment="d_scores = probs * (d_probs - rows.delta[:, None])", replacement="d_scores = probs * d_probs",
    ),
    key_gradient(
        "delta is left out of dk", "saved statistics",
        fragment="d_scores = probs * (d_probs - delta[None, :])", replacement="d_scores = probs * d_probs",
    ),
    query_gradient(
        "fp32 delta keeps its drift", "saved statistics",
        fragment="first_row + m, delta + drift, mask=in_m)", replacement="first_row + m, delta, mask=in_m)",
    ),
    query_gradient(
        "fp32 dq keeps the drift of delta", "saved statistics",
        fragment="(result - drift[:, None] * sums.weighted_k) * inverse", replacement="result * inverse",
    ),
    key_gradient(
        "fp32 dk and dv keep the error of the rounded LSE", "saved statistics",
        fragment="probs *= tl.load(head.inverse_ptr + m, mask=m < stop, other=1.0)[None, :]", replacement="pass",
    ),
    query_gradient(
        "delta uses rows that see nothing", "masked-lane fill",
        fragment="row_lse2, live_m = load_lse2(lse2.ptr + first_row, m, in_m)",
        replacement="row_lse2, live_m = load_lse2(lse2.ptr + first_row, m, in_m)\n    live_m = in_m",
    ),
    query_gradient(
        "dq lacks the scale", "gradient factors",
        fragment="result * inputs.scale, 0.0", replacement="result, 0.0",
    ),
    key_gradient(
        "dk lacks the scale", "gradient factors",
        fragment="grads.dk * inputs.scale, 0.0", replacement="grads.dk, 0.0",
    ),
    key_gradient(
        "dk of padded keys is not cleared", "mask",
        fragment="dk_tile = tl.where(keep_n[:, None], grads.dk * inputs.scale, 0.0)", replacement="dk_tile = grads.dk * inputs.scale",
    ),
    key_gradient(
        "dv of padded keys is not cleared", "mask",
        fragment="dv_tile = tl.where(keep_n[:, None], grads.dv, 0.0)", replacement="dv_tile = grads.dv",
    ),
    key_gradient(
        "dk and dv of padded keys are not written", "coverage",
        fragment="dk_tile, n_first, in_n, BLOCK_N", replacement="dk_tile, n_first, keep_n, BLOCK_N",
    ),
    key_gradient(
        "keys past the end are stored", "bounds",
        fragment="in_n = n < sequence.key_rows", replacement="in_n = n <= sequence.key_rows",
    ),
    query_gradient(
        "dq rows past the end are stored", "bounds",
        fragment="in_m = m < sequence.queries", replacement="in_m = m <= sequence.queries",
    ),
    key_gradient(
        "the last partial tile of keys is skipped", "bounds",
        fragment="call.grid(call.max_k, config.block_n, call.kv_heads)",
        replacement="call.grid(call.max_k // config.block_n, 1, call.kv_heads)",
    ),
    key_gradient(
        "rows past the range give their tail to dk and dv", "masked-lane fill",
        fragment="load_lse2(head.lse2_ptr, m, m < stop)", replacement="load_lse2(head.lse2_ptr, m, m <= stop)",
    ),
    key_gradient(
        "only the first query head of a group gives to dk and dv", "ownership",
        fragment="for g in range(TILE.GROUP):", replacement="for g in range(1):",
    ),
    key_gradient(
        "query heads of a group are found in turn", "ownership",
        fragment="h = kv_h * TILE.GROUP + g", replacement="h = g * (sizes.heads // TILE.GROUP) + kv_h",
    ),
    query_gradient(
        "the incoming gradient is read by the strides of the query", "incoming gradient",
        fragment="d_out_tile = load_tile(at_row(d_out, b,", replacement="d_out_tile = load_tile(at_row(d_out._replace(strides=inputs.q.strides), b,",
    ),
    key_gradient(
        "dk and dv read the incoming gradient as contiguous", "incoming gradient",
        fragment="at_row(d_out, b, h,", replacement="at_row(d_out._replace(strides=inputs.q.strides), b, h,",
    ),
    query_gradient(
        "edge tiles of dq are not masked", "mask",
        fragment="keep_n = None if HIDDEN == NOTHING else visible_in_tile(inputs, head, n, stop, HIDDEN)", replacement="keep_n = None",
    ),
    key_gradient(
        "dk and dv take LSE and delta for each other", "saved statistics",
        fragment="tl.join(head.lse2_ptr + m, head.delta_ptr + m)", replacement="tl.join(head.delta_ptr + m, head.lse2_ptr + m)",
    ),
    key_gradient(
        "dk and dv ignore the window", "window",
        fragment="if MASKED and (window.left is not None or window.right is not None):", replacement="if False:",
    ),
    key_gradient(
        "the window's sides are not swapped for keys", "window",
        fragment="row_stop, ragged, window.right, window.left, TILE.BLOCK_M", replacement="row_stop, ragged, window.left, window.right, TILE.BLOCK_M",
    ),
    key_gradient(
        "dk and dv treat a tile with dead rows as full", "mask",
        fragment="ragged = first, stop, ragged | holes", replacement="ragged = first, stop, ragged",
    ),
    query_gradient(
        "dq is not undropped", "dropout",
        fragment="kept = dropout_keep(head.stream, rows.m[:, None], n[None, :], inputs.dropout.p)",
        replacement="kept = dropout_keep(head.stream + 1, rows.m[:, None], n[None, :], inputs.dropout.p)",
    ),
    key_gradient(
        "dk and dv drop by another mask", "dropout",
        fragment="kept = dropout_keep(head.stream, m[None, :], n[:, None], inputs.dropout.p)",
        replacement="kept = dropout_keep(head.stream, n[:, None], m[None, :], inputs.dropout.p)",
    ),
    key_gradient(
        "dv uses weights that were dropped", "dropout",
        fragment="dropped.to(d_out.dtype)", replacement="probs.to(d_out.dtype)",
    ),
    key_gradient(
        "dv is added to, not stored", "accumulation",
        fragment="    store_tile(at_row(dv,",
        replacement="    dv_tile += load_tile(at_row(dv, b, kv_h, sequence.k_start, TILE), n_first, in_n, BLOCK_N, TILE).to(tl.float32)\n"
        "    store_tile(at_row(dv,",
    ),
    backward(
        "an empty batch of queries leaves dk unwritten", "coverage",
        fragment="for grad in (dk, dv) if", replacement="for grad in (dv,) if",
    ),
    mask_gradient(
        "the mask's gradient takes only one sequence", "ownership",
        fragment="b_stop = tl.where(d_mask.batch == sizes.sequences, mask_b + 1, sizes.sequences)", replacement="b_stop = mask_b + 1",
    ),
    mask_gradient(
        "the mask's gradient takes only one head", "ownership",
        fragment="h_stop = tl.where(d_mask.heads == sizes.heads, mask_h + 1, sizes.heads)", replacement="h_stop = mask_h + 1",
    ),
    mask_gradient(
        "the mask's gradient takes only one tile of rows", "ownership",
        fragment="m_stop = tl.where(d_mask.rows == sizes.queries, tile_m * BLOCK_M + 1, sizes.queries)",
        replacement="m_stop = tile_m * BLOCK_M + 1",
    ),
    mask_gradient(
        "the mask's gradient is not summed over keys", "ownership",
        fragment="if d_mask.keys != sizes.keys:", replacement="if False:",
    ),
    mask_gradient(
        "the mask's gradient lacks delta", "saved statistics",
        fragment="* (d_probs - rows.delta[:, None])", replacement="* d_probs",
    ),
    mask_gradient(
        "the mask's gradient keeps the error of the rounded LSE", "saved statistics",
        fragment="-rows.lse2[:, None])) * rows.inverse[:, None]", replacement="-rows.lse2[:, None]))",
    ),
    mask_gradient(
        "the mask's gradient ignores the window", "window",
        fragment="scores = hide(scores, in_window(keep, m[:, None], n[None, :], inputs.window))",
        replacement="scores = hide(scores, keep)",
    ),
    mask_gradient(
        "the mask's gradient is undropped by another mask", "dropout",
        fragment="dropout_keep(head.stream, m", replacement="dropout_keep(head.stream + 1, m",
    ),
    mask_gradient(
        "columns of the mask past the end are stored", "bounds",
        fragment="(column < d_mask.keys)[None, :]", replacement="(column <= d_mask.keys)[None, :]",
    ),
    key_gradient(
        "keys beyond a length keep what memory holds", "lengths",
        fragment='in_n = n < sequence.key_rows', replacement='in_n = n < sequence.keys',
    ),
    mask_gradient(
        "the mask's gradient reads keys beyond a length", "lengths",
        fragment='inputs, n_first, sequence.keys, TILE', replacement='inputs, n_first, sizes.keys, TILE',
    ),
]  # fmt: skip
