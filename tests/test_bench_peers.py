"""A peer is timed only if its answer is right: one wrong key or gradient or a NaN refuses it."""

import functools
import math
from dataclasses import replace

import pytest
import torch

from padfree_bench.measuring.cases import Case
from padfree_bench.measuring.check import compute_truth
from padfree_bench.measuring.inputs import make_inputs
from padfree_bench.measuring.results import NOT_RUN, OK, UPPER_BOUND
from padfree_bench.peers import PEERS, Peer, choose_peers
from padfree_bench.peers.base import Prepared, Refused, padded
from padfree_bench.suites.attention import admit
from tiny_bench import CPU, SMALL, rows_of


def wrong_peer(inputs, training: bool) -> Prepared:  # type: ignore[no-untyped-def]
    """Reads one padded key of every sequence."""
    mask = inputs.keep.clone()
    mask[:, -1] = True
    return padded(
        inputs,
        training,
        lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None, None]),
        "",
    )


class TestPeers:
    @pytest.mark.parametrize("name", ["eager", "nn.MultiheadAttention", "sdpa", "sdpa-math", "nested"])
    @pytest.mark.parametrize("training", [False, True])
    def test_every_cpu_peer_passes_the_check(self, name: str, training: bool) -> None:
        inputs = make_inputs(SMALL, CPU)
        contender = admit(PEERS[name], inputs, compute_truth(inputs), training)
        assert contender.row.status == OK, contender.row.reason

    def test_a_peer_that_sees_one_padded_key_is_refused_before_the_clock(self) -> None:
        peers = [Peer("wrong", wrong_peer, ""), PEERS["sdpa"]]
        rows = {row.peer: row for row in rows_of(SMALL, peers, ["forward"])}
        assert rows["wrong"].status == NOT_RUN and rows["wrong"].ms_p50 is None
        assert rows["wrong"].reason.startswith("wrong answer, not timed: relative error out")
        assert rows["sdpa"].ms_p50 is not None

    @pytest.mark.parametrize(("dtype", "seq"), [("bf16", 16384), ("fp16", 2048), ("bf16", 50)])
    def test_one_key_too_many_or_too_few_shows_below_fp32_too(self, dtype: str, seq: int) -> None:
        def prepare(inputs, training: bool, shift: int) -> Prepared:  # type: ignore[no-untyped-def]
            mask = torch.arange(seq) < (inputs.lengths + shift)[:, None]
            return padded(
                inputs,
                training,
                lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, mask[:, None, None]
                ),
                "",
            )

        inputs = make_inputs(Case(1, 1, 8, seq, dtype, "pad50"), CPU)
        truth = compute_truth(inputs)
        for shift in (-1, 0, 1, 3):
            contender = admit(
                Peer("p", functools.partial(prepare, shift=shift), ""), inputs, truth, shift == 0
            )
            assert (contender.row.status == OK) == (shift == 0), f"{shift}: {contender.row.reason}"

    def test_a_peer_whose_gradient_alone_is_wrong_is_refused_in_training_only(self) -> None:
        def prepare(inputs, training: bool) -> Prepared:  # type: ignore[no-untyped-def]
            prepared = PEERS["sdpa"].prepare(inputs, training)
            return replace(prepared, grads=lambda grads: (grads[0], grads[1] * 1.01, grads[2]))

        inputs = make_inputs(SMALL, CPU)
        truth = compute_truth(inputs)
        assert admit(Peer("p", prepare, ""), inputs, truth, False).row.status == OK
        assert "d_key" in admit(Peer("p", prepare, ""), inputs, truth, True).row.reason

    def test_nan_never_passes(self) -> None:
        def prepare(inputs, training: bool) -> Prepared:  # type: ignore[no-untyped-def]
            return padded(inputs, training, lambda q, k, v: q * math.nan, "")

        inputs = make_inputs(SMALL, CPU)
        assert admit(Peer("nan", prepare, ""), inputs, compute_truth(inputs), False).prepared is None

    def test_a_mask_free_peer_is_an_upper_bound_where_there_is_padding_and_exact_where_there_is_none(
        self,
    ) -> None:
        for case, status in ((SMALL, UPPER_BOUND), (replace(SMALL, lengths="full"), OK)):
            inputs = make_inputs(case, CPU)
            assert (
                admit(PEERS["sdpa-flash-nomask"], inputs, compute_truth(inputs), False).row.status == status
            )

    def test_on_a_cpu_padfree_rows_say_why_and_hold_no_figure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Under the interpreter the kernel could run, and its time would mean nothing.
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        peers = [peer for peer in PEERS.values() if peer.name.startswith("padfree")]
        assert len(peers) == 6
        for row in rows_of(SMALL, peers, ["forward", "both"]):
            assert row.status == NOT_RUN and "no GPU" in row.reason
            assert row.ms_p50 is None and row.tflops is None and row.peak_mib is None

    def test_an_unknown_name_lists_the_known_ones(self) -> None:
        with pytest.raises(ValueError, match="varlen_attn"):
            choose_peers("nobody")

    def test_a_refusal_becomes_the_reason(self) -> None:
        def prepare(inputs, training: bool) -> Prepared:  # type: ignore[no-untyped-def]
            raise Refused("needs a newer GPU")

        (row,) = rows_of(SMALL, [Peer("p", prepare, "")], ["forward"])
        assert (row.status, row.reason) == (NOT_RUN, "needs a newer GPU")
