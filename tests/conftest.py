"""One device, one set of seeds and the sanitizer for every test."""

import os
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

try:
    import hypothesis
except ModuleNotFoundError:
    # a GPU machine may lack it; everything but test_properties.py runs without
    hypothesis = None

STANDIN_GPU = os.environ.get("PADFREE_STANDIN_GPU") == "1"
if not torch.cuda.is_available():
    # before any module decorates a kernel
    os.environ.setdefault("TRITON_INTERPRET", "1")

# in the environment, so that the workers of pytest-xdist draw the same one
ROTATING_SEED = int(os.environ.setdefault("PADFREE_SEED", str(random.SystemRandom().randrange(1000, 2**31))))
SEEDS = (0, 1, 2, 3, 4, ROTATING_SEED)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

pytest_plugins = ["sanitizer.plugin", "standin_gpu", "tiny_runs"]

if hypothesis is not None:
    hypothesis.settings.register_profile(
        "ci", deadline=None, derandomize=True, database=None, max_examples=300, print_blob=True,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )  # fmt: skip
    hypothesis.settings.register_profile(
        "soak", hypothesis.settings.get_profile("ci"), derandomize=False, max_examples=1400
    )

_cases: Counter[str] = Counter()
_deselected: Counter[str] = Counter()


def left_to_ci(config: pytest.Config) -> bool:
    """Whether this run leaves the long forms out."""
    return "soak" not in (config.option.markexpr or "")


def pytest_configure(config: pytest.Config) -> None:
    if hypothesis is not None:
        hypothesis.settings.load_profile("ci" if left_to_ci(config) else "soak")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that need a GPU where there is none, and the long forms unless asked for by -m.

    The long form of a generated test is the same test with the profile "soak".
    """
    for item in items:
        if not left_to_ci(config) and getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker("soak")
    left_out = {"cuda": not torch.cuda.is_available(), "soak": left_to_ci(config)}
    kept, deselected = [], []
    for item in items:
        reason = next(
            (marker for marker, out in left_out.items() if out and item.get_closest_marker(marker)), None
        )
        (deselected if reason else kept).append(item)
        if reason:
            _deselected[reason] += 1
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = kept


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run: the GPU, or the CPU under Triton's interpreter."""
    if STANDIN_GPU:
        return torch.device("meta")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def default_device(request: pytest.FixtureRequest, device: torch.device) -> Iterator[None]:
    """Tests that call the kernel by name make their tensors where it runs; the others are handed `device`."""
    if {"KERNEL", "kernel_results"} & set(vars(request.module)):
        with device:
            yield
    else:
        yield


@pytest.fixture(params=DTYPES.values(), ids=DTYPES.keys())
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each dtype that the kernels compute in."""
    return request.param


@pytest.fixture
def count_cases(request: pytest.FixtureRequest) -> Callable[[int], None]:
    """Report forward and backward cases compared element by element with the truth, for the summary."""

    def count(cases: int) -> None:
        _cases[request.path.name] += cases

    return count


@pytest.fixture
def judge(count_cases: Callable[[int], None]) -> Callable[[Callable[[Sequence[int]], object]], None]:
    """Ask for a verdict by the error rule on the calls of five fixed seeds and the rotating one, judged together.

    The rule compares the largest of few errors, and a rare draw exceeds it by luck (NOTES.md). Before a verdict
    stands against the kernel it is asked for again on eight times as many draws, by the same rule.
    """

    def judge(assert_exact: Callable[[Sequence[int]], object]) -> None:
        try:
            assert_exact(SEEDS)
        except AssertionError as error:
            assert_exact((*SEEDS, *range(ROTATING_SEED + 1, ROTATING_SEED + 1 + 8 * len(SEEDS))))
            warnings.warn(f"exceeded by luck, exact over more draws: {error}", stacklevel=2)
        count_cases(len(SEEDS))

    return judge


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["cases"] = dict(_cases)
        session.config.workeroutput["deselected"] = dict(_deselected)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """Collect the counts of an xdist worker; every worker deselects the same tests."""
    output = getattr(node, "workeroutput", {})
    _cases.update(output.get("cases", {}))
    _deselected.update(
        {name: n for name, n in output.get("deselected", {}).items() if name not in _deselected}
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(
        f"seeds {', '.join(map(str, SEEDS))}: the last one rotates, PADFREE_SEED={ROTATING_SEED} repeats it"
    )
    if _cases:
        by_file = ", ".join(f"{name} {n:,}" for name, n in sorted(_cases.items()))
        terminalreporter.write_line(f"numeric cases, forward and backward: {_cases.total():,} ({by_file})")
    reasons = {"cuda": "no CUDA GPU", "soak": "run by -m soak"}
    for name, n in sorted(_deselected.items()):
        terminalreporter.write_line(f"{n} tests marked {name!r} deselected: {reasons[name]}")
