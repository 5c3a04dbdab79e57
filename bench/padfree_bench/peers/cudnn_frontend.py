"""cuDNN's graph API with real lengths (nvidia-cudnn-frontend): its padding mask, without a mask tensor."""

import math

import torch
from torch import Tensor

from padfree_bench.measuring.inputs import Inputs
from padfree_bench.peers.base import Peer, Prepared, leaves_of, needs, needs_16_bit, needs_cuda


class _Graphs:
    """The forward and backward graphs of one case, built once; a new shape needs new ones."""

    def __init__(self, inputs: Inputs, training: bool) -> None:
        import cudnn

        self.handle = cudnn.create_handle()
        io_type = cudnn.data_type.HALF if inputs.query.dtype == torch.float16 else cudnn.data_type.BFLOAT16
        types = {
            "io_data_type": io_type,
            "intermediate_data_type": cudnn.data_type.FLOAT,
            "compute_data_type": cudnn.data_type.FLOAT,
            "handle": self.handle,
        }
        case = inputs.case
        self.scale = 1 / math.sqrt(case.head_dim)
        self.used = inputs.lengths.int().view(-1, 1, 1, 1).contiguous()
        # The layout of inputs: [B, H, S, D] over [B, S, H, D] memory.
        self.out = torch.empty_like(inputs.query)
        self.stats = torch.empty(case.batch, case.heads, case.seq, 1, device=inputs.device)
        self.forward = cudnn.pygraph(**types)
        self.forward_names = self._build_forward(cudnn, inputs)
        if training:
            self.backward = cudnn.pygraph(**types)
            self.backward_names = self._build_backward(cudnn, inputs)

    def _finish(self, cudnn, graph) -> Tensor:  # type: ignore[no-untyped-def]
        graph.build([cudnn.heur_mode.A])
        return torch.empty(graph.get_workspace_size(), device="cuda", dtype=torch.uint8)

    def _build_forward(self, cudnn, inputs: Inputs) -> list:  # type: ignore[no-untyped-def]
        graph = self.forward
        names = [graph.tensor_like(x) for x in (inputs.query, inputs.key, inputs.value, self.used, self.used)]
        out, stats = graph.sdpa(
            q=names[0],
            k=names[1],
            v=names[2],
            generate_stats=True,
            attn_scale=self.scale,
            use_padding_mask=True,
            seq_len_q=names[3],
            seq_len_kv=names[4],
        )
        out.set_output(True).set_dim(self.out.size()).set_stride(self.out.stride())
        stats.set_output(True).set_data_type(cudnn.data_type.FLOAT)
        self.forward_space = self._finish(cudnn, graph)
        return [*names, out, stats]

    def _build_backward(self, cudnn, inputs: Inputs) -> list:  # type: ignore[no-untyped-def]
        graph = self.backward
        tensors = (
            inputs.query,
            inputs.key,
            inputs.value,
            self.out,
            inputs.d_out,
            self.stats,
            self.used,
            self.used,
        )
        names = [graph.tensor_like(x) for x in tensors]
        grads = graph.sdpa_backward(
            q=names[0],
            k=names[1],
            v=names[2],
            o=names[3],
            dO=names[4],
            stats=names[5],
            attn_scale=self.scale,
            use_padding_mask=True,
            seq_len_q=names[6],
            seq_len_kv=names[7],
        )
        for grad in grads:
            grad.set_output(True).set_dim(self.out.size()).set_stride(self.out.stride())
        self.backward_space = self._finish(cudnn, graph)
        return [*names, *grads]

    def execute(self, graph, names: list, tensors: tuple[Tensor, ...], space: Tensor) -> None:  # type: ignore[no-untyped-def]
        import cudnn

        cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute(dict(zip(names, tensors, strict=True)), space, handle=self.handle)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, graphs: _Graphs) -> Tensor:  # type: ignore[no-untyped-def]
        out, stats = torch.empty_like(query), torch.empty_like(graphs.stats)
        tensors = (query, key, value, graphs.used, graphs.used, out, stats)
        graphs.execute(graphs.forward, graphs.forward_names, tensors, graphs.forward_space)
        ctx.save_for_backward(query, key, value, out, stats)
        ctx.graphs = graphs
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor):  # type: ignore[no-untyped-def]
        graphs, (query, key, value, out, stats) = ctx.graphs, ctx.saved_tensors
        grads = tuple(torch.empty_like(query) for _ in range(3))
        tensors = (query, key, value, out, d_out, stats, graphs.used, graphs.used, *grads)
        graphs.execute(graphs.backward, graphs.backward_names, tensors, graphs.backward_space)
        return (*grads, None)


def prepare(inputs: Inputs, training: bool) -> Prepared:
    needs_cuda(inputs, "cudnn-frontend")
    needs_16_bit(inputs, "cudnn-frontend")
    needs("cudnn")
    graphs = _Graphs(inputs, training)
    leaves = leaves_of(inputs.query, inputs.key, inputs.value, training=training)
    ran = "cudnn.pygraph sdpa, use_padding_mask"
    return Prepared(lambda: _Attention.apply(*leaves, graphs), leaves, inputs.d_out, ran)  # type: ignore[no-untyped-call]


PEERS = [Peer("cudnn-frontend", prepare, "padded input, lengths on the device, graph built before the clock")]
