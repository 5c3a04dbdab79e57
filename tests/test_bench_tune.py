"""`python -m bench tune`: what it asks, compiles and times is what the benchmark launches; wrong or slow never wins."""

import faulthandler
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from padfree._triton import configs
from padfree._triton.configs import Config
from padfree_bench.measuring import timing
from padfree_bench.measuring.errors import DeviceLost
from padfree_bench.tuning import tune, tune_candidates
from padfree_bench.tuning.tune_candidates import Found, Item, Question, Work

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SMALL = "B2-H2-D8-S40-pad50-fp16"
HEADLINE = tune.questions(tune.HEADLINE, ",".join(tune.PASSES))

# The hash is Triton's name for a compiled kernel, in its cache too: made of source, types, divisibility and constants.
SAME_KERNELS = """
import torch
from padfree._triton import autograd
from padfree_bench.compiled.aot import compile_only
from padfree_bench.compiled.aot_calls import KERNELS
from padfree_bench.measuring.inputs import make_inputs
from padfree_bench.tuning.tune import PASSES, questions
from padfree_bench.tuning.tune_candidates import compile_candidate

torch.set_num_threads(1)
asked = questions({case!r}, ",".join(PASSES))
inputs = make_inputs(asked[0].case, "cpu")
leaves = [x.detach().requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
with compile_only(90, tuple(KERNELS[name][0] for name in PASSES)) as launched:
    out, _ = autograd.run(*leaves, inputs.padding, None, autograd.KernelOptions.of(inputs.query, None, 0.0, None, True))
    torch.autograd.grad(out, leaves, inputs.d_out)
for question, kernel in zip(asked, launched, strict=True):
    mine = compile_candidate(question.passname, question.case, question.row.config)
    print(question, kernel.kernel.hash == mine.kernel.hash and kernel.grid == mine.grid)
"""


@pytest.mark.parametrize("case", tune.HEADLINE.split(","))
def test_what_is_compiled_beforehand_is_what_the_benchmark_launches(case: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT / 'bench'}", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SAME_KERNELS.format(case=case)],
        env=environment, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [f"{name} {case} True" for name in tune.PASSES], done.stderr


def test_the_screened_candidates_belong_to_todays_table() -> None:
    rows = tune_candidates.read_candidates(tune.CANDIDATES)
    for question in HEADLINE:
        configs = [
            r["config"] for r in rows if (r["pass"], r["case"]) == (question.passname, question.case.id)
        ]
        assert question.row.config in configs, f"{question}: run python -m bench tune --screen"
        assert 2 < len(set(configs)) == len(configs) <= tune_candidates.MOST


def test_what_to_compile_beforehand_can_be_sent_to_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[object, ...]] = []
    monkeypatch.setattr(tune_candidates, "compile_candidate", lambda *item: compiled.append(item))
    items = tune.warm_items()
    assert pickle.loads(pickle.dumps(items)) == items
    for item in items:
        tune.compile_item(json.loads(json.dumps(item)))
    offered = tune.offers(HEADLINE)
    assert compiled == [(q.passname, q.case, row["config"]) for q, rows in offered.items() for row in rows]
    assert all(isinstance(config, Config) for _, _, config in compiled)


def test_what_is_not_compiled_within_half_of_the_time_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "compile_item", what_a_compiler_does)
    rows: dict[Question, list[Found]] = {question: [{"config": "sleep"}] for question in HEADLINE[:2]}
    rows[HEADLINE[0]].append({"config": "good"})
    list(tune.in_children(what_a_compiler_does, [], jobs=1))  # pays what the first call in a process costs
    # Half of it is for "good", however busy the machine; a sleeper would take four times the half.
    tune.compile_beforehand(rows, jobs=3, deadline=time.monotonic() + 30)
    late = {"config": "sleep", "refused": "not compiled in half of the time given"}
    assert rows == {HEADLINE[0]: [late, {"config": "good", "registers": 32}], HEADLINE[1]: [late]}


def test_a_shortlist_holds_the_current_row_and_the_best_of_every_tile() -> None:
    current = Config(64, 64, 4, 3)

    def rows(*tile: int, us: float, **more: object) -> list[Found]:
        depths = (1, 2, 3, 4)
        return [{"config": Config(*tile, depth), "predicted_us": us + depth, **more} for depth in depths]

    found = (
        rows(64, 64, 4, us=20) + rows(128, 64, 8, us=22) + rows(128, 64, 4, us=21) + rows(64, 32, 4, us=23)
    )
    found += rows(128, 128, 8, us=28) + rows(64, 128, 4, us=5, refused="spills")
    found[2]["refused"] = "16 bytes on the stack"
    kept = tune_candidates.shortlist(current, found)
    tiles = [(64, 64, 4), (128, 64, 4), (128, 64, 8), (64, 32, 4)]
    first, second = [Config(*tile, 3) for tile in tiles], [Config(*tile, 4) for tile in tiles]
    first[0], second[0] = Config(64, 64, 4, 4), Config(64, 64, 4, 2)  # the current row is not offered twice
    assert [row["config"] for row in kept[:9]] == [current, *first, *second]
    assert len(kept) == tune_candidates.MOST
    assert kept[0]["reason"] == "current row; 16 bytes on the stack" and "refused" not in kept[0]


def what_a_compiler_does(item: Item) -> Found:
    what = item[-1] if isinstance(item, tuple) else item
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
    found = dict(tune_candidates.in_children(what_a_compiler_does, items, jobs=5, seconds=10))  # type: ignore[arg-type]
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
from padfree_bench.tuning.tune_candidates import in_children

ASSEMBLE = "echo $$ > $0.new && mv $0.new $0 && exec sleep 60"
list(in_children(lambda path: subprocess.run(["sh", "-c", ASSEMBLE, path]), sys.argv[1:], jobs=1))
"""


def test_a_run_that_is_killed_leaves_no_assembler_beside_the_next_one(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT / 'bench'}"}
    path = tmp_path / "pid"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], env=environment)
    try:
        while not path.exists():
            time.sleep(0.05)
        assembler = int(path.read_text())
    finally:
        process.kill()
        process.wait()
    # ten minutes: it takes a moment, or does not come
    for _ in range(6000):
        status = Path(f"/proc/{assembler}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    os.kill(assembler, signal.SIGKILL)
    pytest.fail("the assembler outlived the run")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Question]]:
    """Questions whose kernels run here, under the interpreter, timed without graphs."""
    monkeypatch.setattr(tune, "capture_graph", lambda make: make())
    monkeypatch.setattr(tune, "Effort", lambda *_, **__: timing.Effort(least=1, most=1, warmup=1))
    cached = tune.prepared
    yield tune.questions(SMALL, ",".join(tune.PASSES))
    cached.cache_clear()


def ask(question: Question, *configs: Config, seconds: float = 60) -> list[Found]:
    rows: list[Found] = [{"config": config} for config in (question.row.config, *configs)]
    tune.time_candidates(question, rows, CPU, time.monotonic() + seconds)
    return rows


def test_every_pass_is_launched_alone_and_right_with_any_tile(small: list[Question]) -> None:
    for question in small:
        for row in ask(question, Config(32, 16, 4, 1)):
            assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"] and "refused" not in row


def changed(name: str, change: Callable[[torch.Tensor], object]) -> Callable[..., dict[str, torch.Tensor]]:
    launch = Work.launch

    def wrong(work: Work, passname: str, config: Config | None = None) -> dict[str, torch.Tensor]:
        found = launch(work, passname, config)
        if config == Config(32, 16, 4, 1):
            change(found[name])
        return found

    return wrong


CHANGES = [
    (0, "out", lambda x: x.mul_(1.1)),
    (0, "out", lambda x: x[:, :, -1].fill_(1.0)),
    (0, "lse2", lambda x: x[0, 0, 0].add_(0.1)),
    (1, "d_query", lambda x: x[0, 0, 0].fill_(float("nan"))),
    (1, "delta", lambda x: x.mul_(1.01)),
    (2, "d_key", lambda x: x.zero_()),
    (2, "d_value", lambda x: x[0, 1].copy_(x[0, 0])),
]


@pytest.mark.parametrize(("index", "name", "change"), CHANGES)
def test_a_wrong_candidate_is_refused_and_never_timed(
    index: int, name: str, change: Callable, small: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Work, "launch", changed(name, change))
    now, wrong = ask(small[index], Config(32, 16, 4, 1))
    assert "p50_us" in now and "p50_us" not in wrong
    assert wrong["refused"].startswith("wrong answer") and name in wrong["refused"]


def test_what_a_kernel_leaves_out_is_not_found_in_old_memory(
    small: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgets(work: Work, *_: object) -> dict[str, torch.Tensor]:
        fresh_pages = torch.empty(1 << 24, dtype=torch.float16)  # the system hands them out as zeros
        return {"d_key": fresh_pages.as_strided(work.call.key.shape, work.call.key.stride())}

    ask(small[2])
    monkeypatch.setattr(Work, "launch", forgets)
    (row,) = ask(small[2])
    assert "d_key nan" in row["refused"]


def test_a_candidate_that_raises_is_a_row_and_a_lost_gpu_ends_the_run(
    small: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_(error: Exception, _: torch.Tensor) -> None:
        raise error

    out_of_memory, lost = RuntimeError("out of resource\nHint"), torch.AcceleratorError("illegal access")
    with monkeypatch.context() as patch:
        patch.setattr(Work, "launch", changed("out", partial(raise_, out_of_memory)))
        now, refused = ask(small[0], Config(32, 16, 4, 1))
    assert "p50_us" in now and refused["refused"] == "out of resource"
    monkeypatch.setattr(Work, "launch", changed("out", partial(raise_, lost)))
    with pytest.raises(DeviceLost, match=r"forward .*\(32, 16, 4, 1\): illegal access"):
        ask(small[0], Config(32, 16, 4, 1))


def test_no_candidate_begins_after_the_time_given(small: list[Question]) -> None:
    with pytest.raises(tune.OutOfTime):
        ask(small[0], seconds=-1)


@pytest.mark.parametrize(
    ("best", "on_gpu", "accepted"),
    [((70, 80, 89), True, True), ((70, 80, 91), True, False), ((70, 80, 89), False, False)],
)
def test_only_a_measured_winner_clear_of_noise_is_accepted(
    best: tuple[int, int, int], on_gpu: bool, accepted: bool
) -> None:
    def row(config: Config, p20: float, p50: float, p80: float) -> Found:
        return {"config": config, "p20_us": p20, "p50_us": p50, "p80_us": p80, "predicted_us": p50}

    question = HEADLINE[0]
    rows = [row(question.row.config, 90, 100, 110), row(Config(128, 64, 8, 3), *best)]
    rows.append(row(Config(128, 128, 8, 3), 1, 1, 1) | {"refused": "wrong answer"})
    answer = tune.decide(question, rows, on_gpu)
    assert (answer["config"], answer["accepted"]) == ((128, 64, 8, 3), accepted)
    assert not tune.decide(question, rows[:1], True)["accepted"]
    # Nothing beats a row that was not timed.
    assert not tune.decide(question, [{"config": question.row.config}, rows[1]], True)["accepted"]


def test_accepted_rows_serve_short_sequences_on_their_architecture_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "TABLE", {key: list(rows) for key, rows in configs.TABLE.items()})
    path, best = tmp_path / "tune.json", Config(128, 128, 8, 2)
    answers = [
        tune.decide(question, [{"config": best}], False) | {"accepted": question.passname != "key_gradient"}
        for question in HEADLINE
    ]
    tune.write_lines(path, {"answers": answers})
    assert [row["pass"] for row in tune.apply_rows(path)] == ["forward", "query_gradient"] * 2
    row_for, half = configs.row_for, torch.bfloat16
    assert row_for("forward", half, 64, 400, 90).config == best
    assert row_for("query_gradient", half, 16, 1024, 90).config == best
    for passname, *key in (
        ("forward", 64, 1025, 90),
        ("forward", 64, 400, 90, True),  # what was measured had no mask, dropout or the like
        ("query_gradient", 16, 1025, 90),
        ("forward", 64, 400, 100),
        ("key_gradient", 64, 400, 90),
    ):
        assert row_for(passname, half, *key).config != best
    row_for.cache_clear()
    for text in ("", "[]", '{"answers": [{"accepted": true}]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"^cannot read tuned rows from .*tune.json: "):
            tune.apply_rows(path)


def test_a_rehearsal_answers_every_question_and_accepts_nothing(tmp_path: Path) -> None:
    assert tune.main(["--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/tune.json")
    content = json.loads(path.read_text())
    assert content["basis"].startswith("predicted") and not content["not_reached"]
    assert [(a["pass"], a["case"]) for a in content["answers"]] == [(q.passname, q.case.id) for q in HEADLINE]
    assert all(a["best_us"] <= a["current_us"] and not a["accepted"] for a in content["answers"])


def test_a_run_on_a_gpu_saves_every_answer_as_it_comes(
    small: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's name stands for it: kernels run under the interpreter, and the third question is killed."""
    prepared, gpu = tune.prepared, torch.device("cuda")
    monkeypatch.setattr(tune, "prepared", lambda case, device: prepared(case, CPU))
    monkeypatch.setattr(tune, "measure", lambda calls, device, effort: timing.measure(calls, CPU, effort))
    monkeypatch.setattr(tune, "own_stream", lambda device: timing.own_stream(CPU))
    monkeypatch.setattr(tune.machine, "pick_device", lambda: gpu)
    monkeypatch.setattr(tune.machine, "device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(tune.machine, "environment", lambda *_: {})
    monkeypatch.setattr(tune, "why_not_compile", lambda: None)
    monkeypatch.setattr(tune.configs, "architecture", lambda device: tune.ARCH if device == gpu else 0)
    refused = {Config(16, 16, 4, 1): {"refused": "the compiler crashed"}}
    monkeypatch.setattr(
        tune,
        "in_children",
        lambda _, items, jobs, until: [(item, refused.get(item[2], {})) for item in items],
    )
    decide = tune.decide

    def killed(question: Question, *rest: object) -> Found:
        if question.passname == "key_gradient":
            raise KeyboardInterrupt
        return decide(question, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(tune, "decide", killed)
    path = tmp_path / "candidates.json"
    rows = [
        {"pass": q.passname, "case": SMALL, "config": c}
        for q in small
        for c in (Config(32, 16, 4, 1), Config(16, 16, 4, 1))
    ]
    tune.write_lines(path, {"rows": rows})
    with pytest.raises(KeyboardInterrupt):
        tune.main(["--cases", SMALL, "--candidates", str(path), "--output", str(tmp_path), "--minutes", "5"])
    content = json.loads((tmp_path / "h100" / "tune.json").read_text())
    assert [a["pass"] for a in content["answers"]] == ["forward", "query_gradient"]
    assert content["basis"].startswith("measured") and content["not_reached"] == [f"key_gradient {SMALL}"]
    timed = [("p50_us" in row, row.get("refused")) for row in content["rows"]]
    assert timed == [(True, None), (True, None), (False, "the compiler crashed")] * 2


def test_a_run_that_answers_nothing_fails_and_leaves_no_older_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "card" / "tune.json"
    old.parent.mkdir()
    tune.write_lines(old, {"answers": [{"accepted": True}]})
    monkeypatch.setattr(tune.machine, "device_slug", lambda device: "card")
    monkeypatch.setattr(tune, "offers", lambda *_: {})
    assert tune.main(["--output", str(tmp_path)]) == 1
    assert "no question was answered" in capsys.readouterr().err
    assert json.loads(old.read_text())["answers"] == []
    assert len(list((old.parent / "earlier").iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cases", "B64"], "shape must look like"),
        (["--cases", "B64-H4-D8-S400-imdb-fp32"], "cases must be 16-bit"),
        (["--passes", "forward,backward"], "got 'backward'"),
        (["--cases", SMALL], "python -m bench tune --screen"),
        (["--candidates", "nowhere.json"], "cannot read candidates from nowhere.json"),
    ],
)
def test_a_bad_argument_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m bench tune: ") and said in line
