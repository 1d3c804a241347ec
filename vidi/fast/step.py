"""One decoding step of one sample, six kernels a layer, captured once as a CUDA graph and replayed.

A step is bound by reading 18 GB of weights and the cached keys; each kernel streams one matrix and does the row's norm,
residual, rotation or activation on the way. Everything that changes from step to step (token id, position) stands in
device memory, so the same graph serves all steps.

Dims: D width, X = N·H, I inner width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vidi.config import DecoderConfig
from vidi.fast import ops
from vidi.fast.cache import FastCache
from vidi.fast.operands import Head, Keys, NormWeight, Queries, Residual
from vidi.fast.weights import LayerWeights

__all__ = ["Step"]


class Step:
    """Buffers of a step, and its graph. A step reads ``cache`` at its position and writes the new token's keys to it."""

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        embed_VD: Tensor,
        factor: float,
        final_norm: NormWeight,
        head: Head,
        config: DecoderConfig,
        cache: FastCache,
        *,
        graph: bool,
    ) -> None:
        assert len(cache.plans) == 1, "one sample a step; more go through text.run"
        self.layers, self.embed_VD, self.factor, self.final_norm, self.head = layers, embed_VD, factor, final_norm, head
        # What it needs of the cache, not the cache, which holds the step: 40 GB must not wait for a cycle's collection.
        text_L2SGH, plan, self.rotation = cache.text_L2BSGH[:, :, 0], cache.plans[0], cache.rotation
        self.keys = [Keys(k, v, cross, plan) for (k, v), cross in zip(text_L2SGH, cache.cross_SX, strict=True)]
        self.op = ops.pick(embed_VD.device)
        width, query_width = config.hidden_size, config.num_heads * config.head_dim

        def buffer(*shape: int) -> Tensor:
            return embed_VD.new_empty(shape)

        self.id_1 = torch.zeros(1, dtype=torch.int64, device=embed_VD.device)
        self.pos_1 = cache.lengths_B.clone()
        self.queries = Queries(buffer(1, query_width), buffer(1, query_width), self.pos_1)
        self.mixed_31X, self.branches_3D = buffer(3, 1, query_width), buffer(3, width)
        self.acted_1I, self.down_1D = buffer(1, layers[0].down_DI.shape[1]), buffer(1, width)
        self.x_D, self.sum_D = buffer(width), buffer(width)  # they take turns: a kernel never writes what it reads
        self.logits_V = torch.empty(config.vocab_size, dtype=head.dtype, device=embed_VD.device)
        self.graph = self._captured() if graph and embed_VD.is_cuda else None

    def __call__(self, ids_1: Tensor) -> Tensor:
        """Id (1,) of the token to add -> logits (1, V) of the next."""
        self.id_1.copy_(ids_1)
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()
        return self.logits_V[None].clone()

    def _captured(self) -> torch.cuda.CUDAGraph:
        """The graph of one step. Running it once before (kernels compile) must leave no trace in the position."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._run()
        torch.cuda.current_stream().wait_stream(side)
        self.pos_1 -= 1
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        return graph

    def _run(self) -> None:
        op = self.op
        torch.mul(self.embed_VD.index_select(0, self.id_1)[0], self.factor, out=self.x_D)
        branch_1D: Tensor | None = None
        post: NormWeight | None = None
        for w, keys in zip(self.layers, self.keys, strict=True):
            before = Residual(self.x_D, branch_1D, post, w.input_norm)
            op.qkv_step(before, self.sum_D, w.qkv_XD, self.rotation, self.queries, keys)
            op.attend(self.queries, keys, w.scores, self.mixed_31X)
            op.product_step(self.mixed_31X[:, 0], w.o_DX, self.branches_3D)
            between = Residual(self.sum_D, self.branches_3D, w.post_attn_norm, w.pre_ffn_norm)
            op.gate_up_step(between, self.x_D, w.gate_up_2ID, w.activation, self.acted_1I[0])
            op.product_step(self.acted_1I, w.down_DI, self.down_1D)
            branch_1D, post = self.down_1D, w.post_ffn_norm
        after = Residual(self.x_D, branch_1D, post, self.final_norm)
        op.head_step(after, self.sum_D, self.head, self.logits_V)
        self.pos_1 += 1
