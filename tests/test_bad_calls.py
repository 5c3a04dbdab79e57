"""Wrong calls: every one is refused before any launch, with the argument's name, the rule and what came."""

import inspect
import re
from typing import Any

import pytest
import torch

from bad_calls import BAD_CALLS, ENTRY_POINTS, BadCall


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reaching the launcher fails the test, compiled or interpreted."""
    from padfree._triton import operators

    def launched(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a wrong call reached the launcher")

    monkeypatch.setattr(operators, "launch_forward", launched)


@pytest.mark.usefixtures("no_launch")
@pytest.mark.parametrize("bad_call", BAD_CALLS, ids=[f"{row[0]}: {row[1]}" for row in BAD_CALLS])
def test_a_wrong_call_is_refused_by_name_before_any_launch(bad_call: BadCall) -> None:
    entry_point, _, wrong, exception, argument, got = bad_call
    function, right = ENTRY_POINTS[entry_point]
    arguments: dict[str, Any] = right()
    if "impl" in inspect.signature(function).parameters:
        arguments["impl"] = "triton"
    with pytest.raises(exception) as refusal:
        function(**arguments | wrong)
    message = str(refusal.value)
    assert type(refusal.value) is exception
    assert "\n" not in message
    assert re.match(rf"({argument})\b", message), message
    assert re.search(r"\b(must|needs|goes with)\b", message), f"no rule in: {message}"
    assert got in message, f"{got!r} is not in: {message}"


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_the_call_that_the_wrong_ones_differ_from_is_accepted(entry_point: str) -> None:
    function, right = ENTRY_POINTS[entry_point]
    result = function(**right())
    assert isinstance(result, torch.Tensor) and bool(result.isfinite().all())


def test_there_are_at_least_80_different_wrong_calls() -> None:
    assert len({(row[0], row[1]) for row in BAD_CALLS}) == len(BAD_CALLS) >= 80
