"""imdb-train: train the review classifier, watch it, and keep its best and last checkpoint."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from imdb_classifier.checkpoints import run_folder
from imdb_classifier.commands import cli
from imdb_classifier.data.rows import Reading
from imdb_classifier.data.splits import load_reviews
from imdb_classifier.messages import UserError

if TYPE_CHECKING:
    from imdb_classifier.training.run import Run


def build_parser() -> argparse.ArgumentParser:
    parser = cli.OneLineParser(prog="imdb-train", description=__doc__)
    # One review would be of one class.
    cli.add_data_options(parser, least=2)
    option = parser.add_argument
    option(
        "--tokenizer",
        default=cli.DEFAULT_TOKENIZER,
        metavar="NAME",
        help="a Hub id, a local folder, or train: a WordPiece vocabulary from the training texts",
    )
    option("--vocabulary-size", type=cli.vocabulary_size, default=8_000, help="for --tokenizer train")
    option("--max-length", type=cli.token_count, default=400, help="cut reviews here, in tokens")
    option("--preset", choices=cli.PRESET_CHOICES, default="notebook", help="model sizes")
    option("--epochs", type=cli.positive, default=3, help="passes over the training reviews")
    option("--batch-size", type=cli.batch_size, default=64, help="reviews a step, over all processes")
    option("--learning-rate", type=cli.learning_rate, default=1e-3, help="of Adam")
    option("--seed", type=cli.non_negative, default=0, help="fixes weights, batches and dropout")
    option(
        "--group-by-length",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="batches of like lengths, in random order: less padding (default: on)",
    )
    option(
        "--train-accuracy",
        choices=("running", "pass"),
        default="running",
        help="running: over the epoch's own batches, while learning; pass: one more pass at its end, as the "
        "notebook does",
    )
    cli.add_compute_options(parser)
    option(
        "--cuda-graphs",
        action="store_true",
        help="on a GPU, replay the whole training step as one CUDA graph for each of a few batch shapes",
    )
    option(
        "--workers",
        type=cli.non_negative,
        metavar="N",
        help="processes that make batches (default: 2 on a GPU, else 0)",
    )
    option("--output-dir", type=Path, default=cli.DEFAULT_OUTPUT_DIR, help="the run's folder")
    option(
        "--save-every",
        type=cli.positive,
        metavar="N",
        help="save every N steps too, not only after each epoch",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true", help="go on with the run in --output-dir, from its newest checkpoint"
    )
    existing.add_argument(
        "--overwrite", action="store_true", help="delete the run in --output-dir and start anew"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status (0, 2 bad input, 3 NaN or infinity, 130/143 stopped and saved)."""
    return cli.run_command(build_parser(), train, argv)


def train(options: argparse.Namespace) -> int:
    run_folder.check_folder(options.output_dir, options.resume, options.overwrite)
    reading = Reading(options.text_column, options.label_column, options.strict_data)
    reviews = load_reviews(options.dataset, options.limit, reading)
    # Only now: the faults above are told before torch and transformers take their seconds to load.
    from imdb_classifier.training.launcher import make_accelerator

    if options.compile and options.cuda_graphs:
        raise UserError("--compile and --cuda-graphs are two ways to launch less, expected one of them")
    accelerator = make_accelerator(options.precision, options.cpu, options.compile)
    is_main = accelerator.is_main_process
    with run_folder.locked(options.output_dir) if is_main else nullcontext():
        if is_main:
            # Again, since another run may have come and gone before the lock.
            run_folder.check_folder(options.output_dir, options.resume, options.overwrite)
        from imdb_classifier.training.setup import assemble

        run = assemble(options, reviews, accelerator)
        if options.overwrite and is_main:
            # Only now, when nothing is left that could refuse the new run.
            run_folder.clear(options.output_dir)
        fit_and_report(run, reviews.notes)
    return 0


def fit_and_report(run: "Run", notes: Sequence[str]) -> None:
    from imdb_classifier.training.graphs import GraphedStep
    from imdb_classifier.training.inference import say_graphs
    from imdb_classifier.training.loop import fit
    from imdb_classifier.training.reporting import Reporter

    run.reporter = Reporter(run.folder, run.accelerator.is_main_process, run.state.position)
    introduce(run, notes)
    try:
        fit(run)
    finally:
        run.reporter.close()
    run.reporter.say(f"attention that ran: {run.attention}")
    if (graphs := say_graphs(run.options.compile)) is not None:
        run.reporter.say(graphs)
    if isinstance(run.step, GraphedStep):
        run.reporter.say(f"CUDA graphs: {run.step.graphs}, for batches filled up to {run.buckets} lengths")
    if (best := run.state.best_record) is not None:
        run.reporter.say(
            f"chosen on validation: epoch {best['number']}, validation accuracy "
            f"{best['validation_accuracy']:.4f}, test accuracy {best['test_accuracy']:.4f}"
        )
        run.reporter.say(f"best checkpoint: {run.folder / 'best'}")


def introduce(run: "Run", notes: Sequence[str]) -> None:
    say, options, accelerator = run.reporter.say, run.options, run.accelerator
    for note in notes:
        say(f"data: {note}")
    sizes = ", ".join(f"{len(data):,} {name}" for name, data in run.data.items())
    ids = run.bare_model.config.vocab_size
    say(f"reviews: {sizes}; cut at {options.max_length} tokens, {ids:,} token ids")
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    say(
        f"model: {options.preset}, {parameters:,} parameters, {options.precision} on {accelerator.device}, "
        f"{accelerator.num_processes} process(es)"
    )
    say(f"attention: {run.attention}")
    if options.resume:
        position = run.state.position
        say(f"resumed after {position.epoch} epochs and {position.batch} batches")


if __name__ == "__main__":
    sys.exit(main())
