"""The GPU round: its limits, what an early end leaves, the cache that travels, and checks that can fail."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import padfree
from padfree_bench import cli
from padfree_bench.gpu_round import agreement, checks, counters, driver, outcomes, steps
from padfree_bench.gpu_round.steps import OVERHEAD_SECONDS, PART_SECONDS, PARTS, VERSIONS_SECONDS, Round, Step
from padfree_bench.suites.session import refuse_to_replace
from test_bench_limits import is_running

CPU = torch.device("cpu")


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


def wait_for(what: Callable[[], Any], seconds: float = 600) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.1)
    raise AssertionError("did not happen in time")


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


CACHE = """
import sys
from pathlib import Path
from padfree_bench.gpu_round import carry, warm
if len(sys.argv) > 1:
    assert carry.unpack(Path(sys.argv[1]), Path(sys.argv[2])) == []
hits, _ = warm.compile_item(next(item for item in warm.items("smoke") if item[0] == "case one token"))
print(hits)
"""


def test_a_packed_cache_gives_hits_in_another_folder(tmp_path: Path) -> None:
    from padfree_bench.gpu_round import carry

    def hits(cache: Path, *arguments: str) -> list[bool]:
        environment = steps.our_environment() | {"TRITON_CACHE_DIR": str(cache)}
        command = [sys.executable, "-c", CACHE, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        answer: list[bool] = json.loads(done.stdout.lower())
        return answer

    made = hits(tmp_path / "made")
    assert made and not any(made)
    assert carry.pack(tmp_path / "made", tmp_path / "cache.tar.xz")
    assert hits(tmp_path / "elsewhere", str(tmp_path / "cache.tar.xz"), str(tmp_path / "elsewhere")) == [
        True
    ] * len(made)


def test_a_cache_of_another_compiler_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from padfree_bench.gpu_round import carry

    monkeypatch.setattr(carry, "compiler", lambda: {"triton": "3.6.0", "ptxas": "12.9"})
    assert carry.pack(tmp_path, tmp_path / "cache.tar.xz") == 0
    assert carry.unpack(tmp_path / "cache.tar.xz", tmp_path / "here") == []
    monkeypatch.setattr(carry, "compiler", lambda: {"triton": "3.6.0", "ptxas": "13.0"})
    assert carry.unpack(tmp_path / "cache.tar.xz", tmp_path / "here") == ["ptxas 12.9, here 13.0"]


def test_a_cache_that_is_broken_costs_no_more_than_its_absence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from padfree_bench.gpu_round import warm

    monkeypatch.setattr(steps, "CARRY", tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for content in (b"", b"\xfd7zXZ\x00 and no more"):
        (tmp_path / "triton-cache.tar.xz").write_bytes(content)
        warm.take_along()
        assert "is of no use" in capsys.readouterr().out


def test_every_row_that_hopper_uses_has_a_case() -> None:
    from padfree._triton.configs import ANY, TABLE

    for (passname, kind, head_dim), rows in TABLE.items():
        used = []
        for row in rows:
            if (not row.arch or 90 in row.arch) and (not used or used[-1].max_length < ANY):
                used.append(row)
        for row in used:
            dtypes = agreement.DTYPES[kind]
            named = [
                case for case in agreement.table_cases(90)
                if case.name.startswith(passname) and case.head_dim == head_dim and case.dtype in dtypes
                and case.name.endswith(f" {tuple(row.config)}")
            ]  # fmt: skip
            assert len(named) >= len(dtypes), (passname, kind, head_dim, row.config)


@pytest.mark.parametrize(
    "name",
    [
        "one token",
        "packed, D 8",
        "one qkv buffer, D 8",
        "padding holes, skipped, float32 D 32",
        "dropout, D 8",
    ],
)
def test_agreement_passes_the_right_answer_and_no_wrong_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(case for case in agreement.all_cases(90) if case.name == name)
    assert 0 < agreement.check_case(case, CPU, "reference") <= 1
    right = agreement.FORMS[case.form]

    def off(*tensors: Any, **options: Any) -> Any:
        result = right(*tensors, **options)
        return (result[0] * 1.02, result[1]) if isinstance(result, tuple) else result * 1.02

    monkeypatch.setitem(agreement.FORMS, case.form, off)
    with pytest.raises(AssertionError, match="exceeds"):
        agreement.check_case(case, CPU, "reference")


def test_agreement_sees_padding_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        out, lse = padfree.attention(query, key, value, mask, **options)
        return out + 0 * value.mean(2, keepdim=True), lse

    monkeypatch.setitem(agreement.FORMS, "padded", leaky)
    case = next(case for case in agreement.all_cases(90) if case.name == "padding right, float32 D 32")
    with pytest.raises(AssertionError, match="changes with NaN in padding"):
        agreement.check_case(case, CPU, "reference")


def test_repeats_see_one_changed_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.check_repeats(CPU) == []
    calls = iter(range(100))
    right = padfree.attention

    def sometimes(*tensors: Any, **options: Any) -> Any:
        out, lse = right(*tensors, **options)
        if next(calls) == 2:
            out.data = out.data.nextafter(out.new_tensor(2.0))
        return out, lse

    monkeypatch.setattr(checks, "attention", sometimes)
    assert [line.split(":")[0] for line in checks.check_repeats(CPU)] == ["H12 D64 launched"]


RAW_PAGE = """==PROF== Connected
"ID","Process ID","Kernel Name","gpu__time_duration.sum","sm__throughput.avg.pct_of_peak_sustained_elapsed","launch__uses_cdp","smsp__average_warps_issue_stalled_wait_per_issue_active.ratio"
"","","","ns","%","",""
"0","7","attention_forward_kernel","61,408","41.5","0","1.25"
"1","7","key_gradient_kernel","9,000","","0","0.5"
"""


def test_the_counters_that_say_what_binds_a_kernel_are_kept_in_base_units() -> None:
    forward, key_gradient = counters.read_counters(RAW_PAGE)
    waits = "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio"
    busy = "sm__throughput.avg.pct_of_peak_sustained_elapsed [%]"
    duration = "gpu__time_duration.sum [ns]"
    assert forward == {"kernel": "attention_forward_kernel", duration: 61408.0, busy: 41.5, waits: 1.25}
    assert key_gradient == {"kernel": "key_gradient_kernel", duration: 9000.0, waits: 0.5}


def test_a_machine_without_nsight_compute_has_no_counters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(counters, "find_ncu", lambda: None)
    assert counters.main(str(tmp_path)) == 1 and "ncu is not installed" in capsys.readouterr().out
