"""imdb-evaluate: accuracy and loss of a checkpoint on a split, with any attention."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from imdb_classifier.checkpoints.checkpoint import STATE_FILE, read_json
from imdb_classifier.checkpoints.run_folder import resolve
from imdb_classifier.commands import cli
from imdb_classifier.data.rows import Reading
from imdb_classifier.data.splits import load_split
from imdb_classifier.messages import UserError


def build_parser() -> argparse.ArgumentParser:
    parser = cli.OneLineParser(prog="imdb-evaluate", description=__doc__)
    cli.add_checkpoint_option(parser)
    cli.add_data_options(parser, default=None)
    option = parser.add_argument
    option(
        "--split",
        choices=("train", "validation", "test", "all"),
        default="test",
        help="which reviews; what files of your own lack is held out of their training reviews as imdb-train does, "
        "all takes every one",
    )
    option("--batch-size", type=cli.batch_size, default=64, help="reviews at a time")
    cli.add_compute_options(parser)
    option("--json", action="store_true", help="print the result as one JSON object")
    option("--logits", type=Path, metavar="FILE", help="write one JSON line per review: row, label, logit")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return cli.run_command(build_parser(), evaluate, argv)


def evaluate(options: argparse.Namespace) -> int:
    folder = resolve(options.checkpoint)
    source = source_of(folder) if options.dataset is None else Source(options.dataset)
    limit = options.limit
    # Without it the score would not be the one that training told; "all" is every review.
    if limit is None and options.split != "all":
        limit = source.limit
    columns = options.text_column or source.text_column, options.label_column or source.label_column
    reading = Reading(*columns, options.strict_data)
    split = load_split(source.names, options.split, limit, reading)
    # Only now: the faults above are told before torch and transformers take their seconds to load.
    from imdb_classifier.checkpoints.weights import load_classifier
    from imdb_classifier.data.batches import tokenize
    from imdb_classifier.training import inference
    from imdb_classifier.training.launcher import check_batch_size, make_accelerator
    from imdb_classifier.training.reporting import progress_of

    accelerator = make_accelerator(options.precision, options.cpu, options.compile)
    check_batch_size(options.batch_size, accelerator)
    attention, reason = inference.resolve_attention(options.attention, accelerator, options.precision)
    model, tokenizer = load_classifier(folder, attention)
    with accelerator.main_process_first():
        data = tokenize(split, tokenizer, model.config.max_length, options.cache_dir)
    began = time.monotonic()
    with progress_of(options.split, len(data), accelerator.is_main_process) as progress:
        result = inference.evaluate(
            accelerator.prepare(model),
            data,
            accelerator,
            batch_size=options.batch_size,
            workers=inference.workers_for(accelerator),
            buckets=inference.buckets_for(options.compile),
            after_batch=progress.after_batch,
        )
    seconds = time.monotonic() - began
    if not accelerator.is_main_process:
        return 0
    if options.logits is not None:
        rows = enumerate(zip(split.labels, result.z.tolist(), strict=True))
        lines = (json.dumps({"row": row, "label": label, "logit": z}) + "\n" for row, (label, z) in rows)
        options.logits.write_text("".join(lines), encoding="utf-8")
    summary = {
        "checkpoint": str(folder),
        "dataset": source.names,
        "split": options.split,
        "limit": limit,
        "reviews": len(split),
        "accuracy": result.accuracy,
        "loss": result.loss,
        "attention": attention,
        "attention_reason": reason,
        "precision": options.precision,
        "seconds": seconds,
    }
    if options.json:
        print(json.dumps(summary))
    else:
        for note in reading.notes:
            print(f"data: {note}")
        if (graphs := inference.say_graphs(options.compile)) is not None:
            print(graphs)
        say(summary, limit_is_the_runs=limit is not None and options.limit is None)
    return 0


def say(summary: dict[str, Any], limit_is_the_runs: bool) -> None:
    print("attention: {attention} ({attention_reason})".format(**summary))
    if limit_is_the_runs:
        choice = "--limit or --dataset chooses otherwise"
        print(f"data: --limit {summary['limit']} as in the run's training; {choice}")
    score = "accuracy {accuracy:.4f}, loss {loss:.4f}, {reviews:,} reviews, {seconds:.1f} s"
    print(("{split}: " + score).format(**summary))


class Source(NamedTuple):
    """What to read: a data set by its names, its columns where they were named, and how many reviews of a split."""

    names: list[str]
    text_column: str | None = None
    label_column: str | None = None
    limit: int | None = None


def source_of(folder: Path) -> Source:
    """What a checkpoint was trained on; UserError where it does not say."""
    file = folder / STATE_FILE
    if not file.exists():
        raise UserError(f"{folder}: does not say what it was trained on, pass --dataset")
    settings = read_json(file).get("settings")
    settings = settings if isinstance(settings, dict) else {}
    names, text, label, limit = map(settings.get, ("dataset", "text_column", "label_column", "limit"))
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise UserError(f"{file}: names no dataset, pass --dataset")
    if not all(column is None or isinstance(column, str) for column in (text, label)):
        raise UserError(f"{file}: names no columns, pass --dataset")
    if not (limit is None or type(limit) is int and limit > 0):
        raise UserError(f"{file}: the run's limit is {limit!r}, pass --limit or --dataset")
    return Source(names, text, label, limit)


if __name__ == "__main__":
    sys.exit(main())
