"""Bugs of devices, streams and threads that other libraries had: each docstring links the report."""

import threading

import pytest
import torch

from known_bugs import KERNEL, assert_same_bits, kernel_results
from padfree._triton import call
from padfree.testing import assert_matches_reference, make_inputs

needs_gpu = pytest.mark.cuda


def test_a_launch_switches_to_the_tensors_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """triton#2441, triton#5205, mamba#593, torch#187729: the kernel ran on the current GPU, not on the tensor's."""

    class OnGpu:
        is_cuda, device = True, torch.device("cuda", 1)

    entered: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device))
    for current, expected in ((0, [torch.device("cuda", 1)]), (1, [])):
        entered.clear()
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        call.on_device(OnGpu())  # type: ignore[arg-type]
        assert entered == expected


def test_threads_may_make_the_first_call_together() -> None:
    """triton#11494: the autotuner was not safe to call from several threads."""
    inputs = make_inputs(1, 2, 17, 17, 16, padding="right")
    wanted, got = kernel_results(inputs), []
    threads = [threading.Thread(target=lambda: got.append(kernel_results(inputs))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    for results in got:
        assert_same_bits(results, wanted)


@needs_gpu
def test_a_captured_graph_replays_the_same_bits() -> None:
    """triton#10596, FA#166: kernels that allocate or synchronise cannot be captured."""
    inputs = make_inputs(2, 2, 70, 70, 64, dtype=torch.float16, padding="right", device="cuda")
    call = (inputs.query, inputs.key, inputs.value, inputs.key_padding_mask)
    wanted = KERNEL(*call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = KERNEL(*call)
    for _ in range(100):
        out.zero_()
        graph.replay()
        assert torch.equal(out, wanted)


@needs_gpu
def test_a_side_stream_survives_reuse_of_its_inputs() -> None:
    """torch#182084, torch#127531: memory freed on one stream was reused while another still read it."""
    inputs = make_inputs(2, 2, 70, 70, 64, dtype=torch.float16, device="cuda")
    wanted = KERNEL(inputs.query, inputs.key, inputs.value)
    stream = torch.cuda.Stream()
    for _ in range(500):
        with torch.cuda.stream(stream):
            copies = [x.clone() for x in (inputs.query, inputs.key, inputs.value)]
            out = KERNEL(*copies)
            del copies
            torch.full_like(inputs.query, float("nan"))
        stream.synchronize()
        assert torch.equal(out, wanted)


@needs_gpu
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("head_dim", [16, 32, 64])
def test_compiled_code_agrees_with_the_reference_where_ptxas_was_wrong(head_dim: int, scale: float) -> None:
    """fla#1262, fla#826, triton#11366, triton#10573, triton#11153, aiter#4163: wrong code at scale 1.0 and D = 32."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        calls = [
            make_inputs(2, 2, 130, 130, head_dim, dtype=dtype, padding="both_sides", seed=s, device="cuda")
            for s in (0, 1)
        ]
        assert_matches_reference(KERNEL, calls, scale=scale)
