"""imdb-predict: label and probability of reviews given as arguments, in a file, or on standard input."""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from imdb_classifier.checkpoints.run_folder import resolve
from imdb_classifier.commands import cli
from imdb_classifier.data.formats import decode
from imdb_classifier.data.rows import check_text
from imdb_classifier.messages import UserError, warn


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
    what = "a text file with one review a line; blank lines are skipped with a warning"
    option("--file", type=Path, help=what)
    option("--batch-size", type=cli.positive, default=64, help="reviews at a time")
    cli.add_compute_options(parser)
    what = "print one JSON object a review, with its line, or its place among the arguments"
    option("--json", action="store_true", help=what)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return cli.run_command(build_parser(), predict, argv)


def read_texts(options: argparse.Namespace) -> dict[int, str]:
    """The reviews from the one place that was named, by line or by place among the arguments, both from 1.

    Raises UserError where two places or none were named, or a line is not a review.
    """
    if options.texts and options.file:
        raise UserError("reviews are given both as arguments and by --file, expected one of them")
    if options.texts:
        where, texts = "argument ", dict(enumerate(options.texts, start=1))
        for number, text in texts.items():
            if not text.strip():
                raise UserError(f"argument {number}: text is empty, expected a review")
    else:
        if options.file is None and sys.stdin.isatty():
            raise UserError("no review given, expected TEXT, --file or reviews on standard input")
        name = "standard input" if options.file is None else str(options.file)
        raw = sys.stdin.buffer.read() if options.file is None else options.file.read_bytes()
        where, texts = f"{name}:", read_lines(name, raw)
    for number, text in texts.items():
        check_text(f"{where}{number}", text)
    return texts


def read_lines(name: str, raw: bytes) -> dict[int, str]:
    """Line number and text of every line that is not blank, with a warning where answers will have a gap."""
    lines = enumerate(decode(name, raw).split("\n"), start=1)
    texts = {number: line.removesuffix("\r") for number, line in lines if line.strip()}
    if not texts:
        raise UserError(f"{name}: is empty, expected one review a line")
    # Blank lines at the end are no gap.
    blank = sorted(set(range(1, max(texts))) - texts.keys())
    if blank:
        skipped = f"blank lines skipped: {len(blank):,}, the first is line {blank[0]}"
        warn(f"{name}: {skipped}; --json numbers the answers")
    return texts


def predict(options: argparse.Namespace) -> int:
    numbered = read_texts(options)
    texts = list(numbered.values())
    folder = resolve(options.checkpoint)
    # Only now: the faults above are told before torch and transformers take their seconds to load.
    from imdb_classifier.checkpoints.weights import load_classifier
    from imdb_classifier.configuration import LABELS
    from imdb_classifier.data.batches import TokenizedReviews
    from imdb_classifier.data.tokenization import encode
    from imdb_classifier.training import inference
    from imdb_classifier.training.launcher import make_accelerator
    from imdb_classifier.training.reporting import progress_of

    accelerator = make_accelerator(options.precision, options.cpu)
    attention, reason = inference.resolve_attention(options.attention, accelerator, options.precision)
    model, tokenizer = load_classifier(folder, attention)
    token_ids = encode(tokenizer, texts, model.config.max_length)
    data = TokenizedReviews.from_lists(token_ids, [0] * len(texts))
    with progress_of("predict", len(texts), accelerator.is_main_process) as progress:
        model, batch_size = accelerator.prepare(model), options.batch_size
        result = inference.evaluate(
            model, data, accelerator, batch_size=batch_size, after_batch=progress.after_batch
        )
    if not accelerator.is_main_process:
        return 0
    if not options.json:
        print(f"attention: {attention} ({reason})", file=sys.stderr)
    logits, probabilities = result.z.tolist(), result.z.sigmoid().tolist()
    for (line, text), logit, positive in zip(numbered.items(), logits, probabilities, strict=True):
        label, probability = LABELS[int(logit > 0)], max(positive, 1 - positive)
        if options.json:
            record = {"line": line, "label": label, "probability": probability, "logit": logit, "text": text}
            print(json.dumps(record))
        else:
            print(f"{label}\t{probability:.4f}\t{one_line(text)}")
    return 0


def one_line(text: str) -> str:
    """The beginning of a review for a table: control characters and backslashes as Python escapes them."""
    shown = text if len(text) <= 80 else text[:77] + "..."
    return "".join(
        letter if letter.isprintable() and letter != "\\" else letter.encode("unicode_escape").decode()
        for letter in shown
    )


if __name__ == "__main__":
    sys.exit(main())
