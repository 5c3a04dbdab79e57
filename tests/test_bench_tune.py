"""`python -m bench tune` times every kernel alone, lets no wrong or slow one win, and keeps every answer."""

import json
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
from padfree_bench.tuning import tune
from padfree_bench.tuning.children import Found
from padfree_bench.tuning.work import MASK, TOLD, Question, Work
from tiny_bench import CPU

SMALL = "B2-H2-D8-S40-pad50-fp16"
HEADLINE = tune.questions(tune.HEADLINE, ",".join(tune.PASSES))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Question]]:
    """Questions whose kernels run here, under the interpreter, timed without graphs."""
    monkeypatch.setattr(tune, "capture_graph", lambda make: make())
    monkeypatch.setattr(tune, "Effort", lambda *_, **__: timing.Effort(least=1, most=1, warmup=1))
    cached = tune.prepared
    yield tune.questions(SMALL, ",".join(tune.PASSES))
    cached.cache_clear()


def ask(question: Question, *configs: Config, seconds: float = 60) -> list[Found]:
    rows: list[Found] = [{"config": config, "told": MASK} for config in (question.row().config, *configs)]
    tune.time_candidates(question, rows, CPU, time.monotonic() + seconds)
    return rows


def test_every_pass_is_launched_alone_and_right_with_any_tile(small: list[Question]) -> None:
    for question in small:
        for row in ask(question, Config(32, 16, 4, 1)):
            assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"] and "refused" not in row


def changed(name: str, change: Callable[[torch.Tensor], object]) -> Callable[..., dict[str, torch.Tensor]]:
    launch = Work.launch

    def wrong(
        work: Work, passname: str, config: Config | None = None, told: str = MASK
    ) -> dict[str, torch.Tensor]:
        found = launch(work, passname, config, told)
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
        return {"d_key": fresh_pages.as_strided(work.calls[MASK].key.shape, work.calls[MASK].key.stride())}

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
    with pytest.raises(DeviceLost, match="forward .* 32x16 w4 s1 mask: illegal access"):
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
        times = {"p20_us": p20, "p50_us": p50, "p80_us": p80, "predicted_us": p50}
        return {"config": config, "told": MASK, **times}

    question = HEADLINE[0]
    rows = [row(question.row().config, 90, 100, 110), row(Config(128, 64, 8, 3), *best)]
    rows.append(row(Config(128, 128, 8, 3), 1, 1, 1) | {"refused": "wrong answer"})
    (answer,) = tune.decide(question, rows, on_gpu)
    assert (answer["config"], answer["accepted"]) == (Config(128, 64, 8, 3), accepted)
    assert not tune.decide(question, rows[:1], True)[0]["accepted"]
    # Nothing beats a row that was not timed.
    not_timed = {"config": question.row().config, "told": MASK}
    assert not tune.decide(question, [not_timed, rows[1]], True)[0]["accepted"]


def test_ways_to_tell_keys_are_timed_side_by_side_and_decided_apart(
    small: list[Question], tmp_path: Path
) -> None:
    path, tried = tmp_path / "candidates.json", Config(32, 16, 4, 1)
    rows = [{"pass": "forward", "case": SMALL, "config": tried, "told": told} for told in ("lengths", MASK)]
    tune.write_lines(path, {"rows": rows})
    offered = tune.offers(small[:1], path)[small[0]]
    now = small[0].row().config
    assert [(row["config"], row["told"]) for row in offered] == [
        (now, MASK), (tried, MASK), (now, "lengths"), (tried, "lengths"),
    ]  # fmt: skip
    tune.time_candidates(small[0], offered, CPU, time.monotonic() + 60)
    assert all("p50_us" in row for row in offered)
    for answer, told in zip(tune.decide(small[0], offered, True), TOLD, strict=True):
        times = [row["p50_us"] for row in offered if row["told"] == told]
        assert answer["told"] == told and answer["best_us"] == min(times) and answer["current_us"] == times[0]


def test_accepted_rows_serve_short_sequences_on_their_architecture_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "TABLE", {key: list(rows) for key, rows in configs.TABLE.items()})
    path, best = tmp_path / "tune.json", Config(128, 128, 8, 2)
    answers = [
        tune.decide(question, [{"config": best, "told": MASK}], False)[0]
        | {"accepted": question.passname != "key_gradient"}
        for question in HEADLINE
    ]
    told = answers[0] | {"told": "lengths", "config": [16, 16, 4, 1]}
    tune.write_lines(path, {"answers": [*answers, told]})
    assert [row["pass"] for row in tune.apply_rows(path)] == ["forward", "query_gradient"] * 2 + ["forward"]
    row_for, half = configs.row_for, torch.bfloat16
    assert row_for("forward", half, 64, 400, 90).config == best
    assert row_for("query_gradient", half, 16, 1024, 90).config == best
    assert row_for("forward", half, 64, 400, 90, known=True).config == Config(16, 16, 4, 1)
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
    assert [(a["pass"], a["case"], a["told"]) for a in content["answers"]] == [
        (q.passname, q.case.id, told) for q in HEADLINE for told in TOLD
    ]
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

    def killed(question: Question, *rest: object) -> list[Found]:
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
    assert [(a["pass"], a["told"]) for a in content["answers"]] == [
        (passname, told) for passname in ("forward", "query_gradient") for told in TOLD
    ]
    assert content["basis"].startswith("measured") and content["not_reached"] == [f"key_gradient {SMALL}"]
    timed = [("p50_us" in row, row.get("refused")) for row in content["rows"]]
    # With the mask and both tried configurations, and once more the current row with lengths, for each of two passes.
    assert timed == [(True, None), (True, None), (False, "the compiler crashed"), (True, None)] * 2


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
