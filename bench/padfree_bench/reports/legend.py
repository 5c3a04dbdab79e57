"""What the names on the page mean."""

from html import escape

TERMS = {
    "B, H, D, S": "batch, heads, size of a head (head_dim), padded length in tokens: B16-H12-D64-S400 is [16, 12, 400, 64]",
    "imdb": "lengths as IMDB reviews have them, cut at S; the rest of each row is padding",
    "scaled": "the same lengths, cut at 400 and stretched to S, so that the share of padding stays while S grows",
    "full, pad50": "no padding; 50 % padding, and so on from pad00 to pad90",
    "fp32, fp16, bf16": "what a number is stored as",
    "notebook, d128, d768, bert-base": "a whole model of that name or width; 8-batches is what one repetition trains on",
    "forward, backward, both": "the output; the gradients from it; both in one call, as in training",
    "inference, training, step": "a whole model's forward; its forward and backward; both and the optimizer",
    "ms, median [p20, p80]": "a fifth of the repetitions were faster than the first in brackets, a fifth slower than the second",
    "as CUDA graph, host µs": "the same call replayed without the host; what the host needs to issue it",
    "useful": "work on real tokens only: what is spent on padding earns nothing",
    "of the roofline": "what the slowest of bytes, matrix units and exp2 (named) needs at least, over the time taken",
    "peak, extra MiB": "the most the call held beyond its inputs; extra is that less the output and the gradients",
    "padfree-skip, -qkv": "rows at padding left uncomputed; and all three inputs in one buffer",
    "-varlen, +pack": "packed input without padding; packing and unpacking inside the time",
    "-nomask": "the padding is ignored: right only where there is none, else an upper bound",
    "+cls, ours": "the last layer for the first token only; and batches grouped by length",
    "upper bound": "a wrong answer, in italics: how fast it could be without the mask, never a winner",
    "FAULT": "faster than this machine can be: the figure is not believed and counts nowhere",
    "not run": "no figure: not installed, refused, out of memory or a wrong answer; the reason stands in the conclusion",
    "not reached": "the time given to the run ended before this case",
    "(second wave), (again)": "timed once more: beside what compiles for every shape; to see whether it repeats",
}


def legend() -> str:
    entries = "".join(
        f"<div><dt>{escape(term)}</dt><dd>{escape(said)}</dd></div>" for term, said in TERMS.items()
    )
    return f"<section id='legend'><h2>What the names mean</h2><dl>{entries}</dl></section>"
