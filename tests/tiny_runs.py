"""A pytest plugin: one short training run for the tests that read it, and what the tests of runs compare."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imdb_classifier.checkpoints import run_folder
from imdb_classifier.commands import train
from imdb_classifier.training import reporting
from tiny_reviews import train_arguments, write_reviews

STEPS_AN_EPOCH = 5
# for processes of their own
SOURCES = os.pathsep.join(str(Path(__file__).parent.parent / folder) for folder in ("kernels", "model"))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reviews(tmp_path_factory.mktemp("training") / "reviews")


@pytest.fixture(scope="session")
def finished_run(dataset: Path) -> Path:
    """The folder of a run on `dataset` that nothing disturbed; only to be read."""
    run = dataset.parent / "finished"
    assert train.main(train_arguments(dataset, run)) == 0
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below this folder by its name, links followed, without the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != run_folder.LOCK_FILE)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def run_python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": SOURCES, **variables}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def log_without_clock(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / reporting.METRICS_FILE).read_text().splitlines()]
    return [{name: value for name, value in record.items() if "seconds" not in name} for record in records]


def assert_same_run(run: Path, reference: Path) -> None:
    for link in ("last", "best"):
        assert contents(run / link) == contents(reference / link)
    assert log_without_clock(run) == log_without_clock(reference)


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Arrange for something to happen right after the n-th optimizer step of this process."""
    original = reporting.Reporter.step

    def arrange(number: int, happen: Callable[[], None]) -> None:
        steps = 0

        def step(self: reporting.Reporter, *arguments: Any) -> None:
            nonlocal steps
            original(self, *arguments)
            steps += 1
            if steps == number:
                happen()

        monkeypatch.setattr(reporting.Reporter, "step", step)

    return arrange
