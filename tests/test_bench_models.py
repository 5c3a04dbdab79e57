"""What may be timed as a whole model: a wrong mask is refused in bf16 too, where rounding is large."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from padfree_bench.measuring.results import OK, Result, Row
from padfree_bench.measuring.timing import Effort
from padfree_bench.peers import padfree_peers
from padfree_bench.suites import encoder, hf, train
from padfree_bench.suites.models import Batch, ModelCase, ModelPeer, run_model_case
from padfree_bench.suites.recipes import RECIPES, Recipe
from padfree_bench.suites.session import Session

SESSION = cast(
    Session,
    SimpleNamespace(
        device=torch.device("cpu"),
        effort=Effort(seconds=0.01, least=1, most=1, warmup=1),
        seed=0,
        result=Result("test", {}),
        options=Namespace(quick=True),
    ),
)
CASES = {
    "notebook": (
        encoder,
        replace(encoder.SIZES["notebook"], batch=8, seq=200, dtype="bf16", lengths="pad50"),
    ),
    "d128": (encoder, replace(encoder.SIZES["d128"], batch=8, seq=100, dtype="bf16", lengths="pad50")),
    "bert": (hf, replace(hf.SIZES["bert-tiny"], batch=4, seq=100, dtype="bf16", lengths="pad50")),
}
WRONG: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "ignored": torch.ones_like,
    "one too many": lambda mask: mask | mask.roll(1, 1),
    "one too few": lambda mask: mask & torch.nn.functional.pad(mask[:, 1:], (0, 1)),
}


def with_mask(peer: ModelPeer, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> ModelPeer:
    def on_batch(model: Any, batch: Batch, dtype: torch.dtype) -> tuple[Callable[[], torch.Tensor], str]:
        changed = replace(batch)
        forward = peer.on_batch(model, changed, dtype)
        # Read by forward() at each call; what hf compares was chosen before.
        changed.attention_mask = change(changed.attention_mask)
        return forward

    return replace(peer, name=name, on_batch=on_batch)


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_mask_is_refused_in_bf16(name: str) -> None:
    module, case = CASES[name]
    known = {peer.name: peer for peer in module.PEERS}
    reference, right = known["eager"], known["sdpa"]
    peers = [with_mask(reference, kind, change) for kind, change in WRONG.items()]
    parts = run_model_case(SESSION, case, [*peers, right], reference, ["inference", "training"])
    rows = [row for part in parts for row in part]
    assert [(row.peer, row.direction) for row in rows if row.status == OK] == [
        ("sdpa", "inference"),
        ("sdpa", "training"),
    ]
    for row in rows:
        assert row.status == OK or row.reason.startswith("wrong answer"), row.reason


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_training_step_with_a_wrong_gradient_is_not_timed(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_trainee(case: ModelCase, recipe: Recipe, device: torch.device) -> Any:
        trainee = real(case, recipe, device)
        if recipe.name == "sdpa":
            cast(Any, trainee.module).layers[0].mha.wv.weight.register_hook(lambda grad: 1.5 * grad)
        return trainee

    real = train.make_trainee
    monkeypatch.setattr(train, "make_trainee", make_trainee)
    case = replace(train.SIZES["notebook"], dtype=dtype, batch=4, batches=2, seq=40)
    recipes = [recipe for recipe in RECIPES if recipe.name in ("sdpa", "sdpa+cls", "ours-sdpa")]
    (rows,) = train.run_case(SESSION, case, recipes)
    assert [row.status == OK for row in rows] == [False, True, True]
    assert rows[0].reason.startswith("wrong answer, not timed")


def rows_of(module: Any, case: ModelCase, names: list[str], modes: list[str]) -> list[Row]:
    known = {peer.name: peer for peer in module.PEERS}
    peers = [known[name] for name in names]
    return [row for part in run_model_case(SESSION, case, peers, known["eager"], modes) for row in part]


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_the_notebook_and_padfrees_packed_encoders_have_its_answers(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(padfree_peers, "check_kernel", lambda query: None)  # Triton's interpreter
    case = replace(encoder.SIZES["notebook"], batch=3, seq=40, lengths="pad50")
    names = ["notebook", "nn.TransformerEncoder", "padfree-packed", "padfree-packed+pack"]
    rows = rows_of(encoder, case, names, [mode])
    assert [(row.status, row.reason) for row in rows] == [(OK, "")] * 4
    assert [row.ran.split(", ")[-1] for row in rows[2:]] == ["packed by the collator", "packed by the model"]


def test_torch_takes_its_fast_path_in_inference_and_the_row_says_so() -> None:
    case = replace(encoder.SIZES["notebook"], batch=3, seq=40, lengths="pad50")
    (row,) = rows_of(encoder, case, ["nn.TransformerEncoder"], ["inference"])
    assert "fast path taken (aten::_transformer_encoder_layer_fwd)" in row.ran
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        inference, training = rows_of(encoder, case, ["nn.TransformerEncoder"], ["inference", "training"])
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert "fast path not taken" in inference.ran and "fast path" not in training.ran
