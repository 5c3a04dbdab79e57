"""A run is exact however it is stopped: after any step, in an evaluation, by a kill at any moment."""

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from imdb_classifier.checkpoints import checkpoint, run_folder
from imdb_classifier.checkpoints.run_folder import Position, positions
from imdb_classifier.commands import train
from imdb_classifier.messages import UserError
from imdb_classifier.training import inference, loop
from imdb_classifier.training.run import Run
from imdb_classifier.training.setup import check_settings
from tiny_reviews import train_arguments
from tiny_runs import SOURCES, STEPS_AN_EPOCH, assert_same_run, contents

# File system calls in the run's folder, of a run that saves after each of its ten steps; at least so many.
CALLS_OF_A_RUN = 500


def test_equal_seeds_give_equal_bytes_with_any_number_of_workers(
    dataset: Path, finished_run: Path, tmp_path: Path
) -> None:
    for workers in ("0", "1", "2"):
        run = tmp_path / workers
        assert train.main(train_arguments(dataset, run, "--workers", workers)) == 0
        assert_same_run(run, finished_run)


def test_a_fresh_process_with_another_hash_seed_gives_equal_bytes(
    dataset: Path, finished_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # An empty cache too: tokens made now are the tokens kept earlier.
    arguments = train_arguments(dataset, run, "--cache-dir", str(tmp_path / "cache"))
    environment = {
        **os.environ,
        "PYTHONPATH": SOURCES,
        "PYTHONHASHSEED": "12345",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    subprocess.run(
        [sys.executable, "-m", "imdb_classifier.commands.train", *arguments], env=environment, check=True
    )
    assert_same_run(run, finished_run)


def test_another_seed_gives_other_weights(dataset: Path, finished_run: Path, tmp_path: Path) -> None:
    assert train.main(train_arguments(dataset, tmp_path / "run", "--seed", "1")) == 0
    assert contents(tmp_path / "run" / "last") != contents(finished_run / "last")


@pytest.mark.parametrize("number", range(1, 2 * STEPS_AN_EPOCH + 1))
def test_a_run_stopped_after_any_step_and_resumed_equals_one_that_was_not(
    number: int,
    dataset: Path,
    finished_run: Path,
    tmp_path: Path,
    after_step: Any,
    capsys: pytest.CaptureFixture,
) -> None:
    asked = (signal.SIGTERM, signal.SIGINT)[number % 2]
    after_step(number, lambda: os.kill(os.getpid(), asked))
    run = tmp_path / "run"
    assert train.main(train_arguments(dataset, run)) == 128 + asked
    assert capsys.readouterr().err.splitlines()[-1].endswith("add --resume to the command to go on")
    checkpoint.verify((run / "last").resolve())
    assert train.main(train_arguments(dataset, run, "--resume")) == 0
    assert_same_run(run, finished_run)


def test_a_run_stopped_in_an_evaluation_and_resumed_equals_one_that_was_not(
    dataset: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = inference.evaluate

    def evaluate(*arguments: Any, **options: Any) -> inference.Evaluation:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", evaluate)
        assert train.main(train_arguments(dataset, run)) == 143
    assert (run / "last").resolve().name == Position(0, STEPS_AN_EPOCH).folder_name
    assert train.main(train_arguments(dataset, run, "--resume")) == 0
    assert_same_run(run, finished_run)


def test_resuming_a_finished_run_changes_nothing_and_more_epochs_go_on(
    dataset: Path, finished_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run", symlinks=True))
    assert train.main(train_arguments(dataset, run, "--resume")) == 0
    assert_same_run(run, finished_run)
    assert train.main(train_arguments(dataset, run, "--resume", "--epochs", "3")) == 0
    assert train.main(train_arguments(dataset, tmp_path / "three", "--epochs", "3")) == 0
    assert_same_run(run, tmp_path / "three")


@pytest.fixture
def ranked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Arrange each epoch's accuracy, and its loss where one is given, so that a test knows which one is the best."""
    original = loop.evaluate_split

    def arrange(*accuracies: float, losses: Sequence[float] = ()) -> None:
        def evaluate_split(run: Run, name: str) -> inference.Evaluation:
            result, epoch = original(run, name), run.state.position.epoch
            loss = losses[epoch] if losses else result.loss
            return dataclasses.replace(result, accuracy=accuracies[epoch], loss=loss)

        monkeypatch.setattr(loop, "evaluate_split", evaluate_split)

    return arrange


def test_a_run_killed_between_its_last_save_and_the_links_is_settled_when_resumed(
    dataset: Path, tmp_path: Path, ranked: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked(0.1, 0.2, 0.3)
    three = ("--epochs", "3")
    assert train.main(train_arguments(dataset, tmp_path / "undisturbed", *three)) == 0
    run, original = tmp_path / "run", run_folder.settle

    def killed_at_the_end(folder: Path, last: Position, best: Position) -> None:
        if last.epoch == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        original(folder, last, best)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "settle", killed_at_the_end)
        in_a_child(lambda: train.main(train_arguments(dataset, run, *three)))
    assert [(run / link).resolve().name[:10] for link in ("last", "best")] == ["epoch-0002"] * 2
    assert train.main(train_arguments(dataset, run, *three, "--resume")) == 0
    assert_same_run(run, tmp_path / "undisturbed")
    assert positions(run) == positions(tmp_path / "undisturbed")


def test_of_epochs_equal_in_accuracy_the_one_of_the_lowest_validation_loss_is_chosen(
    dataset: Path, tmp_path: Path, ranked: Callable[..., None], capsys: pytest.CaptureFixture
) -> None:
    # A few validation reviews give the same accuracy to a model that learned nothing yet and to one that did.
    ranked(0.75, 1.0, 1.0, losses=(0.6, 0.5, 0.05))
    run = tmp_path / "run"
    assert train.main(train_arguments(dataset, run, "--epochs", "3")) == 0
    assert "chosen on validation: epoch 3" in capsys.readouterr().out
    assert (run / "best").resolve().name == Position(3).folder_name


@pytest.mark.parametrize("harm", ["damaged", "deleted"])
def test_a_best_checkpoint_that_is_lost_makes_way_for_the_best_that_is_left(
    harm: str, dataset: Path, tmp_path: Path, ranked: Callable[..., None], capsys: pytest.CaptureFixture
) -> None:
    ranked(0.9, 0.2, 0.3, 0.1)
    run = tmp_path / "run"
    assert train.main(train_arguments(dataset, run, "--epochs", "3")) == 0
    first = (run / "best").resolve()
    assert first.name == Position(1).folder_name
    if harm == "deleted":
        shutil.rmtree(first)
    else:
        (first / checkpoint.MODEL_FILE).write_bytes(b"")
    capsys.readouterr()
    assert train.main(train_arguments(dataset, run, "--epochs", "4", "--resume")) == 0
    captured = capsys.readouterr()
    assert "the best checkpoint, of epoch 1, is missing or damaged; now it is epoch 3" in captured.err
    assert "chosen on validation: epoch 3" in captured.out
    assert (run / "best").resolve().name == Position(3).folder_name


def test_a_best_checkpoint_without_a_successor_leaves_no_dangling_link(
    dataset: Path, tmp_path: Path, ranked: Callable[..., None], after_step: Any
) -> None:
    ranked(0.9, 0.2)
    run = tmp_path / "run"
    after_step(STEPS_AN_EPOCH + 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train.main(train_arguments(dataset, run)) == 143
    shutil.rmtree((run / "best").resolve())
    assert train.main(train_arguments(dataset, run, "--epochs", "1", "--resume")) == 0
    assert not (run / "best").is_symlink()


def test_a_run_is_resumed_with_the_number_of_processes_it_began_with(finished_run: Path) -> None:
    folder = finished_run / "last"
    settings = checkpoint.read_json(folder / checkpoint.STATE_FILE)["settings"]
    check_settings(folder, settings)
    with pytest.raises(UserError, match="cannot resume: the number of processes was 1, now is 2"):
        check_settings(folder, settings | {"processes": 2})
    with pytest.raises(UserError, match="was written by another version"):
        check_settings(folder, settings | {"unheard_of": 2})


def in_a_child(work: Callable[[], int]) -> int:
    """The wait status of a fork that runs `work`."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os._exit(work())
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("point", range(8))
def test_kill_at_any_moment_loses_nothing_but_time(
    point: int, dataset: Path, finished_run: Path, tmp_path: Path
) -> None:
    """SIGKILL at a random file system call of a run that saves after every step, and again in its resumption."""
    draw, run = random.Random(point), tmp_path / "run"
    arguments = train_arguments(dataset, run, "--save-every", "1")

    def killed_run() -> int:
        left = draw.randrange(10, CALLS_OF_A_RUN - 10)

        def count(event: str, details: tuple[object, ...]) -> None:
            nonlocal left
            if left >= 0 and event.startswith(("open", "os.", "shutil.")) and str(run) in str(details):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        has_run = bool(positions(run))
        return train.main([*arguments, "--resume"] if has_run else arguments)

    assert os.waitstatus_to_exitcode(in_a_child(killed_run)) == -signal.SIGKILL
    assert os.waitstatus_to_exitcode(in_a_child(killed_run)) in (0, -signal.SIGKILL)
    resume = ["--resume"] if positions(run) else []
    assert train.main([*arguments, *resume]) == 0
    assert_same_run(run, finished_run)


def test_a_second_signal_leaves_at_once(dataset: Path, tmp_path: Path, after_step: Any) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    after_step(2, twice)
    status = in_a_child(lambda: train.main(train_arguments(dataset, tmp_path / "run")))
    assert os.waitstatus_to_exitcode(status) == 130
    assert positions(tmp_path / "run") == []


def test_a_real_process_answers_sigterm_by_saving(dataset: Path, tmp_path: Path) -> None:
    arguments = train_arguments(dataset, tmp_path / "run", "--epochs", "100000")
    process = subprocess.Popen(
        [sys.executable, "-m", "imdb_classifier.commands.train", *arguments],
        env={**os.environ, "PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not positions(tmp_path / "run") and process.poll() is None:
        time.sleep(0.1)
    process.terminate()
    _, spoken = process.communicate()
    assert process.returncode == 143
    assert "stopping after this step" in spoken
    assert spoken.splitlines()[-1] == (
        "imdb-train: error: stopped by signal 15; add --resume to the command to go on"
    )
    checkpoint.verify((tmp_path / "run" / "last").resolve())
