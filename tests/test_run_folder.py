"""A run's folder: nothing is deleted for a run that does not start, and one command at a time trains in it."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from imdb_classifier.checkpoints import run_folder
from imdb_classifier.commands import train
from imdb_classifier.training import guards
from tiny_reviews import train_arguments
from tiny_runs import assert_same_run, snapshot

# what is asked for beside --overwrite and cannot be
REFUSED: dict[str, list[str]] = {
    "data": ["--dataset", "./nowhere.csv"],
    "tokenizer": ["--tokenizer", "./nowhere"],
    "attention": ["--attention", "padfree"],
    "precision": ["--precision", "fp16"],
    "cache": ["--cache-dir", "/dev/null/cache"],
}


@pytest.mark.parametrize("refused", REFUSED)
def test_an_overwrite_that_is_refused_leaves_the_old_run_as_it_was(
    refused: str, dataset: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run = Path(shutil.copytree(finished_run, tmp_path / "run", symlinks=True))
    assert train.main(train_arguments(dataset, run, "--overwrite", *REFUSED[refused])) == 2
    assert snapshot(run) == snapshot(finished_run)


def test_an_overwrite_whose_optimizer_is_refused_leaves_the_old_run_as_it_was(
    dataset: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    original = guards.check_optimizer
    monkeypatch.setattr(
        guards, "check_optimizer", lambda model, _: original(model, torch.optim.Adam([parameter]))
    )
    run = Path(shutil.copytree(finished_run, tmp_path / "run", symlinks=True))
    assert train.main(train_arguments(dataset, run, "--overwrite")) == 2
    assert snapshot(run) == snapshot(finished_run)


def test_an_overwrite_replaces_the_run_and_keeps_what_is_the_users(
    dataset: Path, finished_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train.main(train_arguments(dataset, run, "--seed", "1")) == 0
    (run / "notes.txt").write_text("mine")
    assert train.main(train_arguments(dataset, run, "--overwrite")) == 0
    assert_same_run(run, finished_run)
    assert (run / "notes.txt").read_text() == "mine"


def status_of_child(work: Callable[[], int]) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os._exit(work())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("option", ["--resume", "--overwrite"])
def test_a_second_run_in_the_folder_is_refused_and_the_first_goes_on(
    option: str,
    dataset: Path,
    finished_run: Path,
    tmp_path: Path,
    after_step: Any,
    capfd: pytest.CaptureFixture,
) -> None:
    run, second = tmp_path / "run", []
    arguments = train_arguments(dataset, run, "--save-every", "1")
    after_step(7, lambda: second.append(status_of_child(lambda: train.main([*arguments, option]))))
    assert train.main(arguments) == 0
    assert second == [2]
    assert "run: another command is training in it, pass another --output-dir" in capfd.readouterr().err
    assert_same_run(run, finished_run)


def test_two_first_runs_in_an_empty_folder_do_not_mix(
    dataset: Path, finished_run: Path, tmp_path: Path, after_step: Any
) -> None:
    run, second = tmp_path / "run", []
    arguments = train_arguments(dataset, run)
    after_step(2, lambda: second.append(status_of_child(lambda: train.main(arguments))))
    assert train.main(arguments) == 0
    assert second == [2]
    assert_same_run(run, finished_run)


def test_a_killed_run_leaves_no_lock_even_while_its_workers_live(
    dataset: Path, tmp_path: Path, after_step: Any
) -> None:
    run = tmp_path / "run"
    arguments = train_arguments(dataset, run, "--save-every", "1")
    reading, writing = os.pipe()

    def fork_and_die() -> None:
        if os.fork() == 0:
            # A worker that outlives its parent, until the test closes the pipe.
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    after_step(3, fork_and_die)
    assert status_of_child(lambda: train.main(arguments)) == -signal.SIGKILL
    with run_folder.locked(run):
        pass
    os.close(writing)
