"""imdb-predict: label and probability of reviews given as arguments, in a file, or on standard input."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from imdb_classifier import cli
from imdb_classifier.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    parser = cli.OneLineParser(prog="imdb-predict", description=__doc__)
    parser.add_argument(
        "texts", nargs="*", metavar="TEXT", help="a review; without any, --file or standard input is read"
    )
    cli.add_checkpoint_option(parser)
    parser.add_argument("--file", type=Path, help="a text file with one review a line")
    parser.add_argument(
        "--batch-size", type=cli.positive, default=64, help="reviews at a time (default: %(default)s)"
    )
    cli.add_compute_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object a review")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return cli.run_command(build_parser(), predict, argv)


def read_texts(options: argparse.Namespace) -> list[str]:
    """The reviews, from the one place that was named.

    Raises:
        UserError: two places or none were named, or a line is not a review.
    """
    from imdb_classifier.sources import Split

    if options.texts and options.file:
        raise UserError("reviews are given both as arguments and by --file, expected one of them")
    if options.texts:
        named = [(f"argument {number}", text) for number, text in enumerate(options.texts, start=1)]
    else:
        if options.file is None and sys.stdin.isatty():
            raise UserError("no review given, expected TEXT, --file or reviews on standard input")
        name = "standard input" if options.file is None else str(options.file)
        raw = sys.stdin.buffer.read() if options.file is None else options.file.read_bytes()
        try:
            lines = raw.decode("utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            raise UserError(
                f"{name}:{line}: byte {raw[error.start]:#04x} is not UTF-8, expected UTF-8 text"
            ) from None
        # Blank lines at the end are no reviews; one in between is refused, since answers stand in the lines' order.
        while lines and not lines[-1].strip():
            lines.pop()
        named = [(f"{name}:{number}", line.removesuffix("\r")) for number, line in enumerate(lines, start=1)]
        if not named:
            raise UserError(f"{name}: is empty, expected one review a line")
    checked = Split()
    for where, text in named:
        checked.add(text, 0, where)
    return checked.texts


def predict(options: argparse.Namespace) -> int:
    from imdb_classifier.checkpoint import resolve

    texts = read_texts(options)
    folder = resolve(options.checkpoint)

    from imdb_classifier import inference, weights
    from imdb_classifier.configuration import LABELS
    from imdb_classifier.data import TokenizedReviews
    from imdb_classifier.reporting import progress_of
    from imdb_classifier.tokenization import encode

    accelerator = inference.make_accelerator(options.precision, options.cpu)
    attention, reason = inference.resolve_attention(options.attention, accelerator, options.precision)
    model, tokenizer = weights.load_classifier(folder, attention)
    token_ids = encode(tokenizer, texts, model.config.max_length)
    with progress_of("predict", len(texts), accelerator.is_main_process) as after_batch:
        z = inference.evaluate(
            accelerator.prepare(model),
            TokenizedReviews.from_lists(token_ids, [0] * len(texts)),
            accelerator,
            batch_size=options.batch_size,
            pad_token_id=model.config.pad_token_id,
            after_batch=after_batch,
        ).z
    if not accelerator.is_main_process:
        return 0
    if not options.json:
        print(f"attention: {attention} ({reason})", file=sys.stderr)
    for text, logit, positive in zip(texts, z.tolist(), z.sigmoid().tolist(), strict=True):
        label = LABELS[int(logit > 0)]
        probability = max(positive, 1 - positive)
        if options.json:
            print(json.dumps({"label": label, "probability": probability, "logit": logit, "text": text}))
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
