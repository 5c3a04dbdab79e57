"""Count the token lengths of a review file: python -m padfree_bench.measuring.make_lengths TRAIN.parquet TOKENIZER_DIR OUT.json.

Only the histogram leaves this script, never a text: {"provenance": ..., "lengths": [...], "counts": [...]}.
"""

import json
import sys
from collections import Counter
from pathlib import Path


def main(argv: list[str]) -> int:
    """Tokenize every text without a cut and write how often each length occurs."""
    if len(argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    from pyarrow import parquet
    from transformers import AutoTokenizer

    texts = parquet.read_table(argv[0], columns=["text"])["text"].to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(argv[1])
    chunks = (texts[start : start + 1000] for start in range(0, len(texts), 1000))
    counts = Counter(len(ids) for chunk in chunks for ids in tokenizer(chunk, verbose=False).input_ids)
    lengths, times = zip(*sorted(counts.items()), strict=True)
    provenance = (
        f"token lengths with [CLS] and [SEP], not cut, of the {len(texts):,} labelled training reviews of "
        "stanfordnlp/imdb (Maas et al. 2011) under the bert-base-uncased tokenizer; made by "
        "padfree_bench/make_lengths.py; holds no text"
    )
    content = {"provenance": provenance, "lengths": lengths, "counts": times}
    Path(argv[2]).write_text(json.dumps(content, separators=(",", ":")) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
