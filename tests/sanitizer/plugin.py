"""pytest plugin: every test runs under the sanitizer, with a program order of its own, and fails with its report.

Wired by `pytest_plugins = ["sanitizer.plugin"]` in tests/conftest.py. Without a GPU it also selects the interpreter,
before any kernel is decorated.
"""

import os
import zlib
from collections import Counter
from collections.abc import Generator, Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from sanitizer import Report, poison_empty, sanitize

_COUNTED = ("launches", "programs", "loads", "stores", "atomics", "dots", "findings")
_totals: Counter[str] = Counter()
_failed = pytest.StashKey[bool]()


@pytest.fixture(autouse=True)
def sanitizer_report(request: pytest.FixtureRequest) -> Iterator[Report | None]:
    """The Report of this test's interpreted launches; None where kernels are compiled."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield None
        return
    with sanitize(seed=zlib.crc32(request.node.nodeid.encode())) as report, poison_empty():
        yield report
    _totals.update(report.total)
    _totals["findings"] += len(report.findings)
    # a launch with findings raises, so a test that passes all the same has swallowed the error
    if report.findings and not request.node.stash.get(_failed, False):
        pytest.fail(f"the sanitizer's findings were swallowed:\n{report}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    result = yield
    if call.when == "call":
        item.stash[_failed] = result.failed
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["sanitizer"] = dict(_totals)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """Collect the counts of an xdist worker."""
    _totals.update(getattr(node, "workeroutput", {}).get("sanitizer", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _totals["launches"]:
        counts = ", ".join(f"{_totals[name]:,} {name}" for name in _COUNTED)
        terminalreporter.write_line(f"sanitizer: {counts}")
