"""`python -m padfree_bench.gpu_round.epochs padfree|sdpa`: two epochs of imdb-train on the reviews that came along.

The last line is what each epoch took and reached; the first of them also pays for what is loaded and compiled once.
"""

import json
import subprocess
import sys
from pathlib import Path

from padfree_bench.gpu_round.steps import CARRY, REHEARSE, ROOT, worker
from padfree_bench.measuring.processes import die_with_parent

KEPT = ("number", "train_seconds", "seconds", "loss", "validation_accuracy")


def command(how: str, folder: Path, rehearse: bool) -> list[str]:
    """In bf16 on a GPU; a rehearsal takes a few reviews and no kernel."""
    carried = ("--dataset", "reviews"), ("--tokenizer", "tokenizer"), ("--cache-dir", "tokens")
    attention = "--fused" if how == "padfree" and not rehearse else "--no-fused"
    size = ("--limit", "192") if rehearse else ("--precision", "bf16")
    return [
        *worker("imdb_classifier.commands.train"), *(word for option, name in carried for word in (option, str(CARRY / name))),
        "--output-dir", str(folder), "--overwrite", "--preset", "notebook", "--epochs", "2", attention, *size,
    ]  # fmt: skip


def main() -> int:
    how, rehearse = sys.argv[1], REHEARSE in sys.argv
    folder = ROOT / "runs" / f"round-{how}"
    status = subprocess.run(
        command(how, folder, rehearse), preexec_fn=die_with_parent, check=False
    ).returncode
    if status == 0:
        records = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
        ends = [record for record in records if "epoch/seconds" in record]
        print(
            json.dumps({"epochs": [{name: end[f"epoch/{name}"] for name in KEPT} for end in ends]}),
            flush=True,
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
