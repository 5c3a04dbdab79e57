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
        fragment="d_scores = probs * (d_probs - delta[:, None])", replacement="d_scores = probs * d_probs",
    ),
    key_gradient(
        "delta is left out of dk", "saved statistics",
        fragment="d_scores = probs * (d_probs - delta[None, :])", replacement="d_scores = probs * d_probs",
    ),
    query_gradient(
        "the gradient of the LSE is ignored", "saved statistics",
        fragment="d_lse = LOG2E * tl.load(d_lse2_ptr", replacement="d_lse = 0 * tl.load(d_lse2_ptr",
    ),
    query_gradient(
        "the gradient of the LSE has the wrong sign", "saved statistics",
        fragment="d_lse = LOG2E * tl.load(d_lse2_ptr", replacement="d_lse = -LOG2E * tl.load(d_lse2_ptr",
    ),
    query_gradient(
        "fp32 delta keeps its drift", "saved statistics",
        fragment="tl.store(delta_ptr + rows_offset + m, delta + drift, mask=in_m)",
        replacement="tl.store(delta_ptr + rows_offset + m, delta, mask=in_m)",
    ),
    query_gradient(
        "fp32 dq keeps the drift of delta", "saved statistics",
        fragment="(dq - drift[:, None] * weighted_k) * inverse", replacement="dq * inverse",
    ),
    key_gradient(
        "fp32 dk and dv keep the error of the rounded LSE", "saved statistics",
        fragment="probs *= tl.load(inverse_ptr + m, mask=m < hi, other=1.0)[None, :]", replacement="pass",
    ),
    query_gradient(
        "delta uses rows that see nothing", "masked-lane fill",
        fragment="lse2, live_m = load_lse2(lse2_ptr + rows_offset, m, in_m)",
        replacement="lse2, live_m = load_lse2(lse2_ptr + rows_offset, m, in_m)\n    live_m = in_m",
    ),
    query_gradient(
        "dq lacks the scale", "gradient factors",
        fragment="dq * scale, 0.0", replacement="dq, 0.0",
    ),
    key_gradient(
        "dk lacks the scale", "gradient factors",
        fragment="dk * scale, 0.0", replacement="dk, 0.0",
    ),
    key_gradient(
        "dk of padded keys is not cleared", "mask",
        fragment="dk = tl.where(keep_n[:, None], dk * scale, 0.0)", replacement="dk = dk * scale",
    ),
    key_gradient(
        "dv of padded keys is not cleared", "mask",
        fragment="dv = tl.where(keep_n[:, None], dv, 0.0)", replacement="dv = dv",
    ),
    key_gradient(
        "dk and dv of padded keys are not written", "coverage",
        fragment="dk_strides, in_n, HEAD_DIM", replacement="dk_strides, keep_n, HEAD_DIM",
    ),
    key_gradient(
        "keys past the end are stored", "bounds",
        fragment="in_n = n < keys", replacement="in_n = n <= keys",
    ),
    query_gradient(
        "dq rows past the end are stored", "bounds",
        fragment="in_m = m < rows", replacement="in_m = m <= rows",
    ),
    key_gradient(
        "the last partial tile of keys is skipped", "bounds",
        fragment="call.grid(call.max_k, config.block_n, call.kv_heads)",
        replacement="call.grid(call.max_k // config.block_n, 1, call.kv_heads)",
    ),
    key_gradient(
        "rows past the range give their tail to dk and dv", "masked-lane fill",
        fragment="load_lse2(lse2_ptr, m, m < hi)", replacement="load_lse2(lse2_ptr, m, m <= hi)",
    ),
    key_gradient(
        "only the first query head of a group gives to dk and dv", "ownership",
        fragment="for g in range(GROUP):", replacement="for g in range(1):",
    ),
    key_gradient(
        "query heads of a group are found in turn", "ownership",
        fragment="h = kv_h * GROUP + g", replacement="h = g * kv_heads + kv_h",
    ),
    query_gradient(
        "the incoming gradient is read by the strides of the query", "incoming gradient",
        fragment="d_out = load_tile(d_out_ptr, m_first, d_out_strides,", replacement="d_out = load_tile(d_out_ptr, m_first, q_strides,",
    ),
    key_gradient(
        "dk and dv read the incoming gradient as contiguous", "incoming gradient",
        fragment="d_out_head = d_out_ptr + head_offset(d_out_strides,", replacement="d_out_head = d_out_ptr + head_offset(q_strides,",
    ),
    query_gradient(
        "edge tiles of dq are not masked", "mask",
        fragment="load_keep_n(mask_ptr, mask_stride_n, n, stop) if MASKED else None", replacement="None",
    ),
    key_gradient(
        "dk and dv take LSE and delta for each other", "saved statistics",
        fragment="tl.join(lse2_ptr + m, delta_ptr + m)", replacement="tl.join(delta_ptr + m, lse2_ptr + m)",
    ),
    key_gradient(
        "dk and dv ignore the window", "window",
        fragment="if MASKED and (window_left is not None or window_right is not None):", replacement="if False:",
    ),
    key_gradient(
        "the window's sides are not swapped for keys", "window",
        fragment="row_stop, ragged, window_right, window_left, BLOCK_M", replacement="row_stop, ragged, window_left, window_right, BLOCK_M",
    ),
    key_gradient(
        "dk and dv skip the edge rows on the right", "window",
        fragment="full_hi, hi, n, in_n, scale2", replacement="full_hi, full_hi, n, in_n, scale2",
    ),
    key_gradient(
        "dk and dv treat a tile with dead rows as full", "mask",
        fragment="ragged = first, stop, ragged | holes", replacement="ragged = first, stop, ragged",
    ),
    query_gradient(
        "dq is not undropped", "dropout",
        fragment="kept = dropout_keep(stream, m[:, None], n[None, :], dropout_p)",
        replacement="kept = dropout_keep(stream + 1, m[:, None], n[None, :], dropout_p)",
    ),
    key_gradient(
        "dk and dv drop by another mask", "dropout",
        fragment="kept = dropout_keep(stream, m[None, :], n[:, None], dropout_p)",
        replacement="kept = dropout_keep(stream, n[:, None], m[None, :], dropout_p)",
    ),
    key_gradient(
        "dv uses weights that were dropped", "dropout",
        fragment="dropped.to(d_out.dtype)", replacement="probs.to(d_out.dtype)",
    ),
    key_gradient(
        "dk and dv take head 0's dropout mask", "dropout",
        fragment="dropout_stream(seed_ptr, (b * heads + h).to(tl.int32))",
        replacement="dropout_stream(seed_ptr, (b * heads).to(tl.int32))",
    ),
    key_gradient(
        "dv is added to, not stored", "accumulation",
        fragment="    store_tile(dv_ptr, dv, n_first, dv_strides, in_n,",
        replacement="    dv += load_tile(dv_ptr, n_first, dv_strides, in_n, HEAD_DIM, BLOCK_N, BLOCK_D, ALIGN).to(tl.float32)\n"
        "    store_tile(dv_ptr, dv, n_first, dv_strides, in_n,",
    ),
    query_gradient(
        "delta is stored without its head", "addressing",
        fragment="rows_offset = b * lse2_strides[0] + h * lse2_strides[1] + q_start",
        replacement="rows_offset = b * lse2_strides[0] + q_start",
    ),
    key_gradient(
        "delta is read without its head", "addressing",
        fragment="rows_offset = b * lse2_strides[0] + h * lse2_strides[1] + q_start",
        replacement="rows_offset = b * lse2_strides[0] + q_start",
    ),
    query_gradient(
        "batch and head are 32 bits wide for dq", "offset width",
        fragment="b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)", replacement="b, h = bh // heads, bh % heads",
    ),
    key_gradient(
        "the key head is 32 bits wide for dk and dv", "offset width",
        fragment="kv_h = (tl.program_id(0) % kv_heads).to(tl.int64)", replacement="kv_h = tl.program_id(0) % kv_heads",
    ),
    backward(
        "an empty batch of queries leaves dk unwritten", "coverage",
        fragment="for grad in (dk, dv) if", replacement="for grad in (dv,) if",
    ),
    mask_gradient(
        "the mask's gradient takes only one sequence", "ownership",
        fragment="b_stop = tl.where(mask_batch == sequences, mask_b + 1, sequences)", replacement="b_stop = mask_b + 1",
    ),
    mask_gradient(
        "the mask's gradient takes only one head", "ownership",
        fragment="h_stop = tl.where(mask_heads == heads, mask_h + 1, heads)", replacement="h_stop = mask_h + 1",
    ),
    mask_gradient(
        "the mask's gradient takes only one tile of rows", "ownership",
        fragment="m_stop = tl.where(mask_rows == num_queries, tile_m * BLOCK_M + 1, num_queries)",
        replacement="m_stop = tile_m * BLOCK_M + 1",
    ),
    mask_gradient(
        "the mask's gradient is not summed over keys", "ownership",
        fragment="if mask_keys != num_keys:", replacement="if False:",
    ),
    mask_gradient(
        "the mask's gradient lacks delta", "saved statistics",
        fragment="* (d_probs - delta[:, None])", replacement="* d_probs",
    ),
    mask_gradient(
        "the mask's gradient keeps the error of the rounded LSE", "saved statistics",
        fragment="probs *= inverse[:, None]", replacement="pass",
    ),
    mask_gradient(
        "the mask's gradient ignores the window", "window",
        fragment="scores = hide(scores, in_window(keep, m[:, None], n[None, :], window_left, window_right))",
        replacement="scores = hide(scores, keep)",
    ),
    mask_gradient(
        "the mask's gradient reads the padding of sequence 0", "addressing",
        fragment="padding = mask_ptr + b * mask_strides[0]", replacement="padding = mask_ptr",
    ),
    mask_gradient(
        "the mask's gradient is undropped by another mask", "dropout",
        fragment="dropout_stream(seed_ptr, (b * heads + h).to(tl.int32))",
        replacement="dropout_stream(seed_ptr, (b + h).to(tl.int32))",
    ),
    mask_gradient(
        "columns of the mask past the end are stored", "bounds",
        fragment="(column < mask_keys)[None, :]", replacement="(column <= mask_keys)[None, :]",
    ),
]  # fmt: skip
