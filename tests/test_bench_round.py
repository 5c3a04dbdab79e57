"""The GPU round: the limits of its steps, what an early end leaves, and what its verdict says."""

import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from padfree_bench import cli
from padfree_bench.gpu_round import driver, outcomes, steps, warm
from padfree_bench.gpu_round.steps import OVERHEAD_SECONDS, PART_SECONDS, PARTS, VERSIONS_SECONDS, Round, Step
from padfree_bench.suites import encoder
from padfree_bench.suites.recipes import RECIPES
from padfree_bench.suites.session import refuse_to_replace
from waiting import is_running, wait_for


@pytest.fixture
def around(tmp_path: Path) -> Round:
    return Round(tmp_path, tmp_path / "card", tmp_path / "cache", on_gpu=False)


def python(program: str, name: str = "step", seconds: int = 20) -> Step:
    return Step(name, "", seconds, (sys.executable, "-c", program))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_limits_of_all_steps_fit_their_part(part: str, on_gpu: bool, tmp_path: Path) -> None:
    limits = [step.seconds for step in PARTS[part](Round(tmp_path, tmp_path, tmp_path, on_gpu))]
    assert sum(limits) + VERSIONS_SECONDS + OVERHEAD_SECONDS <= PART_SECONDS[part]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_every_suite_takes_its_command_line(part: str, on_gpu: bool, tmp_path: Path) -> None:
    suites = [
        step.command[3:]
        for step in PARTS[part](Round(tmp_path, tmp_path, tmp_path, on_gpu))
        if step.command[1:3] == ("-m", "bench") and step.command[3] in cli.SUITES
    ]
    assert suites
    for line in suites:
        refuse_to_replace(cli.parser().parse_args([word.replace("{minutes}", "1") for word in line]))


def test_the_round_times_peers_that_there_are_and_compiles_all_of_ours_ahead() -> None:
    known = {recipe.name for recipe in RECIPES}
    assert set(steps.TRAIN_PEERS) < known and "notebook" in steps.TRAIN_PEERS
    assert set(steps.ENCODER_PEERS) < {peer.name for peer in encoder.PEERS}
    assert set(steps.OUR_ENCODER_PEERS) == {p.name for p in encoder.PEERS if p.attention == "padfree"}
    names = [name for name, _ in warm.items("main")]
    for size in steps.ENCODER_SIZES:
        assert f"encoder {size}" in names
        assert {f"train {size} {longest}" for longest in (400, 396, 393)} <= set(names)
    for longest, remainder in ((400, 0), (393, 1), (396, 4)):
        lengths = warm.lengths_of(longest, remainder)
        assert (len(lengths), max(lengths), sum(lengths) % 16) == (16, longest, remainder)


def test_a_step_past_its_limit_keeps_what_it_had_found(around: Round) -> None:
    program = "import json, time; print(json.dumps({'cases': 3}), flush=True); time.sleep(60)"
    outcome = driver.run_step(replace(around, on_gpu=True), python(program), 20)
    assert (outcome.status, outcome.details) == (outcomes.TIMED_OUT, {"cases": 3})


def test_a_step_that_fails_says_why_and_never_passes_without_a_gpu(around: Round) -> None:
    failed = driver.run_step(around, python("import sys; print('dq differs'); sys.exit(1)"), 100)
    assert failed.status == outcomes.FAILED and "dq differs" in failed.reason
    assert driver.run_step(around, python(""), 100).status == outcomes.REHEARSED
    asked = Step("graph", "", 9, ("false",), needs_gpu=True)
    assert driver.run_step(around, asked, 100).status == outcomes.NOT_RUN
    lacking = replace(python(""), needs_folder=around.folder / "reviews")
    assert driver.run_step(around, lacking, 100).status == outcomes.NOT_RUN
    assert driver.run_step(replace(around, on_gpu=True), python(""), 1).reason == "no time left"


def test_what_a_step_does_not_need_goes_to_the_next() -> None:
    first, second, last = python("", seconds=60), python("", seconds=100), python("", seconds=30)
    assert driver.allowed(first, [second, last], 200) == 70
    assert driver.allowed(second, [last], 180) == 150
    assert driver.allowed(second, [last], 110) == 100  # its own, even where the last will have less
    assert driver.allowed(last, [], 12) == 12


def test_a_suite_is_told_how_long_it_may_go_on(around: Round) -> None:
    step = Step(
        "table", "", 100, (sys.executable, "-c", "import sys; print('[', *sys.argv[1:])", "{minutes}")
    )
    driver.run_step(around, step, 132)
    assert (around.folder / "logs" / "table.log").read_text() == "[ 2.00\n"


def rows(*given: dict[str, Any], not_reached: Sequence[str] = ()) -> str:
    common = {"case": "B64", "direction": "both", "status": "ok"}
    content = {"rows": [common | row for row in given], "not_reached": list(not_reached)}
    return f"import json; print(json.dumps({content}))"


def test_a_suite_in_which_padfree_has_no_figure_has_not_passed(around: Round) -> None:
    around = replace(around, on_gpu=True)
    sdpa = {"peer": "sdpa", "ms_p50": 3.0, "graph_ms": 2.0}
    wrong = {"peer": "padfree", "status": "not run", "reason": "wrong answer"}

    def outcome(*given: dict[str, Any], not_reached: Sequence[str] = ()) -> driver.Outcome:
        path = str(around.folder / "attention.json")
        program = f"import sys; sys.stdout = open({path!r}, 'w'); {rows(*given, not_reached=not_reached)}"
        return driver.run_step(around, replace(python(program), result="attention"), 20)

    failed = outcome(sdpa, wrong)
    assert failed.status == outcomes.FAILED and "B64 both padfree: wrong answer" in failed.reason
    passed = outcome(sdpa, {"peer": "padfree", "ms_p50": 1.0}, {"peer": "flex", "status": "not run"})
    assert passed.status == outcomes.PASSED
    assert passed.details == {"B64 both": {"sdpa": 2.0, "padfree": 1.0}}
    late = outcome({"peer": "padfree", "ms_p50": 1.0}, not_reached=["B4 both"])
    assert late.status == outcomes.INCOMPLETE and "B4 both" in late.reason
    os.utime(around.folder / "attention.json", (1, 1))
    stale = driver.run_step(around, replace(python(""), result="attention"), 20)
    assert (stale.status, stale.details) == (outcomes.FAILED, {})
    assert "no figure of this run" in stale.reason


@pytest.mark.parametrize("name", ("agreement", "repeats", "graph"))
def test_a_check_that_finds_no_gpu_in_a_round_on_one_has_not_passed(around: Round, name: str) -> None:
    around = replace(around, on_gpu=True)
    (step,) = [step for step in steps.smoke(around) if step.name == name]
    failed = driver.run_step(around, replace(step, environment={"CUDA_VISIBLE_DEVICES": ""}), 60)
    assert failed.status == outcomes.FAILED and "finds no CUDA GPU" in failed.reason


def test_a_round_that_tunes_takes_no_other_runs_rows(around: Round, monkeypatch: pytest.MonkeyPatch) -> None:
    around.folder.mkdir(parents=True, exist_ok=True)
    old = around.folder / "tune.json"
    old.write_text('{"environment": {"started": "2020-01-01T00:00:00+00:00"}, "answers": []}')
    monkeypatch.setattr(driver, "look_around", lambda _: (around, {"device": "stand-in"}))
    monkeypatch.setitem(driver.PARTS, "main", lambda _: [python("print(1)", "tune")])
    driver.run_part("main", around.output, None, None)
    assert not old.exists()
    assert (around.folder / "earlier" / "2020-01-01T00-00-00-tune.json").exists()


def test_a_verdict_is_passed_only_on_a_gpu_with_everything_done() -> None:
    todo = [python("", "one"), python("", "two")]
    passed, skipped, failed = (driver.Outcome("", status) for status in ("passed", "not run", "failed"))
    verdict = lambda outcomes, on_gpu=True: driver.verdict_of(outcomes, todo, on_gpu)
    assert verdict([passed, passed]) == "passed"
    assert verdict([passed]) == "unfinished"
    assert verdict([passed, skipped]) == "incomplete"
    assert verdict([passed, failed]) == verdict([failed], False) == "failed"
    assert verdict([passed, passed], False) == "rehearsed"


ROUND = """
import sys
from pathlib import Path
from padfree_bench.gpu_round import driver, steps
output = Path(sys.argv[1])
around = steps.Round(output, output / "card", output / "cache", False)
quick = steps.Step("quick", "", 20, (sys.executable, "-c", "print(1)"))
slow = steps.Step("slow", "", 50, (sys.executable, "-c", sys.argv[2]))
driver.PARTS["smoke"] = lambda _: [quick, slow]
driver.look_around = lambda _: (around, {"device": "stand-in", "device_type": "cpu"})
driver.run_part("smoke", output, output / "back.tar.gz", None)
"""


GRANDCHILD = (
    "import os, subprocess, sys; from padfree_bench.measuring.processes import die_with_parent;"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], preexec_fn=die_with_parent);"
    "print(os.getpid(), child.pid, flush=True); child.wait()"
)


def test_a_kill_in_the_middle_leaves_whole_files_and_no_children(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ROUND, str(tmp_path), GRANDCHILD]
    process = subprocess.Popen(command, env=steps.our_environment(), stdout=subprocess.DEVNULL)
    log = tmp_path / "card" / "logs" / "slow.log"
    pids = wait_for(lambda: log.is_file() and log.read_text().split())
    process.send_signal(signal.SIGKILL)
    process.wait()
    content = json.loads((tmp_path / "card" / "round-smoke.json").read_text())
    assert [step["name"] for step in content["steps"]] == ["quick"]
    assert (content["verdict"], content["not_reached"]) == ("unfinished", ["slow"])
    with tarfile.open(tmp_path / "back.tar.gz") as tar:
        assert "card/round-smoke.json" in tar.getnames()
    wait_for(lambda: not any(is_running(int(pid)) for pid in pids))


def test_some_steps_run_anew_and_the_others_are_kept(around: Round, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = {"one": "print(1)", "two": "import sys; sys.exit(1)"}
    monkeypatch.setattr(driver, "look_around", lambda _: (around, {"device": "stand-in", "commit": "c"}))
    monkeypatch.setitem(
        driver.PARTS, "smoke", lambda _: [python(text, name) for name, text in programs.items()]
    )
    archive = around.output / "back.tar.gz"

    def run(*only: str) -> tuple[int, str, dict[str, str]]:
        status = driver.run_part("smoke", around.output, archive, list(only) or None)
        content = json.loads((around.folder / "round-smoke.json").read_text())
        return status, content["verdict"], {step["name"]: step["status"] for step in content["steps"]}

    assert run("one") == (0, "unfinished", {"one": "rehearsed"})
    assert run("two") == (1, "failed", {"one": "rehearsed", "two": "failed"})
    programs["two"] = "print(2)"
    assert run("two") == (0, "rehearsed", {"one": "rehearsed", "two": "rehearsed"})
    programs["one"] = "import sys; sys.exit(1)"
    assert run() == (1, "failed", {"one": "failed", "two": "rehearsed"})


def test_what_a_step_saves_is_packed_before_it_ends(around: Round, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "PACK_SECONDS", 0.1)
    around.suites.mkdir(parents=True)
    (around.suites / "attention-table.json").write_text("{}")
    target = around.output / "back.tar.gz"
    with driver.packing(around, target):
        wait_for(target.exists)
    with tarfile.open(target) as tar:
        assert tar.getnames() == ["card-quick/attention-table.json"]


def test_a_disk_that_is_full_costs_no_later_step(
    around: Round, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(driver, "look_around", lambda _: (around, {"device": "stand-in"}))
    monkeypatch.setitem(
        driver.PARTS, "smoke", lambda _: [python("print(1)", "one"), python("print(2)", "two")]
    )
    write, calls = driver.write_whole, iter(range(9))

    def full_once(path: Path, text: str) -> None:
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        write(path, text)

    monkeypatch.setattr(driver, "write_whole", full_once)
    assert driver.run_part("smoke", around.output, None, None) == 1
    assert "failed    one" in (said := capsys.readouterr().out) and "No space left" in said
    assert "rehearsed two" in said


@pytest.mark.parametrize("steps_asked", ("", " ,"))
def test_no_step_asked_for_is_one_line(steps_asked: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert driver.main(["--part", "smoke", "--steps", steps_asked]) == 2
    assert "got nothing" in capsys.readouterr().err


def test_an_archive_that_cannot_be_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "a.zip"):
        assert driver.main(["--part", "smoke", "--archive", str(path)]) == 2
        assert "must be a .tar.gz" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_step_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert driver.main(["--part", "smoke", "--steps", "warm,wram"]) == 2
    assert "got wram" in capsys.readouterr().err
