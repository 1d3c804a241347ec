"""Text rows through all decoder layers, against finished stream keys: a prefill's prompt, or one new token a sample.

Rows of all samples stand in one line without padding; padded rows of a batch do not exist here.

Dims: R rows, B samples, D width, X = N·H, G key/value heads, H head dim, I inner width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vidi.attention import rope
from vidi.config import DecoderConfig
from vidi.fast import ops
from vidi.fast.cache import FastCache
from vidi.fast.operands import Keys, NormWeight, Queries, Residual
from vidi.fast.plan import Plan
from vidi.fast.weights import LayerWeights
from vidi.tap import Tap, no_tap

__all__ = ["TextLine", "run"]


@dataclass(frozen=True)
class TextLine:
    """Whose row is whose. sample_R, pos_R: sample and position of each row (int64, device). rows: slices per sample.

    plans: how each sample's keys are split.
    """

    sample_R: Tensor
    pos_R: Tensor
    rows: Sequence[slice]
    plans: Sequence[Plan]


def run(
    x_RD: Tensor,
    layers: Sequence[LayerWeights],
    final_norm: NormWeight,
    config: DecoderConfig,
    cache: FastCache,
    line: TextLine,
    tap: Tap = no_tap,
) -> Tensor:
    """Scaled embeddings (R, D), used up -> rows after the last layer and the final norm. The text cache grows by them.

    ``tap`` gets the plain path's ids, with rows in one line: (R, …) where the plain path has (B, T, …).
    """
    op, count, heads = ops.pick(x_RD.device), len(x_RD), config.num_heads
    query_width = heads * config.head_dim
    cos_RH, sin_RH = cache.rotation.cos_SH[line.pos_R], cache.rotation.sin_SH[line.pos_R]
    mixed_3RX = x_RD.new_empty(3, count, query_width)
    branches_3RD = x_RD.new_empty(3, count, x_RD.shape[1])
    acted_RI = x_RD.new_empty(count, layers[0].down_DI.shape[1])
    n_RD = torch.empty_like(x_RD)
    op.add_norm(Residual(x_RD, following=layers[0].input_norm), n_RD)
    for i, w in enumerate(layers):
        tap(f"layer.{i}.input", x_RD)
        qkv_RNH = (n_RD @ w.qkv_XD.T).unflatten(-1, (-1, config.head_dim))
        turned_RNH = rope.apply(qkv_RNH[None], cos_RH[None], sin_RH[None])[0]
        k_BSGH, v_BSGH = cache.text_L2BSGH[i]
        k_BSGH[line.sample_R, line.pos_R] = turned_RNH[:, heads : heads + config.num_kv_heads]
        v_BSGH[line.sample_R, line.pos_R] = qkv_RNH[:, heads + config.num_kv_heads :]
        q_RX, rotated_RX = (x[:, :heads].flatten(1).contiguous() for x in (qkv_RNH, turned_RNH))
        for b, rows in enumerate(line.rows):
            queries = Queries(q_RX[rows], rotated_RX[rows], line.pos_R[rows])
            keys = Keys(k_BSGH[b], v_BSGH[b], cache.cross_SX[i], line.plans[b])
            op.attend(queries, keys, w.scores, mixed_3RX[:, rows])
        torch.mm(mixed_3RX.flatten(0, 1), w.o_DX.T, out=branches_3RD.flatten(0, 1))
        for branch, modality in enumerate(("t", "v", "a")):
            if modality == "t" or modality in cache.spans:
                tap(f"layer.{i}.t2{modality}", branches_3RD[branch])
        for branch, modality in ((1, "v"), (2, "a")):
            if modality in cache.spans:
                tap(f"xattn.{i}.{modality}.q", qkv_RNH[:, :heads])
                tap(f"xattn.{i}.{modality}.out", mixed_3RX[branch].unflatten(-1, (heads, -1)))
        op.add_norm(Residual(x_RD, branches_3RD, w.post_attn_norm, w.pre_ffn_norm), n_RD)
        op.gated_mul(n_RD @ w.gate_up_2ID.T, w.activation, acted_RI)
        down_1RD = (acted_RI @ w.down_DI.T)[None]
        following = layers[i + 1].input_norm if i + 1 < len(layers) else final_norm
        op.add_norm(Residual(x_RD, down_1RD, w.post_ffn_norm, following), n_RD)
        tap(f"layer.{i}.output", x_RD)
    return n_RD
