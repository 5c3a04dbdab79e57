"""The training suite: an honest baseline, and recipes that differ by one lever each."""

import sys
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from imdb_classifier.training.watch import STEPS_BETWEEN_READS
from padfree_bench import cli
from padfree_bench.measuring import profiling
from padfree_bench.measuring.results import NOT_RUN, load
from padfree_bench.peers import padfree_peers
from padfree_bench.reports.standing import is_ours, standing
from padfree_bench.suites import encoder, notebook_model, train
from padfree_bench.suites.models import UNLESS_NAMED, relative_errors
from padfree_bench.suites.recipes import RECIPES, Recipe, draw_reviews, make_batches, make_trainee
from tiny_bench import CPU, a_row

CASE = replace(train.SIZES["notebook"], batch=4, batches=3, seq=300)
KNOWN = {recipe.name: recipe for recipe in RECIPES}
# What each adds to the one before it.
LADDER = {
    "sdpa": "",
    "sdpa+cls": "cls_only",
    "sdpa+grouped": "grouped",
    "sdpa+launches": "fused",
    "ours-sdpa": "waits",
    "ours-padfree-padded": "attention",
    "ours-padfree": "packed",
}
Counted = list[str]


@pytest.fixture
def on_a_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """padfree's recipes on a CPU, with what the integration falls back to."""
    monkeypatch.setattr(padfree_peers, "check_kernel", lambda query: None)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """The calls by which the host waits for a device, as they are made; torch's Adam counts its steps on the host."""
    made: Counted = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu"):
        real: Callable[..., Any] = getattr(torch.Tensor, name)

        def counted(tensor: Any, *rest: Any, name: str = name, real: Callable[..., Any] = real) -> Any:
            if "optim" not in sys._getframe(1).f_code.co_filename:
                made.append(name)
            return real(tensor, *rest)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return made


def make_training(recipe: Recipe) -> train.Training:
    return train.Training(recipe, make_trainee(CASE, recipe, CPU), torch.float32)


def batches_of(recipe: Recipe) -> list[dict[str, Any]]:
    return make_batches(CASE, recipe, draw_reviews(CASE, 1), CPU, 1)


def test_the_notebooks_model_is_ours_in_its_own_arithmetic() -> None:
    source: Any = encoder.draw(CASE, "eager").double()
    inputs = batches_of(KNOWN["notebook"])[0]
    theirs = notebook_model.like(source.float()).double()
    out = source.double().eval()(inputs["input_ids"], inputs["attention_mask"])
    z = theirs.eval()(inputs["input_ids"])[:, 0]
    torch.testing.assert_close(z, out.logits[:, 1] - out.logits[:, 0], rtol=0, atol=1e-10)
    assert not theirs.pos_encoding.requires_grad


def test_the_notebooks_loop_has_none_of_our_levers(waits: Counted) -> None:
    training = make_training(KNOWN["notebook"])
    batches = batches_of(KNOWN["notebook"])
    waits.clear()
    training.epoch(batches)
    assert waits == ["item"] * len(batches)
    assert all(inputs["input_ids"].shape[1] == CASE.seq for inputs in batches)
    group = training.optimizer.param_groups[0]
    assert not group["fused"] and not group["foreach"] and group["lr"] == 1e-3
    rates = [m.p for m in training.trainee.module.modules() if isinstance(m, torch.nn.Dropout)]
    assert rates == [0.1, 0.1]


def test_the_notebooks_accuracy_waits_once_a_batch_and_counts_right(waits: Counted) -> None:
    batches = batches_of(KNOWN["notebook"])
    model = notebook_model.like(encoder.draw(CASE, "eager")).eval()
    waits.clear()
    share = notebook_model.accuracy(model, batches, CPU)
    assert waits == ["item"] * len(batches)
    z = torch.cat([model(inputs["input_ids"])[:, 0] for inputs in batches])
    labels = torch.cat([inputs["labels"] for inputs in batches])
    assert share == ((z > 0) == (labels == 1)).double().mean()


def test_each_recipe_adds_one_lever() -> None:
    def differ(one: Recipe, other: Recipe) -> set[str]:
        changed = {f.name for f in fields(Recipe) if getattr(one, f.name) != getattr(other, f.name)}
        return changed - {"name", "note"}

    chain = [KNOWN[name] for name in LADDER]
    for before, after in pairwise(chain):
        assert differ(before, after) == {LADDER[after.name]}
    packed = KNOWN["ours-padfree"]
    assert differ(packed, KNOWN["ours-padfree+compile"]) == {"buckets", "compile_mode"}
    assert differ(packed, KNOWN["ours-padfree+graphs"]) == {"buckets", "graphs"}
    assert differ(KNOWN["sdpa"], KNOWN["eager"]) == {"attention"}


def test_ours_is_held_against_sdpa_with_the_same_levers() -> None:
    ours = [recipe for recipe in RECIPES if is_ours(recipe.name)]
    assert all(recipe.cls_only and recipe.grouped and recipe.fused for recipe in ours)
    rows = [
        a_row(name, ms) for name, ms in (("notebook", 9.0), ("sdpa+launches", 2.0), ("ours-padfree", 1.0))
    ]
    found = standing(rows)
    assert found is not None and found.ours is not None
    assert (found.ours.peer, found.baseline.peer, found.best.peer) == (
        "ours-padfree",
        "notebook",
        "sdpa+launches",
    )


def test_a_recipe_without_waits_reads_every_20_steps(waits: Counted) -> None:
    training = make_training(KNOWN["ours-sdpa"])
    batches = batches_of(KNOWN["ours-sdpa"])[:1]
    waits.clear()
    training.epoch(batches * (STEPS_BETWEEN_READS - 1))
    assert not waits
    training.epoch(batches)
    assert waits == ["tolist"]


@pytest.mark.usefixtures("on_a_reference")
def test_every_recipe_has_the_notebooks_answers_on_the_same_reviews(monkeypatch: pytest.MonkeyPatch) -> None:
    # padfree runs in Triton's interpreter
    monkeypatch.setattr(sys.modules[__name__], "CASE", replace(CASE, batches=2, seq=150))
    for recipe in RECIPES:
        if recipe.compile_mode:
            continue
        reference = replace(train.REFERENCE, grouped=recipe.grouped)
        trainee = make_trainee(CASE, reference, CPU)
        trainee.module.double()
        exact = train.answers(trainee, batches_of(reference)[0], torch.float64)
        found = train.answers(make_trainee(CASE, recipe, CPU), batches_of(recipe)[0], torch.float32)
        assert max(relative_errors(found, exact)) < 1e-5, recipe.name


@pytest.mark.usefixtures("on_a_reference")
def test_what_a_recipe_pads_is_what_it_says() -> None:
    case = replace(CASE, batch=2, batches=6)  # some of two reviews are shorter than the cut
    data = draw_reviews(case, 1)

    def sizes(name: str) -> list[int]:
        return [inputs["input_ids"].numel() for inputs in make_batches(case, KNOWN[name], data, CPU, 1)]

    assert sizes("sdpa") == [case.batch * case.seq] * case.batches
    assert sum(sizes("ours-sdpa")) < sum(sizes("sdpa"))
    assert sum(sizes("ours-padfree")) == len(data.ids)
    step = case.batch * case.seq // 8
    assert all(size % step == 0 for size in sizes("ours-padfree+graphs"))


def test_what_compiles_runs_on_a_cpu_only_when_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = [KNOWN[name] for name in ("notebook", "compile-sdpa", "ours-padfree+compile")]
    monkeypatch.setattr(train, "RECIPES", recipes)
    monkeypatch.setattr(train, "SIZES", {"notebook": replace(CASE, seq=40)})
    assert cli.main(["train", "--quick", "--no-pictures", "--output", str(tmp_path)]) == 0
    rows = load(next(tmp_path.glob("*/train.json"))).rows
    assert [row.status == NOT_RUN for row in rows] == [False, True, True]
    assert rows[1].reason == UNLESS_NAMED and rows[2].reason.startswith("no GPU")


def test_launches_and_waits_are_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    row = a_row("ours-padfree", 1.0)
    monkeypatch.setattr(profiling, "count_launches", lambda call: (1402, 1, "kernel"))
    profiling.fill_launches(row, lambda: None, steps=20)
    assert (row.launches, row.syncs) == (70, 0.05)
    profiling.fill_launches(row, lambda: None)
    assert (row.launches, row.syncs) == (1402, 1)
