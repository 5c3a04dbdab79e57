"""What a launcher sets reaches a command as it says: taken and said, or refused in one line; nothing unseen."""

import ast
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from imdb_classifier.checkpoints import checkpoint, weights
from imdb_classifier.checkpoints.run_folder import positions
from imdb_classifier.commands import evaluate, predict, train
from imdb_classifier.messages import UserError
from imdb_classifier.training import launcher
from tiny_reviews import make_rows, train_arguments
from tiny_runs import SOURCES, assert_same_run, contents


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("ACCELERATE_"):
            monkeypatch.delenv(name)


def named_part(node: ast.AST) -> ast.AST | None:
    """Where a name stands: os.environ[...], os.environ.get(...), parse_flag_from_env(...), in os.environ, prefix = ..."""
    if isinstance(node, ast.Call) and node.args:
        read = re.search(r"environ\.(get|pop|setdefault)$|_from_env$", ast.unparse(node.func))
        return node.args[0] if read else None
    if isinstance(node, ast.Subscript):
        return node.slice if ast.unparse(node.value) == "os.environ" else None
    if isinstance(node, ast.Compare):
        return node.left if ast.unparse(node.comparators[0]) == "os.environ" else None
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith("prefix"):
        return node.value
    return None


def names_read(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        part = named_part(node)
        # The second half of `prefix + "..."` is no name; the first is found where it is assigned.
        for leaf in part.elts if isinstance(part, ast.List) else [part]:
            if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str):
                yield leaf.value


def variables_of_accelerate() -> set[str]:
    """Every environment variable, or beginning of its name, that the installed accelerate reads in a command."""
    import accelerate

    root = Path(accelerate.__file__).parent
    # The launching side, and accelerate's own tests, run in other processes.
    elsewhere = ("commands", "test_utils", "launch.py", "launchers.py")
    files = [path for path in root.rglob("*.py") if not set(elsewhere) & set(path.relative_to(root).parts)]
    return {name for path in files for name in names_read(path.read_text(encoding="utf-8"))}


# Names, and beginnings of names, that are not accelerate's own: they qualify a setting that is refused, or concern
# messages, libraries that are not used, and how processes reach each other.
INERT = (
    *launcher.INERT,
    *("CLEARML_", "CUDA_VISIBLE_DEVICES", "DEEPSPEED_", "FORK_LAUNCHED", "FP8_", "FSDP_", "LOCAL_"),
    *("MASTER_", "MEGATRON_LM_", "MLFLOW_", "MPI_", "MV2_COMM_WORLD_", "NCCL_", "OMPI_COMM_WORLD_"),
    *("OMP_NUM_THREADS", "PARALLELISM_CONFIG_", "PMI_RANK", "PT_HPU_", "PYTORCH_", "RANK"),
    *("USE_TORCH_XLA", "XLA_", "systemdrive"),
)


def test_it_is_decided_what_becomes_of_every_variable_that_accelerate_reads() -> None:
    found = variables_of_accelerate()
    # The reader of the sources sees each way in which they are read.
    assert {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_USE_CPU", "PMI_SIZE", "FSDP_"} <= found
    assert len(found) > 60
    whole = (*launcher.REFUSED, *launcher.FLAGS, *launcher.CHOICES)
    beginnings = {name for name in found if name.endswith("_") and any(w.startswith(name) for w in whole)}
    undecided = found - beginnings - {*whole, *launcher.PROCESS_COUNTS}
    assert {name for name in undecided if not name.startswith(INERT)} == set()


REFUSED = [
    *((name, "true" if "no" in off else "8") for name, (off, _) in launcher.REFUSED.items()),
    ("ACCELERATE_MIXED_PRECISION", "bf16"),
    ("ACCELERATE_MIXED_PRECISION", "fp8"),
    ("ACCELERATE_DYNAMO_BACKEND", "TURBO"),
    ("ACCELERATE_OF_TOMORROW", "1"),
    ("WORLD_SIZE", "two"),
    *((name, "perhaps") for name in launcher.FLAGS),
]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=str)
def test_a_setting_that_cannot_be_served_is_one_line_and_status_2(
    name: str,
    value: str,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value)
    assert train.main(train_arguments(dataset, tmp_path / "run")) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"imdb-train: error: {name}")
    assert positions(tmp_path / "run") == []


def test_an_unknown_mode_of_compilation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "fastest")
    with pytest.raises(UserError, match="ACCELERATE_DYNAMO_MODE=fastest: expected one of default, "):
        launcher.check("no")


def test_what_a_launcher_sets_when_nothing_is_asked_of_it_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (off, _) in launcher.REFUSED.items():
        for value in off:
            monkeypatch.setenv(name, value)
            launcher.check("bf16")
    for name, value in {
        "ACCELERATE_USE_CPU": "False",
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_DYNAMO_MODE": "default",
        "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    }.items():
        monkeypatch.setenv(name, value)
    launcher.check("bf16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    launcher.check("bf16")


def test_processes_that_did_not_find_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    launcher.check_processes(Namespace(num_processes=2))
    with pytest.raises(UserError, match="one of 2 processes that did not find each other"):
        launcher.check_processes(Namespace(num_processes=1))
    # torchrun inside the only task of a job
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert launcher.process_count() == 3


def test_torch_compile_turns_no_tf32_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate

    original = accelerate.Accelerator

    def as_on_a_gpu(**options: Any) -> accelerate.Accelerator:
        torch.backends.cuda.matmul.allow_tf32 = True
        return original(**options)

    monkeypatch.setattr(accelerate, "Accelerator", as_on_a_gpu)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        launcher.make_accelerator("fp32", cpu=True)
        # "ieee" would be a wish of the user's, which padfree's kernels fulfil at a fifth of their speed
        assert (before, matmul.fp32_precision, matmul.allow_tf32) == ("none", "none", False)
    finally:
        matmul.allow_tf32 = False
        matmul.fp32_precision = before


def run_module(
    command: str, *arguments: str, processes: int = 1, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, or in several as torchrun starts them, on a machine without a GPU."""
    environment = {
        **os.environ,
        "PYTHONPATH": SOURCES,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "CUDA_VISIBLE_DEVICES": "",
        **variables,
    }
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [
            sys.executable,
            *(torchrun if processes > 1 else []),
            "-m",
            f"imdb_classifier.commands.{command}",
            *arguments,
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


PROCESSES = ("CUDA_", "LOCAL_", "MASTER_", "MPI_", "MV2_", "OMPI_", "OMP_", "PMI_", "RANK")


def test_a_setting_that_is_left_alone_leaves_the_result_as_it_is(
    dataset: Path, finished_run: Path, tmp_path: Path
) -> None:
    left_alone = {name for name in variables_of_accelerate() if name.startswith(INERT)}
    left_alone -= launcher.REFUSED.keys()
    variables = {name: "1" for name in left_alone if not name.startswith(PROCESSES)}
    variables |= dict.fromkeys(("ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY"), "true")
    variables["ACCELERATE_LOG_LEVEL"] = "DEBUG"
    assert len(variables) > 40
    shown = run_module("train", *train_arguments(dataset, tmp_path / "run"), **variables)
    assert shown.returncode == 0, shown.stderr
    assert_same_run(tmp_path / "run", finished_run)


def test_an_empty_setting_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    names = (*launcher.REFUSED, *launcher.FLAGS, *launcher.CHOICES)
    for name in names:
        monkeypatch.setenv(name, "")
    launcher.check("no")
    assert not [name for name in names if name in os.environ]
    launcher.make_accelerator("fp32", cpu=True)


def without_cpu(arguments: list[str]) -> list[str]:
    return [word for word in arguments if word != "--cpu"]


@pytest.mark.parametrize("compiled_first", [True, False], ids=["compiled then plain", "plain then compiled"])
def test_a_run_goes_on_under_another_wrapper_and_equals_one_that_had_none(
    compiled_first: bool, dataset: Path, finished_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for epochs, compiled in ((1, compiled_first), (2, not compiled_first)):
        resume = ["--resume"] if epochs > 1 else []
        backend = {"ACCELERATE_DYNAMO_BACKEND": "EAGER"} if compiled else {}
        arguments = train_arguments(dataset, run, "--epochs", str(epochs), *resume)
        shown = run_module("train", *arguments, **backend)
        assert shown.returncode == 0, shown.stderr
        said = "note: torch.compile runs the model, backend eager, as ACCELERATE_DYNAMO_BACKEND says"
        assert (said in shown.stderr) is compiled
        assert set(weights.load_tensors(run / "last" / checkpoint.MODEL_FILE)) == set(
            weights.load_tensors(finished_run / "last" / checkpoint.MODEL_FILE)
        )
    assert_same_run(run, finished_run)
    assert evaluate.main(["--cpu", "--checkpoint", str(run)]) == 0
    assert predict.main(["--cpu", "--checkpoint", str(run), "a good film"]) == 0


def test_compile_computes_the_same_with_a_graph_for_each_shape(finished_run: Path) -> None:
    arguments = ["--cpu", "--checkpoint", str(finished_run)]
    plain = json.loads(run_module("evaluate", *arguments, "--json").stdout)
    compiled = run_module("evaluate", *arguments, "--compile")
    assert compiled.returncode == 0, compiled.stderr
    assert "ACCELERATE_DYNAMO_BACKEND" not in compiled.stderr
    # One batch holds all ten reviews.
    assert "torch.compile: 1 graph, for batches filled up to 8 lengths" in compiled.stdout
    assert f"accuracy {plain['accuracy']:.4f}, loss {plain['loss']:.4f}" in compiled.stdout


def test_cuda_graphs_need_a_gpu_and_no_compiler(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = train_arguments(dataset, tmp_path / "run", "--cuda-graphs")
    assert train.main(arguments) == 2
    assert "--cuda-graphs needs a GPU, this run is on the CPU" in capsys.readouterr().err
    assert train.main([*arguments, "--compile"]) == 2
    assert "two ways to launch less, expected one of them" in capsys.readouterr().err
    assert not (tmp_path / "run").exists() or positions(tmp_path / "run") == []


def test_a_backend_that_cannot_compile_here_is_one_line(finished_run: Path) -> None:
    arguments = ["--cpu", "--checkpoint", str(finished_run), "a film"]
    # torch knows its name; its package is not installed.
    shown = run_module("predict", *arguments, ACCELERATE_DYNAMO_BACKEND="TVM")
    assert (shown.returncode, shown.stdout) == (2, "")
    message = shown.stderr.splitlines()[-1]
    assert message.startswith("imdb-predict: error: torch.compile cannot compile the model here: ")
    assert "install apache-tvm" in message


def test_torchrun_without_a_gpu_trains_one_run_on_the_cpu_that_everything_reads(
    dataset: Path, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for epochs, more, variables in ((1, [], {}), (2, ["--resume"], {"ACCELERATE_DYNAMO_BACKEND": "EAGER"})):
        arguments = without_cpu(train_arguments(dataset, run, "--epochs", str(epochs), *more))
        shown = run_module("train", *arguments, processes=2, **variables)
        assert shown.returncode == 0, shown.stderr
        assert "note: no GPU here, 2 processes run on the CPU" in shown.stderr
        assert "on cpu:0, 2 process(es)" in shown.stdout
    assert contents(run / "last").keys() == contents(finished_run / "last").keys()
    for name in (checkpoint.MODEL_FILE, checkpoint.OPTIMIZER_FILE):
        ours, theirs = (weights.load_tensors(folder / "last" / name) for folder in (run, finished_run))
        assert {key: value.shape for key, value in ours.items()} == {
            key: value.shape for key, value in theirs.items()
        }
    # Alone and in two processes a review is in another batch: one unit of rounding, as in test_training.py.
    reviews = tmp_path / "reviews.txt"
    # Two windows of imdb-predict, and a batch of one review at the end.
    reviews.write_text("\n".join(text for text, _ in make_rows(71, seed=4)))
    for command, words in (("evaluate", []), ("predict", ["--batch-size", "2", "--file", str(reviews)])):
        file = ["--logits", str(tmp_path / "logits")] if command == "evaluate" else []
        arguments = ["--checkpoint", str(run), "--json", *file, *words]
        shown = run_module(command, *arguments, processes=2)
        assert shown.returncode == 0, shown.stderr
        together = logits(tmp_path / "logits" if file else shown.stdout)
        assert {"evaluate": evaluate, "predict": predict}[command].main(["--cpu", *arguments]) == 0
        alone = logits(tmp_path / "logits" if file else capsys.readouterr().out)
        assert together == pytest.approx(alone, abs=2e-6)
        capsys.readouterr()


def logits(answers: Path | str) -> list[float]:
    text = answers.read_text() if isinstance(answers, Path) else answers
    return [json.loads(line)["logit"] for line in text.splitlines()]
