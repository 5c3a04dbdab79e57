"""Two epochs of imdb-train on the reviews that came along: fused (`padfree`), fused and captured (`graphs`), or `sdpa`.

The last line is what each epoch took and reached; the first of them also pays for what is loaded and compiled once.
"""

import json

from padfree_bench.gpu_round.steps import REHEARSE, ROOT, imdb_train, run

KEPT = ("number", "train_seconds", "seconds", "loss", "validation_accuracy")


def main(how: str, *flags: str) -> int:
    """In bf16 on a GPU; a rehearsal takes a few reviews and no kernel."""
    rehearse, folder = REHEARSE in flags, ROOT / "runs" / f"round-{how}"
    attention = ["--no-fused"] if how == "sdpa" or rehearse else ["--fused"]
    attention += ["--cuda-graphs"] if how == "graphs" and not rehearse else []
    size = ("--limit", "192") if rehearse else ("--precision", "bf16")
    status: int = run(imdb_train(folder, "--overwrite", "--epochs", "2", *attention, *size)).returncode
    if status == 0:
        records = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
        ends = [record for record in records if "epoch/seconds" in record]
        found = [{name: end[f"epoch/{name}"] for name in KEPT} for end in ends]
        print(json.dumps({"epochs": found}), flush=True)
    return status
