"""The commands as programs: `--help` is instant, and a package that is missing is one line."""

import json
import os
from pathlib import Path

import pytest

from tiny_reviews import make_rows, train_arguments, write_csv
from tiny_runs import run_python


@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_help_answers_without_loading_torch_or_transformers(command: str) -> None:
    program = (
        f"import sys; from imdb_classifier.commands.{command} import main; status = main(['--help'])\n"
        "sys.exit(status or any(name in sys.modules for name in ('torch', 'transformers', 'datasets', 'numpy')))"
    )
    before = sum(os.times()[2:4])
    shown = run_python("-c", program)
    # CPU time of the child, which other work on the machine does not use up; torch alone takes more
    assert sum(os.times()[2:4]) - before < 1
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"usage: imdb-{command}" in shown.stdout


@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_the_modules_run_as_programs_and_print_one_line_for_bad_input(command: str) -> None:
    shown = run_python("-m", f"imdb_classifier.commands.{command}", "--batch-size", "0")
    assert shown.returncode == 2
    assert shown.stdout == ""
    assert shown.stderr == (
        f"imdb-{command}: error: argument --batch-size: 0 is out of range, expected 1 or more "
        f"(see imdb-{command} --help)\n"
    )


# The commands of a process that cannot import datasets, one after the other until one fails.
WITHOUT_DATASETS = """
import importlib, json, sys
sys.modules["datasets"] = None
for command, arguments in json.loads(sys.argv[1]):
    if status := importlib.import_module("imdb_classifier.commands." + command).main(arguments):
        sys.exit(status)
"""


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_the_commands_need_no_package_datasets_for_a_file(suffix: str, tmp_path: Path) -> None:
    rows = make_rows(60, seed=1)
    file = tmp_path / f"train.{suffix}"
    if suffix == "csv":
        write_csv(file, rows)
    else:
        import pyarrow.parquet

        records = [{"text": text, "label": label} for text, label in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    run = tmp_path / "run"
    commands = [
        ("train", train_arguments(file, run, "--epochs", "1")),
        ("evaluate", ["--checkpoint", str(run), "--cache-dir", str(tmp_path / "cache"), "--json"]),
        ("predict", ["--checkpoint", str(run), "--json", "a good film"]),
    ]
    shown = run_python("-c", WITHOUT_DATASETS, json.dumps(commands))
    assert shown.returncode == 0, shown.stderr
    evaluated, predicted = map(json.loads, shown.stdout.splitlines()[-2:])
    assert (evaluated["reviews"], predicted["text"]) == (12, "a good film")
    # train, validation and test; the evaluation finds its split there
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize(
    ("absent", "named"),
    [
        (["accelerate", "safetensors", "transformers"], "packages accelerate, safetensors, transformers"),
        (["torch"], "package torch"),
    ],
    ids=["of the extra", "of the kernel"],
)
def test_all_missing_packages_are_named_at_once_with_a_command_that_installs_them(
    absent: list[str], named: str
) -> None:
    program = (
        f"import sys; sys.modules |= dict.fromkeys({absent})\n"
        "from imdb_classifier.commands.predict import main; sys.exit(main(['--checkpoint', '.', 'a film']))"
    )
    shown = run_python("-c", program)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr == (
        f"imdb-predict: error: needs the Python {named}: pip install -e '.[train]' in the repository of padfree\n"
    )


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_hub_id_without_the_package_datasets_is_one_line_and_status_2(
    command: str, finished_run: Path, tmp_path: Path
) -> None:
    where = {"train": ["--output-dir", str(tmp_path)], "evaluate": ["--checkpoint", str(finished_run)]}
    arguments = ["--dataset", "stanfordnlp/imdb", *where[command]]
    shown = run_python("-c", WITHOUT_DATASETS, json.dumps([(command, arguments)]))
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr == (
        f"imdb-{command}: error: dataset 'stanfordnlp/imdb' needs the package datasets: "
        "pip install datasets, or pip install -e '.[train,hub]' in padfree's folder\n"
    )
