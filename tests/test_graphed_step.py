"""Which call of a step runs as it is, which is captured, and which is replayed, by a stand-in for CUDA graphs."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from imdb_classifier.training.graphs import GraphedStep


class Graphs:
    """torch.cuda as far as GraphedStep asks for it: what a step does while it is captured happens at each replay."""

    def __init__(self, monkeypatch):
        self.capturing = None
        self.replays = 0
        self.order = []
        own, callers = (SimpleNamespace(name=name) for name in ("own", "caller's"))
        for stream in (own, callers):
            stream.wait_stream = lambda other, waits=stream: self.order.append(
                f"{waits.name} waits for {other.name}"
            )
        monkeypatch.setattr(torch.cuda, "Stream", lambda: own)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: callers)
        monkeypatch.setattr(torch.cuda, "stream", lambda of: nullcontext())
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(work=[], replay=None))
        monkeypatch.setattr(torch.cuda, "graph", self.capture)

    @contextmanager
    def capture(self, graph, *_, capture_error_mode):
        # With "global" the loader's thread that pins memory would break a capture.
        assert capture_error_mode == "thread_local"
        self.capturing = graph

        def replay():
            self.replays += 1
            self.order.append("replay")
            for work in graph.work:
                work()

        graph.replay = replay
        yield
        self.capturing = None

    def do(self, work):
        if self.capturing is None:
            self.order.append("step")
            work()
        else:
            self.capturing.work.append(work)


@pytest.fixture
def graphs(monkeypatch):
    return Graphs(monkeypatch)


def test_every_batch_is_computed_once_from_its_own_numbers(graphs):
    done = []
    step = GraphedStep(lambda batch: graphs.do(lambda: done.append((batch["x"].tolist(), batch["longest"]))))
    batches = [
        {"x": torch.arange(size) + number, "longest": 9}
        for number, size in enumerate((3, 3, 5, 3, 3, 5, 5, 2))
    ]
    for batch in batches:
        step(batch)
    assert done == [(batch["x"].tolist(), 9) for batch in batches]
    # 3 and 5 came again, 2 did not
    assert (step.graphs, graphs.replays) == (2, 5)


def test_what_is_no_tensor_belongs_to_the_shape(graphs):
    done = []
    step = GraphedStep(lambda batch: graphs.do(lambda longest=batch["longest"]: done.append(longest)))
    for longest in (4, 4, 6, 4, 6, 6):
        step({"x": torch.zeros(2), "longest": longest})
    assert done == [4, 4, 6, 4, 6, 6]
    assert step.graphs == 2


def test_the_callers_batch_is_left_as_it_was(graphs):
    step = GraphedStep(lambda batch: graphs.do(lambda: batch["x"].add_(1)))
    batches = [{"x": torch.zeros(2)} for _ in range(4)]
    for batch in batches:
        step(batch)
    assert [batch["x"].sum().item() for batch in batches] == [2, 0, 0, 0]


def test_a_step_comes_after_what_made_its_batch_and_before_what_follows(graphs):
    step = GraphedStep(lambda batch: graphs.do(lambda: None))
    for _ in range(3):
        step({"x": torch.zeros(2)})
    before, after = "own waits for caller's", "caller's waits for own"
    assert graphs.order == [before, "step", after, before, "replay", after, before, "replay", after]
