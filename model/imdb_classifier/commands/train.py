"""imdb-train: train the review classifier, watch it, and keep its best and last checkpoint."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imdb_classifier.commands import cli
from imdb_classifier.messages import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from imdb_classifier.data.splits import Reviews
    from imdb_classifier.training.loop import Run

# They decide a run's result, so a resumed run must repeat them; how it is computed may change.
DECIDING_OPTIONS = (
    "dataset",
    "text_column",
    "label_column",
    "limit",
    "tokenizer",
    "vocabulary_size",
    "max_length",
    "preset",
    "batch_size",
    "learning_rate",
    "seed",
    "group_by_length",
    "precision",
)


def build_parser() -> argparse.ArgumentParser:
    parser = cli.OneLineParser(prog="imdb-train", description=__doc__)
    # One review would be of one class.
    cli.add_data_options(parser, limit=cli.at_least_two)
    parser.add_argument(
        "--tokenizer",
        default=cli.DEFAULT_TOKENIZER,
        metavar="NAME",
        help="a Hub id, a local folder, or train: a WordPiece vocabulary from the training texts (default: %(default)s)",
    )
    parser.add_argument(
        "--vocabulary-size",
        type=cli.vocabulary_size,
        default=8_000,
        help="for --tokenizer train (default: %(default)s)",
    )
    parser.add_argument(
        "--max-length",
        type=cli.token_count,
        default=400,
        help="cut reviews here, in tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--preset", choices=cli.PRESET_CHOICES, default="notebook", help="model sizes (default: %(default)s)"
    )
    parser.add_argument(
        "--epochs",
        type=cli.positive,
        default=3,
        help="passes over the training reviews (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=cli.positive,
        default=64,
        help="reviews a step, over all processes (default: %(default)s)",
    )
    parser.add_argument(
        "--learning-rate", type=cli.learning_rate, default=1e-3, help="of Adam (default: %(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=cli.non_negative,
        default=0,
        help="fixes weights, batches and dropout (default: %(default)s)",
    )
    parser.add_argument(
        "--group-by-length",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="batches of like lengths, in random order: less padding (default: on)",
    )
    parser.add_argument(
        "--train-accuracy",
        choices=("running", "pass"),
        default="running",
        help="running: over the epoch's own batches, while learning; pass: one more pass at its end, as the "
        "notebook does (default: %(default)s)",
    )
    cli.add_compute_options(parser)
    parser.add_argument(
        "--workers",
        type=cli.non_negative,
        default=0,
        help="processes that make batches (default: %(default)s)",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=cli.DEFAULT_OUTPUT_DIR,
        help="the run's folder (default: %(default)s)",
    )
    parser.add_argument(
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
    from imdb_classifier.checkpoints import run_folder

    run_folder.check_folder(options.output_dir, options.resume, options.overwrite)
    # Data first: its faults are told before torch and transformers take their seconds to load.
    from imdb_classifier.data.rows import Reading
    from imdb_classifier.data.splits import load_reviews

    reading = Reading(options.text_column, options.label_column, options.strict_data)
    reviews = load_reviews(options.dataset, options.limit, reading)
    from imdb_classifier.training.inference import make_accelerator

    accelerator = make_accelerator(options.precision, options.cpu)
    if not accelerator.is_main_process:
        return run_and_report(options, reviews, accelerator)
    with run_folder.locked(options.output_dir):
        # Again, since another run may have come and gone before the lock.
        run_folder.check_folder(options.output_dir, options.resume, options.overwrite)
        return run_and_report(options, reviews, accelerator)


def run_and_report(options: argparse.Namespace, reviews: "Reviews", accelerator: "Accelerator") -> int:
    from imdb_classifier.checkpoints import run_folder
    from imdb_classifier.training.loop import fit
    from imdb_classifier.training.reporting import Reporter

    run = assemble(options, reviews, accelerator)
    if options.overwrite and accelerator.is_main_process:
        # Only now, when nothing is left that could refuse the new run.
        run_folder.clear(options.output_dir)
    run.reporter = Reporter(options.output_dir, accelerator.is_main_process, run.state.position)
    introduce(run, reviews)
    try:
        state = fit(run)
    finally:
        run.reporter.close()
    run.reporter.say(f"attention that ran: {run.attention}")
    if (best := state.best_record) is not None:
        run.reporter.say(
            f"chosen on validation: epoch {best['number']}, validation accuracy "
            f"{best['validation_accuracy']:.4f}, test accuracy {best['test_accuracy']:.4f}"
        )
        run.reporter.say(f"best checkpoint: {options.output_dir / 'best'}")
    return 0


def assemble(options: argparse.Namespace, reviews: "Reviews", accelerator: "Accelerator") -> "Run":
    """Build model, optimizer and data, fresh or from the newest intact checkpoint."""
    import torch

    from imdb_classifier.checkpoints import checkpoint, run_folder, weights
    from imdb_classifier.data.batches import tokenize
    from imdb_classifier.training import guards, inference, loop
    from imdb_classifier.training.signals import StopRequest

    attention, reason = inference.resolve_attention(options.attention, accelerator, options.precision)
    settings = deciding_settings(options, reviews, accelerator)
    resumed_from = None
    if options.resume:
        with accelerator.main_process_first():
            if accelerator.is_main_process:
                run_folder.adopt_copies(options.output_dir)
            resumed_from = checkpoint.newest_intact(options.output_dir)
    torch.manual_seed(options.seed)
    if resumed_from is None:
        model, tokenizer = new_classifier(options, reviews, attention)
    else:
        check_settings(resumed_from, settings)
        model, tokenizer = weights.load_classifier(resumed_from, attention, check=False)
    with accelerator.main_process_first():
        data = {
            name: tokenize(reviews.split(name), tokenizer, options.max_length, options.cache_dir)
            for name in ("train", "validation", "test")
        }
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    prepared_model, prepared_optimizer = accelerator.prepare(model, optimizer)
    guards.check_optimizer(prepared_model, prepared_optimizer)
    # From here each process draws its own dropout.
    torch.manual_seed(options.seed + accelerator.process_index)
    run = loop.Run(
        folder=options.output_dir,
        options=options,
        settings=settings,
        attention=f"{attention} ({reason})",
        accelerator=accelerator,
        model=prepared_model,
        optimizer=prepared_optimizer,
        tokenizer=tokenizer,
        data=data,
        stop=StopRequest(),
    )
    if resumed_from is not None:
        loop.restore(run, resumed_from)
    return run


def new_classifier(options: argparse.Namespace, reviews: "Reviews", attention: str) -> tuple[Any, Any]:
    from imdb_classifier.configuration import PRESETS, TextClassifierConfig
    from imdb_classifier.data.tokenization import TRAIN, count_ids, load_tokenizer, train_tokenizer
    from imdb_classifier.modeling import TextClassifier

    if options.tokenizer == TRAIN:
        tokenizer = train_tokenizer(reviews.train.texts, options.vocabulary_size, options.max_length)
    else:
        tokenizer = load_tokenizer(options.tokenizer, options.max_length)
    config = TextClassifierConfig(
        **PRESETS[options.preset],
        vocab_size=count_ids(tokenizer),
        max_length=options.max_length,
        pad_token_id=tokenizer.pad_token_id,
    )
    return TextClassifier._from_config(config, attn_implementation=attention), tokenizer


def deciding_settings(
    options: argparse.Namespace, reviews: "Reviews", accelerator: "Accelerator"
) -> dict[str, Any]:
    return {name: getattr(options, name) for name in DECIDING_OPTIONS} | {
        "data_sha256": reviews.fingerprint(),
        # Each process draws its own dropout.
        "processes": accelerator.num_processes,
    }


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raise UserError unless the checkpoint's run was started with the same settings."""
    from imdb_classifier.checkpoints.checkpoint import STATE_FILE, other_version, read_json

    before = read_json(folder / STATE_FILE).get("settings")
    if isinstance(before, dict):
        # Older runs could not choose.
        before = {"text_column": None, "label_column": None} | before
    if not isinstance(before, dict) or before.keys() != settings.keys():
        raise other_version(folder)
    no_options = {"data_sha256": "the data", "processes": "the number of processes"}
    for name, value in settings.items():
        # The same data may have moved.
        if name != "dataset" and before[name] != value:
            option = no_options.get(name, f"--{name.replace('_', '-')}")
            raise UserError(
                f"cannot resume: {option} was {before[name]}, now is {value}; repeat the run's own command"
            )


def introduce(run: "Run", reviews: "Reviews") -> None:
    say = run.reporter.say
    for note in reviews.notes:
        say(f"data: {note}")
    sizes = ", ".join(f"{len(run.data[name]):,} {name}" for name in ("train", "validation", "test"))
    say(
        f"reviews: {sizes}; cut at {run.options.max_length} tokens, {run.bare_model.config.vocab_size:,} token ids"
    )
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    accelerator = run.accelerator
    say(
        f"model: {run.options.preset}, {parameters:,} parameters, {run.options.precision} on {accelerator.device}, "
        f"{accelerator.num_processes} process(es)"
    )
    say(f"attention: {run.attention}")
    if run.options.resume:
        position = run.state.position
        say(f"resumed after {position.epoch} epochs and {position.batch} batches")


if __name__ == "__main__":
    sys.exit(main())
