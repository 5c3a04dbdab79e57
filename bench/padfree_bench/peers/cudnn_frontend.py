"""cuDNN's graph API with real lengths (nvidia-cudnn-frontend): its padding mask, without a mask tensor."""

import math
from typing import Any

import torch
from torch import Tensor

from padfree_bench.measuring.inputs import Inputs
from padfree_bench.peers.base import Peer, Prepared, needs_cuda, padded


class _Graph:
    """One graph of one case, built once: what its tensors are called, those that it takes before those that it gives."""

    def __init__(self, cudnn: Any, handle: Any, tensors: tuple[Tensor, ...], attend: Any) -> None:
        """attend(graph, *names of the tensors) adds the attention to the graph and gives the names of its results."""
        self.cudnn, self.handle = cudnn, handle
        half = cudnn.data_type.HALF if tensors[0].dtype == torch.float16 else cudnn.data_type.BFLOAT16
        single = cudnn.data_type.FLOAT
        self.graph = cudnn.pygraph(
            io_data_type=half, intermediate_data_type=single, compute_data_type=single, handle=handle
        )
        names = [self.graph.tensor_like(tensor) for tensor in tensors]
        self.names = [*names, *attend(self.graph, *names)]
        self.graph.build([cudnn.heur_mode.A])
        self.space = torch.empty(self.graph.get_workspace_size(), device="cuda", dtype=torch.uint8)

    def execute(self, *tensors: Tensor) -> None:
        self.cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        self.graph.execute(dict(zip(self.names, tensors, strict=True)), self.space, handle=self.handle)


class _Graphs:
    """The forward and backward graphs of one case; a new shape needs new ones."""

    def __init__(self, cudnn: Any, inputs: Inputs, training: bool) -> None:
        case, self.used = inputs.case, inputs.lengths.int().view(-1, 1, 1, 1).contiguous()
        self.stats = torch.empty(case.batch, case.heads, case.seq, 1, device=inputs.device)
        qkv, handle = (inputs.query, inputs.key, inputs.value), cudnn.create_handle()
        # The layout of inputs: [B, H, S, D] over [B, S, H, D] memory.
        out = torch.empty_like(inputs.query)
        options = {"attn_scale": 1 / math.sqrt(case.head_dim), "use_padding_mask": True}

        def laid_out(result: Any) -> Any:
            return result.set_output(True).set_dim(out.size()).set_stride(out.stride())

        def forward(graph: Any, q: Any, k: Any, v: Any, seq_len_q: Any, seq_len_kv: Any) -> list[Any]:
            lengths = {"seq_len_q": seq_len_q, "seq_len_kv": seq_len_kv}
            result, stats = graph.sdpa(q=q, k=k, v=v, generate_stats=True, **lengths, **options)
            laid_out(result)
            stats.set_output(True).set_data_type(cudnn.data_type.FLOAT)
            return [result, stats]

        def backward(graph: Any, *names: Any) -> list[Any]:
            keys = ("q", "k", "v", "o", "dO", "stats", "seq_len_q", "seq_len_kv")
            grads = graph.sdpa_backward(**dict(zip(keys, names, strict=True)), **options)
            for grad in grads:
                laid_out(grad)
            return list(grads)

        self.forward = _Graph(cudnn, handle, (*qkv, self.used, self.used), forward)
        if training:
            tensors = (*qkv, out, inputs.d_out, self.stats, self.used, self.used)
            self.backward = _Graph(cudnn, handle, tensors, backward)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, graphs: _Graphs) -> Tensor:  # type: ignore[no-untyped-def]
        out, stats = torch.empty_like(query), torch.empty_like(graphs.stats)
        graphs.forward.execute(query, key, value, graphs.used, graphs.used, out, stats)
        ctx.save_for_backward(query, key, value, out, stats)
        ctx.graphs = graphs
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor):  # type: ignore[no-untyped-def]
        graphs, (query, key, value, out, stats) = ctx.graphs, ctx.saved_tensors
        grads = tuple(torch.empty_like(query) for _ in range(3))
        given = (query, key, value, out, d_out, stats, graphs.used, graphs.used)
        graphs.backward.execute(*given, *grads)
        return (*grads, None)


def prepare(inputs: Inputs, training: bool) -> Prepared:
    graphs = _Graphs(needs_cuda(inputs, "cudnn-frontend", "cudnn"), inputs, training)
    ran = "cudnn.pygraph sdpa, use_padding_mask"
    return padded(inputs, training, lambda q, k, v: _Attention.apply(q, k, v, graphs), ran)  # type: ignore[no-untyped-call]


PEERS = [Peer("cudnn-frontend", prepare, "padded input, lengths on the device, graph built before the clock")]
