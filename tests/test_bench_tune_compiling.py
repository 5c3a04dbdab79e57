"""`python -m bench tune` compiles what the benchmark launches, in processes that may crash or stall."""

import faulthandler
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from padfree._triton import configs
from padfree._triton.configs import Config
from padfree_bench.tuning import tune, tune_candidates
from padfree_bench.tuning.children import Found, in_children
from padfree_bench.tuning.work import MASK, TOLD, Item, Question
from tiny_bench import ROOT
from waiting import is_running, wait_for

HEADLINE = tune.questions(tune.HEADLINE, ",".join(tune.PASSES))

# The hash is Triton's name for a compiled kernel, in its cache too: made of source, types, divisibility and constants.
SAME_KERNELS = """
import torch
from padfree._arguments import Arguments, Options
from padfree._triton import autograd
from padfree_bench.compiled.aot import compile_only
from padfree_bench.compiled.aot_calls import KERNELS
from padfree_bench.measuring.inputs import make_inputs
from padfree_bench.tuning.tune import PASSES, questions
from padfree_bench.tuning.work import compile_candidate

torch.set_num_threads(1)
asked = questions({case!r}, ",".join(PASSES))
inputs = make_inputs(asked[0].case, "cpu")
leaves = [x.detach().requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
with compile_only(90, tuple(KERNELS[name][0] for name in PASSES)) as launched:
    options = autograd.KernelOptions.of(inputs.query, None, 0.0, None, True)
    out, _ = autograd.run(Arguments(*leaves, inputs.padding, None, Options()), options)
    torch.autograd.grad(out, leaves, inputs.d_out)
for question, kernel in zip(asked, launched, strict=True):
    mine = compile_candidate(question.passname, question.case, question.row().config)
    print(question, kernel.kernel.hash == mine.kernel.hash and kernel.grid == mine.grid)
"""


def in_a_compiling_process(script: str, cache: Path) -> list[str]:
    """The lines that a script prints where Triton compiles and does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT / 'bench'}", "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("case", tune.HEADLINE.split(","))
def test_what_is_compiled_beforehand_is_what_the_benchmark_launches(case: str, tmp_path: Path) -> None:
    lines = in_a_compiling_process(SAME_KERNELS.format(case=case), tmp_path)
    assert lines == [f"{name} {case} True" for name in tune.PASSES]


def test_the_screened_candidates_belong_to_todays_table() -> None:
    rows = tune_candidates.read_candidates(tune.CANDIDATES)
    for question in HEADLINE:
        offered = [r for r in rows if (r["pass"], r["case"]) == (question.passname, question.case.id)]
        for told in TOLD:
            configs = [r["config"] for r in offered if r["told"] == told]
            assert question.row(told).config in configs, f"{question}: run python -m bench tune --screen"
            assert 2 < len(set(configs)) == len(configs)
        assert len(offered) <= tune_candidates.MOST
        assert all(r["predicted_us"] > 0 and r["costs"] and r["reason"] for r in offered)


def test_what_to_compile_beforehand_can_be_sent_to_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[object, ...]] = []
    monkeypatch.setattr(tune_candidates, "compile_candidate", lambda *item: compiled.append(item))
    items = tune.warm_items()
    assert pickle.loads(pickle.dumps(items)) == items
    for item in items:
        tune.compile_item(json.loads(json.dumps(item)))
    offered = tune.offers(HEADLINE)
    rows = [(q, row) for q, found in offered.items() for row in found]
    assert compiled == [(q.passname, q.case, row["config"], row["told"]) for q, row in rows]
    assert all(isinstance(config, Config) for _, _, config, _ in compiled)


def test_what_is_not_compiled_within_half_of_the_time_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "compile_item", what_a_compiler_does)
    row = lambda what: {"config": what, "told": MASK}
    rows: dict[Question, list[Found]] = {question: [row("sleep")] for question in HEADLINE[:2]}
    rows[HEADLINE[0]].append(row("good"))
    list(in_children(what_a_compiler_does, [], jobs=1))  # pays what the first call in a process costs
    # Half of it is for "good", however busy the machine; a sleeper would take four times the half.
    tune.compile_beforehand(rows, jobs=3, deadline=time.monotonic() + 30)
    late = row("sleep") | {"refused": "not compiled in half of the time given"}
    assert rows == {HEADLINE[0]: [late, row("good") | {"registers": 32}], HEADLINE[1]: [late]}


def screened(*tile: int, us: float, told: str = MASK, **more: object) -> list[Found]:
    """Three depths of one tile, each a microsecond slower than the one before."""
    known = {"told": told, "costs": {"ctas": 3}, "waiting": 0.5, **more}
    return [{"config": Config(*tile, depth), "predicted_us": us + depth, **known} for depth in (1, 2, 3)]


def test_a_shortlist_holds_the_current_row_and_the_best_by_prediction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(TOLD, "lengths")
    current = Config(64, 64, 4, 3)
    found = screened(64, 64, 4, us=20) + screened(128, 64, 8, us=22) + screened(64, 32, 4, us=15)
    found += screened(128, 128, 8, us=30) + screened(64, 128, 4, us=5, refused="spills")
    found[2]["refused"] = "16 bytes on the stack"
    kept = tune_candidates.shortlist(dict.fromkeys(TOLD, current), found)
    # Two depths of each tile at most, nothing refused, and nothing that is expected to be 30 % slower.
    best = [Config(64, 32, 4, 1), Config(64, 32, 4, 2), Config(64, 64, 4, 1), Config(64, 64, 4, 2)]
    best += [Config(128, 64, 8, 1), Config(128, 64, 8, 2)]
    assert [row["config"] for row in kept] == [current, *best]
    assert kept[0]["reason"] == "current row; 16 bytes on the stack" and "refused" not in kept[0]
    assert kept[1]["reason"].startswith("-30% expected: 3 programs at once, each waits 50% of its time")


def test_every_way_to_tell_keys_has_its_share_of_the_menu() -> None:
    tiles = [(64, 64, 4), (64, 32, 4), (32, 64, 4), (128, 64, 8), (128, 32, 8)]
    found = [
        row
        for told, faster in ((MASK, 0.0), ("lengths", 9.0))
        for i, tile in enumerate(tiles)
        for row in screened(*tile, us=40.0 + i / 10 - faster, told=told)
    ]
    kept = tune_candidates.shortlist(dict.fromkeys(TOLD, Config(64, 64, 4, 2)), found)
    for told in TOLD:
        rows = [row for row in kept if row["told"] == told]
        assert len(rows) == tune_candidates.MOST // 2 and rows[0]["config"] == Config(64, 64, 4, 2)


def test_fewer_registers_are_asked_for_where_they_let_one_program_more_fit() -> None:
    config = Config(64, 64, 4, 3)
    row: Found = {"config": config, "registers": 137, "shared": 57344 - 1024, "costs": {"ctas": 3}}
    assert tune_candidates.tighter(row) == config._replace(max_registers=128)
    # Shared memory keeps the fourth out, a third of the registers would have to go, or it was asked for already.
    assert tune_candidates.tighter(row | {"shared": 65536}) is None
    assert tune_candidates.tighter(row | {"registers": 168}) == config._replace(max_registers=128)
    assert tune_candidates.tighter(row | {"registers": 170}) == config._replace(max_registers=128)
    assert tune_candidates.tighter(row | {"registers": 171}) is None
    # Twice the warps hold twice the registers: with 128 a thread a second program fits.
    wide = row | {"config": config._replace(num_warps=8), "costs": {"ctas": 1}}
    assert tune_candidates.tighter(wide) == config._replace(num_warps=8, max_registers=128)
    assert tune_candidates.tighter(row | {"config": config._replace(max_registers=136)}) is None


def examined(item: Item) -> Found:
    """What a compiler might say: the current row and 64x32 would fit once more with 128 registers, which makes them faster."""
    _, _, config, told = item
    us = {(64, 64): 20.0, (64, 32): 18.0}.get((config.block_m, config.block_n), 90.0) + config.num_warps
    found = {"registers": 137, "shared": 40000, "costs": {"ctas": 3}, "waiting": 0.5, "predicted_us": us}
    if config.max_registers is not None:
        found |= {"registers": config.max_registers, "predicted_us": us - 4, "costs": {"ctas": 4}}
    if config == HEADLINE[0].row(told).config:
        found["refused"] = "spills"
    return found


def never_compiled(item: Item) -> Found:
    return {"refused": "not compiled within 60 s"}


@pytest.fixture
def screen_as(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Screens questions where compilers say what it is given, and returns where the menu would be."""

    def screen(examine: Callable[[Item], Found], asked: list[Question]) -> Path:
        monkeypatch.setattr(tune_candidates, "examine", examine)
        tune_candidates.screen(asked, tmp_path / "menu.json", jobs=2)
        return tmp_path / "menu.json"

    return screen


def test_the_best_are_screened_once_more_with_fewer_registers(screen_as: Callable[..., Path]) -> None:
    rows = tune_candidates.read_candidates(screen_as(examined, HEADLINE[:1]))
    for told in TOLD:
        current, *others = (row for row in rows if row["told"] == told)
        assert current["config"] == HEADLINE[0].row(told).config
        assert current["reason"] == "current row; spills" and "refused" not in current
        limits = [row["config"].max_registers for row in others]
        assert 128 in limits and {None, 128} >= set(limits)
        assert others[0]["config"].max_registers == 128 and others[0]["predicted_us"] == 18.0 + 4 - 4
        # With 8 warps a fourth program never fits.
        assert all(row["config"].num_warps == 4 for row in others if row["config"].max_registers)


def test_a_question_whose_current_row_does_not_compile_is_left_out(
    screen_as: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert not screen_as(never_compiled, HEADLINE[:2]).exists()
    left = [line for line in capsys.readouterr().err.splitlines() if "is left out" in line]
    assert len(left) == 2 and left[0].startswith(f"{HEADLINE[0]} is left out: the current row, 64x64 w4 s3")


def test_amd_is_asked_for_no_limit_of_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    config, device = Config(64, 64, max_registers=128), torch.device("cpu")
    assert configs.limits_registers(config, device)
    assert not configs.limits_registers(config._replace(max_registers=None), device)
    monkeypatch.setattr(configs, "architecture", lambda device: configs.GFX942)
    assert not configs.limits_registers(config, device)


REGISTERS = """
from padfree._triton.configs import Config
from padfree_bench.tuning.tune import HEADLINE, questions
from padfree_bench.tuning.tune_candidates import examine

question = questions(HEADLINE, "forward")[0]
for most in (None, 120):
    print(examine(question.item(Config(64, 64, 4, 3, max_registers=most)))["registers"])
"""


def test_the_compiler_keeps_to_the_registers_that_it_may_use(tmp_path: Path) -> None:
    as_it_likes, limited = map(int, in_a_compiling_process(REGISTERS, tmp_path))
    assert limited == 120 < as_it_likes


def test_a_call_with_extras_may_use_all_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    key = ("forward", "half", 64)
    row = configs.Row(Config(64, 64, 4, 3, max_registers=128), "planted")
    monkeypatch.setitem(configs.TABLE, key, [row])
    configs.row_for.cache_clear()
    try:
        asked = ("forward", torch.bfloat16, 64, 400, torch.device("cpu"))
        assert configs.choose(*asked).max_registers == 128
        assert configs.choose(*asked, extras=1).max_registers is None
    finally:
        configs.row_for.cache_clear()


def test_configurations_are_stored_by_name_and_read_as_they_were_before(tmp_path: Path) -> None:
    path, config = tmp_path / "candidates.json", Config(64, 32, 8, 1)
    tune_candidates.write_lines(path, {"rows": [{"config": config, "told": MASK}]})
    (stored,) = json.loads(path.read_text())["rows"]
    assert stored["config"].items() >= {"block_m": 64, "block_n": 32, "num_warps": 8, "num_stages": 1}.items()
    for text in (stored["config"], [64, 32, 8, 1]):
        path.write_text(json.dumps({"rows": [{"config": text}]}))
        assert tune_candidates.read_candidates(path) == [{"config": config, "told": MASK}]
    for row in ({"config": stored["config"] | {"unknown": 1}}, stored | {"told": "by heart"}):
        path.write_text(json.dumps({"rows": [row]}))
        with pytest.raises(ValueError, match=r"^cannot read candidates from .*(unknown|by heart)"):
            tune_candidates.read_candidates(path)


def what_a_compiler_does(item: Item) -> Found:
    what = item[2] if isinstance(item, tuple) else item
    os.write(2, b"thousands of lines of MLIR\n")
    if what == "crash":
        faulthandler.disable()
        os.abort()
    if what == "raise":
        raise RuntimeError("PassManager::run failed\nand more")
    while what == "work" or (what == "sleep" and not time.sleep(60)):
        pass
    return {"registers": 32}


def test_a_compiler_that_crashes_stalls_or_raises_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    items = ["crash", "raise", "work", "sleep", "good"]
    found = dict(in_children(what_a_compiler_does, items, jobs=5, seconds=10))  # type: ignore[arg-type]
    assert found == {
        "crash": {"refused": "the compiler crashed"},
        "raise": {"refused": "PassManager::run failed"},
        "work": {"refused": "not compiled within 10 s"},
        "sleep": {"refused": "not compiled within 10 s"},
        "good": {"registers": 32},
    }
    assert capfd.readouterr().err == ""


# A compiler hands its code to an assembler, a process of its own, which says here who it is.
KILLED = """
import subprocess, sys
from padfree_bench.tuning.children import in_children

ASSEMBLE = "echo $$ > $0.new && mv $0.new $0 && exec sleep 60"
list(in_children(lambda path: subprocess.run(["sh", "-c", ASSEMBLE, path]), sys.argv[1:], jobs=1))
"""


def test_a_run_that_is_killed_leaves_no_assembler_beside_the_next_one(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT / 'bench'}"}
    path = tmp_path / "pid"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], env=environment)
    try:
        wait_for(path.exists)
        assembler = int(path.read_text())
    finally:
        process.kill()
        process.wait()
    try:
        wait_for(lambda: not is_running(assembler))
    except AssertionError:
        os.kill(assembler, signal.SIGKILL)
        pytest.fail("the assembler outlived the run")
