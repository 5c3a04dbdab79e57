"""Faults of the host side: checks, strides, saved tensors, operators, packing."""

from functools import partial

from faults.fault import Fault

launch = partial(Fault, file="_triton/call.py")
op = partial(Fault, file="_triton/operators.py")
backward = partial(Fault, file="_triton/backward.py")
autograd = partial(Fault, file="_triton/autograd.py")
checks = partial(Fault, file="_checks.py")
arguments = partial(Fault, file="_arguments.py")
packed = partial(Fault, file="packed.py")
api = partial(Fault, file="api.py")
dispatch = partial(Fault, file="_dispatch.py")

FAULTS = [
    launch(
        "the scale is hard-coded", "constants",
        fragment='scale2=self.scale * LOG2E', replacement='scale2=0.25 * LOG2E',
    ),
    launch(
        "log2(e) is cut to four digits on the host", "constants",
        fragment="LOG2E = math.log2(math.e)", replacement="LOG2E = 1.4427",
    ),
    launch(
        "fp32 is rounded to TF32", "precision",
        fragment='has_tf32x3(head_dim, device) else "ieee"', replacement='has_tf32x3(head_dim, device) else "tf32"',
    ),
    launch(
        "TF32 is never used, though allowed", "precision",
        fragment='return "tf32" if asked == "tf32" else "ieee"', replacement='return "ieee"',
    ),
    launch(
        "IEEE products are asked for and not taken", "precision",
        fragment='return "tf32" if asked == "tf32" else "ieee"', replacement='return "tf32" if asked == "tf32" else "tf32x3"',
    ),
    launch(
        "fp32 is multiplied by IEEE products on every GPU", "precision",
        fragment='return "tf32x3" if has_tf32x3(head_dim, device) else "ieee"', replacement='return "ieee"',
    ),
    launch(
        "a broadcast attn_mask keeps its own strides", "strides",
        fragment="self.attn_mask.expand(*self.query.shape[:3], self.key.shape[2])", replacement="self.attn_mask.contiguous()",
    ),
    launch(
        "keys are read by the strides of the query", "strides",
        fragment='k=self.view(self.key)', replacement='k=View(self.key, self.view(self.query).strides)',
    ),
    launch(
        "the mask's strides are those of a contiguous one", "strides",
        fragment="self.padding.stride())", replacement="self.padding.contiguous().stride())",
    ),
    launch(
        "packed sequences are found by a batch stride", "packing",
        fragment="else (0, *strides[1:])", replacement="else strides",
    ),
    launch(
        "any row counts as aligned", "strides",
        fragment="return all(stride % 8 == 0", replacement="return all(stride % 1 == 0",
    ),
    launch(
        "a window open on the left is closed", "window",
        fragment="return None if side == OPEN else min(", replacement="return 0 if side == OPEN else min(",
    ),
    launch(
        "an output is laid out with heads first", "layout",
        fragment="return like.new_empty_strided(like.shape, strides)", replacement="return like.new_empty(like.shape)",
    ),
    launch(
        "skipping queries is never asked for", "mask",
        fragment='SKIP_QUERIES=self.skip_padded_queries and self.has_padding', replacement='SKIP_QUERIES=False',
    ),
    launch(
        "kernels launch for empty batches", "empty sizes",
        fragment="return self.batch == 0 or self.heads == 0 or self.max_q == 0 or self.query.shape[2] == 0", replacement="return False",
    ),
    autograd(
        "a negative scale is taken as positive", "scale",
        fragment="query * (-1.0 if options.scale else 0.0)", replacement="query",
    ),
    autograd(
        "the gradient of the LSE is dropped", "saved tensors",
        fragment="ops.backward(out, lse2, d_out, d_lse2,", replacement="ops.backward(out, lse2, d_out, None,",
    ),
    autograd(
        "a missing gradient of out is taken as ones", "saved tensors",
        fragment="d_out = torch.zeros_like(out)", replacement="d_out = torch.ones_like(out)", count=3,
    ),
    autograd(
        "the mask's gradient is computed only with the query's", "saved tensors",
        fragment="mask_needs = ctx.needs_input_grad[4]", replacement="mask_needs = ctx.needs_input_grad[4] and ctx.needs_input_grad[0]", count=2,
    ),
    autograd(
        "second derivatives are not refused", "wrapper",
        fragment="if torch.is_grad_enabled():", replacement="if False:",
    ),
    autograd(
        "backward draws a dropout seed of its own", "dropout",
        fragment="        mask_needs = ctx",
        replacement="        tensors[5] = None if tensors[5] is None else torch.randint(2**62, (1,), device=out.device)\n"
        "        mask_needs = ctx",
        count=2,
    ),
    autograd(
        "the dropout seed does not follow torch's generator", "dropout",
        fragment="return torch.randint(2**62, (1,), device=like.device)", replacement="return torch.full((1,), 7, device=like.device)",
    ),
    op(
        "the fused buffer's gradient is laid out wrongly", "packing",
        fragment="lse2, d_out, d_lse2, split_qkv(d_qkv))", replacement="lse2, d_out, d_lse2, split_qkv(d_qkv)[::-1])",
    ),
    backward(
        "grouped heads take the single query's kernel", "ownership",
        fragment="single = call.max_q == 1 and call.heads == call.kv_heads", replacement="single = call.max_q == 1",
    ),
    arguments(
        "key and value of a fused buffer are swapped", "packing",
        fragment="query, key, value = padded.permute(2, 0, 3, 1, 4).unbind(0)", replacement="query, value, key = padded.permute(2, 0, 3, 1, 4).unbind(0)",
    ),
    packed(
        "keys are packed by the queries' lengths", "packing",
        fragment="Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)", replacement="Packing(cu_seqlens_q, cu_seqlens_q, max_seqlen_q, max_seqlen_q)",
    ),
    arguments(
        "a [B, 1, 1, N] mask is read as that of one sequence", "wrapper",
        fragment="key_padding_mask[:, 0, 0]", replacement="key_padding_mask[:1, 0, 0].expand(len(key_padding_mask), -1)",
    ),
    checks(
        "float masks are accepted", "validation",
        fragment="if mask.dtype != torch.bool:", replacement="if False:",
    ),
    checks(
        "a value of another shape is accepted", "validation",
        fragment="if value.shape != key.shape:", replacement="if False:",
    ),
    checks(
        "an attn_mask that does not broadcast is accepted", "validation",
        fragment="any(s not in (1, f) for s, f", replacement="any(False for s, f",
    ),
    checks(
        "a NaN scale is accepted", "validation",
        fragment="if not (scale == 0 or SMALLEST_SCALE <= abs(scale) <= 1 / SMALLEST_SCALE):", replacement="if abs(scale) > 1 / SMALLEST_SCALE:",
    ),
    checks(
        "int64 cu_seqlens are accepted", "validation",
        fragment="if cu_seqlens.dtype != torch.int32:", replacement="if False:",
    ),
    dispatch(
        "an explicit impl='triton' falls back", "wrapper",
        fragment='raise RuntimeError(f"impl=\'triton\' cannot run: {reason}; or use impl=\'reference\'")', replacement='return "reference"',
    ),
    dispatch(
        "skip_padded_queries is not handed on", "wrapper",
        fragment="Options.of(call.query, scale, dropout_p, window, skip_padded_queries)", replacement="Options.of(call.query, scale, dropout_p, window, False)",
    ),
    launch(
        "lengths do not skip queries", "lengths",
        fragment='return self.padding is not None or self.key_lengths is not None', replacement='return self.padding is not None',
    ),
    autograd(
        "the backward scans the mask again", "lengths",
        fragment='found if found.shape[0] else spans, out', replacement='spans, out',
    ),
    checks(
        "key_lengths beside a mask are accepted", "validation",
        fragment='    if mask is not None:\n        raise ValueError("key_lengths', replacement='    if False:\n        raise ValueError("key_lengths',
    ),
    checks(
        "int64 key_lengths are accepted", "validation",
        fragment='if tensor.dtype != torch.int32:', replacement='if False:',
    ),
    arguments(
        "a key at its sequence's length is visible", "lengths",
        fragment='>= key_lengths[:, None]', replacement='> key_lengths[:, None]',
    ),
    api(
        "holes are not found on the host", "lengths",
        fragment='.sum(1, dtype=torch.int32) < stop - first', replacement='.sum(1, dtype=torch.int32) < 0',
    ),
    packed(
        "lengths of a fused buffer are not handed on", "lengths",
        fragment="run_qkvpacked(qkv, padding, key_lengths, ", replacement="run_qkvpacked(qkv, padding, None, ",
    ),
]  # fmt: skip
