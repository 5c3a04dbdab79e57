"""The GPU's clock, played through with stand-ins: in which order it works, and what it notes about the machine."""

import contextlib
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from padfree_bench.measuring import clocks, profiling, timing
from padfree_bench.measuring.cases import Case
from padfree_bench.measuring.ceilings import Ceilings
from padfree_bench.measuring.clocks import Watch
from padfree_bench.measuring.results import NOT_RUN, OK, Result, Row, cell, from_json, to_json
from padfree_bench.measuring.timing import Effort, Sample, capture_graph, measure
from padfree_bench.peers import PEERS
from padfree_bench.suites import contenders
from padfree_bench.suites.attention import run_case

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EFFORT = Effort(seconds=1, least=3, most=3, warmup=1)
CEILINGS = Ceilings(1e12, {"fp32": 1e14}, 1e12)


class StandIn:
    """A GPU with one queue: what the host asks for takes place when the host waits, in the order of asking."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.queue: list[tuple[str, float, Any]] = []
        self.now_ms = 0.0
        monkeypatch.setattr(timing, "make_flush", lambda: lambda: self.ask("flush", 0.1))
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.ask("sleep", 0.5))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: self.wait())

    def ask(self, name: str, ms: float = 0.0, done: Any = None) -> None:
        self.log.append(name)
        self.queue.append((name, ms, done))

    def wait(self) -> None:
        self.log.append("wait")
        for _, ms, done in self.queue:
            self.now_ms += ms
            if done is not None:
                done(self.now_ms)
        self.queue.clear()


class Event:
    def __init__(self, gpu: StandIn) -> None:
        self.gpu, self.at = gpu, None

    def record(self) -> None:
        self.gpu.ask("event", 0.0, lambda now: setattr(self, "at", now))

    def elapsed_time(self, end: Any) -> float:
        return end.at - self.at


class TestEvents:
    def test_two_events_enclose_the_call_alone_after_a_flush_and_a_wait(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gpu = StandIn(monkeypatch)
        calls = {"a": lambda: gpu.ask("a", 2.0), "b": lambda: gpu.ask("b", 3.0)}
        samples = measure(calls, CUDA, EFFORT)
        each = [["flush", "sleep", "event", name, "event"] for name in "ab"]
        one_round = [*each[0], *each[1], "wait"]
        assert gpu.log == one_round * (EFFORT.warmup + EFFORT.least)
        assert (samples["a"].p50, samples["b"].p50) == pytest.approx((2.0, 3.0))
        assert samples["a"].repetitions == EFFORT.least and samples["a"].host_us is not None

    def test_the_clocks_are_read_outside_every_timed_region_and_once_while_the_gpu_is_busy(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gpu = StandIn(monkeypatch)
        queued: dict[str, int] = {}

        def watch(moment: str) -> None:
            gpu.log.append(moment)
            queued[moment] = len(gpu.queue)

        measure({"a": lambda: gpu.ask("a", 2.0)}, CUDA, EFFORT, watch=watch)
        one = ["flush", "sleep", "event", "a", "event"]
        rounds = [[*one, "wait"], [*one, "during", "wait"], [*one, "wait"]]
        assert gpu.log == [*one, "wait", "before", *(step for each in rounds for step in each), "after"]
        assert queued["before"] == queued["after"] == 0 < queued["during"]

    def test_a_cpu_is_watched_too(self) -> None:
        seen: list[str] = []
        measure({"a": lambda: seen.append("a")}, CPU, EFFORT, watch=seen.append)
        assert seen == ["a", "before", "a", "a", "during", "a", "after"]


class TestGraphs:
    def capture(self, monkeypatch: pytest.MonkeyPatch, fails: bool, seen: list[Any]) -> None:
        """Capture with stand-ins for what torch does, and replay; `seen` takes what was called."""
        stream = SimpleNamespace(device_index=0)

        class Graph:
            def replay(self) -> None:
                seen.append("replay")

        @contextlib.contextmanager
        def graph(graph: Graph, pool: Any, stream: Any) -> Any:
            seen.append("begin")
            yield
            if fails:
                raise RuntimeError("operation failed due to a previous error during capture")
            seen.append("end")

        default = SimpleNamespace(initial_seed=lambda: 7, graphsafe_set_state=seen.append)
        fresh = SimpleNamespace(graphsafe_get_state=lambda: "fresh state")
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "default_generators", (default,))
        monkeypatch.setattr(
            torch, "Generator", lambda device: SimpleNamespace(manual_seed=lambda seed: fresh)
        )
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, lambda *_, name=name: seen.append(name), raising=False)
        replay = capture_graph(lambda: lambda: seen.append("call"))
        replay()

    def test_a_call_is_warm_before_it_is_captured_on_the_current_stream(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Any] = []
        self.capture(monkeypatch, False, seen)
        assert seen == ["call"] * 3 + ["begin", "call", "end", "replay"]

    def test_a_failed_capture_leaves_neither_a_pool_nor_the_random_generator_behind(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Any] = []
        with pytest.raises(RuntimeError, match="during capture"):
            self.capture(monkeypatch, True, seen)
        assert seen[5:] == ["_cuda_endAllocateToPool", "_cuda_releasePool", "fresh state"]

    def test_one_that_fails_once_the_graphs_hold_their_memory_costs_its_own_figure(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail() -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        rows = [Row("s", "c", "g", "forward", peer, OK) for peer in ("fits", "large", "none")]
        rows[2].status = NOT_RUN
        calls: dict[str, Any] = {"fits": list, "fits graph": fail, "large": fail}
        contenders.drop_failing(calls, rows)
        assert list(calls) == ["fits"]
        assert (rows[0].status, rows[0].graph_reason) == (OK, "no CUDA graph: out of memory")
        assert (rows[1].status, rows[1].reason) == (NOT_RUN, "out of memory")

    def test_replays_keep_their_quantiles(self) -> None:
        row = Row("s", "c", "g", "forward", "p", OK, ms_p20=1.0, ms_p50=2.0, ms_p80=3.0)
        contenders.fill_times(row, {"p": Sample(1, 2, 3, 5, 40), "p graph": Sample(0.1, 0.2, 0.3, 5)})
        assert (row.ms_p20, row.ms_p50, row.ms_p80, row.repetitions, row.host_us) == (1, 2, 3, 5, 40)
        assert cell(row, "graph_ms") == "0.2 [0.1, 0.3]"
        assert from_json(to_json(Result("s", {}, [row]))).rows == [row]


def fake_nvml(mask: int) -> Any:
    """pynvml's part that is read; whatever sets something is missing."""
    return SimpleNamespace(
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetClockInfo=lambda gpu, kind: {1: 1755, 2: 2619}[kind],
        nvmlDeviceGetMaxClockInfo=lambda gpu, kind: 1980,
        nvmlDeviceGetTemperature=lambda gpu, kind: 41,
        nvmlDeviceGetPowerUsage=lambda gpu: 212_500,
        nvmlDeviceGetCurrentClocksEventReasons=lambda gpu: mask,
    )


class TestClocks:
    @pytest.fixture(autouse=True)
    def forget(self) -> Any:
        clocks._nvml.cache_clear()
        yield
        clocks._nvml.cache_clear()

    def test_nvml_is_asked_where_its_package_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(0x24))
        assert clocks.read_clocks() == {
            "sm_mhz": 1755,
            "mem_mhz": 2619,
            "max_sm_mhz": 1980,
            "temperature_c": 41,
            "power_w": 212.5,
            "reasons": ["sw power cap", "sw thermal slowdown"],
        }

    def test_nvidia_smi_is_asked_elsewhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[str] = []

        def run(command: list[str], **_: Any) -> Any:
            asked.append(command[1])
            known = "throttle" in command[1]
            line = "1755, 2619, 1980, 41, [N/A], 0x0000000000000001\n" if known else ""
            return SimpleNamespace(returncode=0 if known else 2, stdout=line)

        monkeypatch.setitem(sys.modules, "pynvml", None)
        monkeypatch.setattr(subprocess, "run", run)
        seen = clocks.read_clocks()
        assert seen is not None and (seen["sm_mhz"], seen["power_w"], seen["reasons"]) == (
            1755,
            None,
            ["idle"],
        )
        assert "clocks_event_reasons.active" in asked[0]

    def test_a_machine_without_either_has_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", None)
        monkeypatch.setenv("PATH", "")
        assert clocks.read_clocks() is None

    @pytest.mark.parametrize(
        ("masks", "remark"),
        [
            ((0, 1, 0), ""),
            ((1, 4, 1), "clocks held back: sw power cap"),
            ((0, 0, 0x200), "clocks held back: 0x200"),
        ],
    )
    def test_what_held_the_clocks_back_is_a_remark_and_idle_is_not(
        self, masks: tuple[int, ...], remark: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        watch, left = Watch({"case": "c", "direction": "forward"}), list(masks)
        monkeypatch.setattr(clocks, "read_clocks", lambda: {"reasons": clocks.reasons(left.pop(0))})
        for moment in ("before", "during", "after"):
            watch(moment)
        assert watch.remark == remark and len(watch.readings) == 3

    def test_every_timed_direction_has_its_clocks_in_the_file_and_its_rows_the_remark(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(0x4))
        result, case = Result("s", {}), Case(2, 1, 8, 16, "fp32")
        session: Any = SimpleNamespace(device=CPU, effort=EFFORT, ceilings=CEILINGS, seed=0, result=result)
        rows = [row for part in run_case(session, case, [PEERS["sdpa"]], ["forward", "both"]) for row in part]
        found = result.clocks
        assert [(entry["case"], entry["direction"]) for entry in found] == [
            (case.id, "forward"),
            (case.id, "both"),
        ]
        assert all(
            entry[moment]["sm_mhz"] == 1755 for entry in found for moment in ("before", "during", "after")
        )
        assert all((row.status, row.reason) == (OK, "clocks held back: sw power cap") for row in rows)
        read_back = from_json(to_json(Result("s", {}, rows, clocks=found)))
        assert read_back.clocks == json.loads(json.dumps(found))

    def test_a_remark_joins_what_a_row_says_already(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(call: Any) -> None:
            raise RuntimeError("CUPTI is not allowed here")

        row = Row("s", "c", "g", "forward", "p", reason="said before")
        monkeypatch.setattr(profiling, "count_launches", refuse)
        profiling.fill_launches(row, list)
        row.remark("and again")
        row.remark("and again")
        assert row.reason == (
            "said before; launches not counted: RuntimeError: CUPTI is not allowed here; and again"
        )
