"""Peers that are slow to compile wait for a second wave, which costs the first nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from padfree_bench import cli
from padfree_bench.measuring.results import OK, SECOND_WAVE, Result, load, save
from padfree_bench.peers import PEERS, Peer
from padfree_bench.peers.base import Prepared, Refused
from padfree_bench.reports import readme
from padfree_bench.reports.compare import lost
from padfree_bench.suites import attention
from tiny_bench import CASE, ROOT, a_row, result_of

SHAPES = "B1-H1-D8-S16,B1-H1-D8-S24"


def slow_peer(order: list[str], refuses: bool = False) -> Peer:
    def prepare(inputs: Any, training: bool) -> Prepared:
        order.append(f"compile {inputs.case.seq}")
        if refuses:
            raise Refused("needs a compiler")
        return PEERS["sdpa"].prepare(inputs, training)

    return Peer("slow", prepare, "", slow_to_compile=True)


class TestWaves:
    def run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: bool = False
    ) -> tuple[list[str], Result]:
        """(what was saved and compiled in order, the file) of eager, sdpa and a peer that compiles."""
        order: list[str] = []
        peers = [slow_peer(order, refuses), PEERS["eager"], PEERS["sdpa"]]
        monkeypatch.setattr(attention, "choose_peers", lambda names: peers)
        real = save

        def recorded(result: Result, folder: Path) -> Path:
            order.append(f"save {len(result.rows)}")
            return real(result, folder)

        monkeypatch.setattr("padfree_bench.measuring.results.save", recorded)
        line = f"attention --quick --shapes {SHAPES} --directions forward,both --peers slow,eager,sdpa"
        arguments = [*line.split(), "--output", str(tmp_path)]
        assert cli.main(arguments) == 0
        return order, load(next(tmp_path.glob("*/attention.json")))

    def test_what_compiles_waits_until_all_others_are_saved(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        order, result = self.run(tmp_path, monkeypatch)
        assert order[:5] == ["save 2", "save 4", "save 6", "save 8", "compile 16"]
        slow = [row for row in result.rows if row.wave == 2]
        assert [row.peer for row in slow] == ["sdpa" + SECOND_WAVE, "slow"] * 4
        assert all(row.status == OK and row.timed for row in result.rows)

    def test_nothing_is_timed_again_for_a_peer_that_does_not_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _, result = self.run(tmp_path, monkeypatch, refuses=True)
        assert [(row.peer, row.reason) for row in result.rows if row.wave == 2] == [
            ("slow", "needs a compiler")
        ] * 4

    def test_readme_holds_a_slow_peer_against_ours_of_its_own_wave(self) -> None:
        rows = [
            a_row("padfree", 1.0),
            a_row("sdpa", 3.0),
            a_row("padfree" + SECOND_WAVE, 2.0, wave=2),
            a_row("flex", 3.2, wave=2),
        ]
        table = readme.table([("gpu", result_of(rows))])
        assert "| sdpa 3 ms | flex 3.2 ms | **padfree 1 ms** [1, 1] | 3.00x | 1.60x |" in table
        del rows[2]
        assert "flex" not in readme.table([("gpu", result_of(rows))])

    def test_a_second_wave_that_was_not_reached_is_not_lost(self) -> None:
        before = result_of([a_row("sdpa", 1.0), a_row("flex", 1.0, wave=2)])
        after = result_of([a_row("sdpa", 1.0)])
        after.not_reached = [CASE + SECOND_WAVE]
        assert lost(before, after) == ([], [f"{CASE} forward flex"])
        after.not_reached = []
        assert len(lost(before, after)[0]) == 1

    def test_a_kill_in_the_second_direction_leaves_the_first(self, tmp_path: Path) -> None:
        program = f"""
import os, signal, sys
from padfree_bench.suites import attention
from padfree_bench import cli
real = attention.run_direction
def run_direction(session, direction, *rest):
    if direction == "both":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(session, direction, *rest)
attention.run_direction = run_direction
cli.main(["attention", "--quick", "--shapes", "B1-H1-D8-S16", "--peers", "sdpa", "--output", {str(tmp_path)!r}])
"""
        paths = os.pathsep.join(str(ROOT / folder) for folder in ("kernels", "model", "bench"))
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": paths},
            check=False,
            capture_output=True,
        )
        assert done.returncode == -signal.SIGKILL
        result = load(next(tmp_path.glob("*/attention.json")))
        assert [row.direction for row in result.rows] == ["forward", "backward"]
