"""A training step as one CUDA graph for each shape of its batch, so that the host launches once where it did a hundred times."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class GraphedStep:
    """step(batch), replayed from a graph from the third time on that a batch of the same shapes comes.

    The first time it runs as it is, which lets libraries and autograd set themselves up; the second time it is captured,
    and replayed at once. All run on one stream of their own, and their graphs share one pool of memory.

    Args:
        step: waits for nothing on the host, and reads nothing of a batch but its tensors' values and what is no tensor.
            What it leaves behind (weights, sums) lives in tensors that were there before.
    """

    def __init__(self, step: Callable[[dict[str, Any]], None]) -> None:
        self.step = step
        self._seen = set[Any]()
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, dict[str, Any]]] = {}
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def graphs(self) -> int:
        """How many there are."""
        return len(self._graphs)

    def __call__(self, batch: dict[str, Any]) -> None:
        key = tuple(
            (name, value.shape if isinstance(value, Tensor) else value) for name, value in batch.items()
        )
        before = torch.cuda.current_stream()
        # What made the batch came before, and what reads the weights comes after.
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            if key in self._graphs:
                graph, held = self._graphs[key]
                for name, value in batch.items():
                    if isinstance(value, Tensor):
                        held[name].copy_(value)
                graph.replay()
            elif key in self._seen:
                held = {k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.items()}
                graph = torch.cuda.CUDAGraph()
                # thread_local: the loader's thread may allocate pinned memory meanwhile.
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    self.step(held)
                self._graphs[key] = graph, held
                graph.replay()
            else:
                self._seen.add(key)
                self.step(batch)
        before.wait_stream(self._stream)
