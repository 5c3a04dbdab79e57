"""imdb-predict: label and probability of reviews given as arguments, in a file, or on standard input."""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from imdb_classifier.checkpoints.run_folder import resolve
from imdb_classifier.commands import cli
from imdb_classifier.data.formats import decode_lines
from imdb_classifier.data.rows import check_text
from imdb_classifier.messages import UserError, warn

if TYPE_CHECKING:
    from imdb_classifier.training.classifier import Prediction


class ReviewParser(cli.OneLineParser):
    """A parser that takes a review with a dash in front for an option, and says how to give it."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else args
        for word in itertools.takewhile(lambda word: word != "--", words):
            # Newer Pythons read -horrible as -h.
            if word.startswith("-h") and word != "-h":
                self.error(f"unrecognized arguments: {word}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        if message.startswith(("unrecognized", "ambiguous")):
            message += "; put -- before a review that starts with a dash"
        super().error(message)


def build_parser() -> argparse.ArgumentParser:
    parser = ReviewParser(prog="imdb-predict", description=__doc__)
    option = parser.add_argument
    option(
        "texts",
        nargs="*",
        metavar="TEXT",
        help="a review, behind -- if it starts with a dash; without any, --file or standard input is read",
    )
    cli.add_checkpoint_option(parser)
    what = (
        "a text file with one review a line, of any length, a pipe too; blank lines are skipped with a warning. "
        "Reviews are read, computed and answered 32 batches at a time"
    )
    option("--file", type=Path, help=what)
    option("--batch-size", type=cli.batch_size, default=64, help="reviews at a time")
    cli.add_compute_options(parser)
    what = "print one JSON object a review, with its line, or its place among the arguments"
    option("--json", action="store_true", help=what)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return cli.run_command(build_parser(), predict, argv)


def read_reviews(options: argparse.Namespace) -> Iterator[tuple[int, str]]:
    """The reviews from the one place that was named, by line or by place among the arguments, both from 1.

    A file and standard input are read as far as is asked for. Raises UserError where two places or none were named, or
    a line is not a review.
    """
    if options.texts and options.file:
        raise UserError("reviews are given both as arguments and by --file, expected one of them")
    if options.texts:
        yield from check_arguments(options.texts)
    elif options.file is not None:
        with options.file.open("rb") as file:
            if not options.file.is_file():
                refuse_processes(str(options.file))
            yield from read_lines(str(options.file), file)
    elif sys.stdin.isatty():
        raise UserError("no review given, expected TEXT, --file or reviews on standard input")
    else:
        refuse_processes("standard input")
        yield from read_lines("standard input", sys.stdin.buffer)


def refuse_processes(name: str) -> None:
    """Raise UserError in one of several processes: what they read from one pipe, each would have in part."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise UserError(f"{name}: several processes cannot share it, expected --file with a regular file")


def check_arguments(texts: Sequence[str]) -> list[tuple[int, str]]:
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise UserError(f"argument {number}: text is empty, expected a review")
        check_text(f"argument {number}", text)
    return list(enumerate(texts, start=1))


def read_lines(name: str, file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Line number and text of every line that is not blank, with a warning at the end if the answers have a gap."""
    last, blank, first_blank = 0, 0, 0
    for number, line in enumerate(decode_lines(name, file), start=1):
        text = line.removesuffix("\r")
        if not text.strip():
            continue
        check_text(f"{name}:{number}", text)
        if number > last + 1:
            blank += number - last - 1
            first_blank = first_blank or last + 1
        last = number
        yield number, text
    if not last:
        raise UserError(f"{name}: is empty, expected one review a line")
    # Blank lines at the end are no gap.
    if blank:
        skipped = f"blank lines skipped: {blank:,}, the first is line {first_blank}"
        warn(f"{name}: {skipped}; --json numbers the answers")


def predict(options: argparse.Namespace) -> int:
    reviews = read_reviews(options)
    first = next(reviews)
    folder = resolve(options.checkpoint)
    # Only now: the faults above are told before torch and transformers take their seconds to load.
    from imdb_classifier.training.classifier import Classifier
    from imdb_classifier.training.inference import say_graphs
    from imdb_classifier.training.reporting import progress_of

    classifier = Classifier.load(
        folder,
        attention=options.attention,
        precision=options.precision,
        batch_size=options.batch_size,
        device="cpu" if options.cpu else None,
        compiled=options.compile,
    )
    is_main = classifier.accelerator.is_main_process
    # Of the two, `read` is the one behind, by a window at most.
    read, ahead = itertools.tee(itertools.chain([first], reviews))
    with progress_of("predict", len(options.texts) or None, is_main) as progress:
        # A warning from the reading stands on a line of its own.
        progress.hide()
        answers = classifier.stream((text for _, text in ahead), progress.after_batch)
        for (number, text), answer in zip(read, answers, strict=True):
            if not is_main:
                continue
            progress.hide()
            if number == first[0] and not options.json:
                print(f"attention: {classifier.attention} ({classifier.reason})", file=sys.stderr)
            show = as_json if options.json else as_row
            # Whoever reads the answers has each before the next window is waited for.
            print(show(number, text, answer), flush=True)
    if is_main and not options.json and (graphs := say_graphs(options.compile)) is not None:
        print(graphs, file=sys.stderr)
    return 0


def as_json(number: int, text: str, answer: "Prediction") -> str:
    return json.dumps({"line": number, **answer._asdict(), "text": text})


def as_row(number: int, text: str, answer: "Prediction") -> str:
    return f"{answer.label}\t{answer.probability:.4f}\t{one_line(text)}"


def one_line(text: str) -> str:
    """The beginning of a review for a table: control characters and backslashes as Python escapes them."""
    shown = text if len(text) <= 80 else text[:77] + "..."
    return "".join(
        letter if letter.isprintable() and letter != "\\" else letter.encode("unicode_escape").decode()
        for letter in shown
    )


if __name__ == "__main__":
    sys.exit(main())
