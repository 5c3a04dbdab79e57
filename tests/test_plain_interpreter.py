"""Triton's interpreter as users have it, without what the test suite's checker mends: right, or refused in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

import padfree
from imdb_classifier.attention import choose_attention
from padfree.integrations.transformers import enable

ROOT = Path(__file__).resolve().parents[1]
REFUSED = "Triton's interpreter gets bf16 wrong"

JUDGE = """
import json
from functools import partial
import torch
import padfree
from padfree.testing import assert_matches_reference, make_inputs

kernel, judged, wrong = partial(padfree.attention, impl="triton"), 0, []
reasons = [padfree.why_not(torch.empty(0, dtype=dtype)) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
for dtype in (torch.float32, torch.float16) if reasons[0] is None else ():
    for padding in ("right", "holes", "zero_keys"):
        # Eight draws, as on a GPU: how numpy sums a product depends on the processor, and 272 elements tell too little.
        inputs = [
            make_inputs(2, 1, 17, 17, 8, dtype=dtype, padding=padding, lse_gradient=True, seed=seed) for seed in range(8)
        ]
        judged += 1
        try:
            assert_matches_reference(kernel, inputs)
        except AssertionError as error:
            wrong.append(f"{dtype} {padding}: {error}")
print(json.dumps({"reasons": reasons, "judged": judged, "wrong": wrong}))
"""


@pytest.fixture(scope="module")
def without_checker() -> dict[str, Any]:
    """What a process of its own says of each dtype, and by the error rule of those that it runs."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", JUDGE],
        env=environment, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_fp32_and_fp16_obey_the_error_rule_or_are_refused(without_checker: dict[str, Any]) -> None:
    fp32, fp16, _ = without_checker["reasons"]
    assert fp32 == fp16
    if fp32 is not None:
        assert "interpreter does not work with NumPy" in fp32
    else:
        assert without_checker["judged"] == 6
    assert not without_checker["wrong"]


def test_bf16_is_refused(without_checker: dict[str, Any]) -> None:
    assert REFUSED in without_checker["reasons"][2]


@pytest.fixture
def plain_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user's process refuses, in this one."""
    monkeypatch.setattr(padfree._dispatch, "INTERPRETED_DTYPES", (torch.float32, torch.float16))


@pytest.mark.usefixtures("plain_interpreter")
def test_every_door_refuses_bf16() -> None:
    query = torch.zeros(1, 4, 2, 16, dtype=torch.bfloat16, device="cpu")
    cu = torch.tensor([0, 4], dtype=torch.int32)
    for call in (
        lambda: padfree.attention(query, query, query, impl="triton"),
        lambda: padfree.attention_varlen(query[0], query[0], query[0], cu, cu, 4, 4, impl="triton"),
        lambda: padfree.attention_qkvpacked(torch.stack([query] * 3, 2), impl="triton"),
        lambda: choose_attention("padfree", "cpu", torch.bfloat16),
    ):
        with pytest.raises(RuntimeError, match=REFUSED):
            call()
    assert choose_attention("auto", "cpu", torch.bfloat16)[0] == "sdpa"


@pytest.mark.usefixtures("plain_interpreter")
def test_a_bf16_encoder_is_refused_under_strict_and_falls_back_without() -> None:
    config = BertConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32, vocab_size=50
    )
    model = BertModel(config).eval().to(torch.bfloat16)
    ids = torch.arange(12).reshape(2, 6)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    wanted = model(ids, attention_mask=mask).last_hidden_state
    with pytest.raises(RuntimeError, match=REFUSED):
        enable(model, strict=True)(ids, attention_mask=mask)
    with pytest.warns(UserWarning, match=REFUSED):
        got = enable(model)(ids, attention_mask=mask).last_hidden_state
    assert torch.equal(got[0], wanted[0])
