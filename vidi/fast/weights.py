"""The plain model's weights in the layouts that the fast path multiplies with.

Matrices that meet the same input lie in one buffer, and the plain parameters become views of it: one product instead of
two or three, and no second copy in memory.

Dims: D width, X = (N + 2·G)·H rows of q, k and v, I inner width of the feed-forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vidi import precision
from vidi.decoder.layer import DecoderLayer
from vidi.decoder.norm import GemmaNorm
from vidi.fast.operands import Affine, GemmaWeight, LayerNorm, Scores
from vidi.towers.layer import TowerLayer

__all__ = [
    "LayerWeights",
    "TowerWeights",
    "affine",
    "decoder_layer",
    "fold_output",
    "fuse",
    "gemma_weight",
    "layer_norm",
    "tower_layer",
]


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. qkv_XD: q, k and v below each other; kv: its last 2·G·H rows; gate_up_2ID: gate, then up.

    own_DX: the output projection of a stream token's own value (`fold_output`).
    """

    qkv_XD: Tensor
    kv_XD: Tensor
    own_DX: Tensor
    o_DX: Tensor
    gate_up_2ID: Tensor
    down_DI: Tensor
    input_norm: GemmaWeight
    post_attn_norm: GemmaWeight
    pre_ffn_norm: GemmaWeight
    post_ffn_norm: GemmaWeight
    scores: Scores


@dataclass(frozen=True)
class TowerWeights:
    """One tower layer: matrices with their biases; q, k and v below each other (a missing bias is 0)."""

    norm1: LayerNorm
    qkv: Affine
    out: Affine
    norm2: LayerNorm
    fc1: Affine
    fc2: Affine
    num_heads: int
    scale: float


def fuse(parameters: Sequence[Tensor]) -> Tensor:
    """Move parameters below each other into one buffer, of which they become views; returns the buffer.

    Parameters that already lie so are left alone, so a model can be accelerated twice.
    """
    first, *rest = (p.data for p in parameters)
    end = first.storage_offset() + first.numel()
    whole_rows = first.shape[0]
    for p in rest:
        if p.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or p.storage_offset() != end:
            break
        end += p.numel()
        whole_rows += p.shape[0]
    else:
        return first.as_strided((whole_rows, *first.shape[1:]), first.stride(), first.storage_offset())
    whole = torch.cat([p.data for p in parameters])
    for p, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
        p.data = part
    return whole


def fold_output(o_DX: Tensor, num_heads: int, num_kv_heads: int) -> Tensor:
    """The output projection of values whose heads are not repeated: (D, N·H) -> (D, G·H).

    A stream token attends to itself alone, so all query heads of a group carry the same value: summing their columns
    once saves half of that product. The sum rounds anew; parity covers it.
    """
    wide = precision.at_least_float32(o_DX).unflatten(1, (num_kv_heads, num_heads // num_kv_heads, -1))
    return wide.sum(2).flatten(1).to(o_DX.dtype)


def affine(module: nn.Linear) -> Affine:
    return Affine(module.weight.data, module.bias.data)


def layer_norm(module: nn.LayerNorm) -> LayerNorm:
    return LayerNorm(module.weight.data, module.bias.data, module.eps)


def gemma_weight(module: GemmaNorm) -> GemmaWeight:
    return GemmaWeight(module.weight.data, module.eps)


def decoder_layer(layer: nn.Module) -> LayerWeights:
    assert isinstance(layer, DecoderLayer)
    attention, mlp, config = layer.attention, layer.mlp, layer.attention.config
    assert config.attn_softcap is not None  # Gemma 2 has it; `accelerate` refuses others
    qkv_XD = fuse([attention.q.weight, attention.k.weight, attention.v.weight])
    return LayerWeights(
        qkv_XD=qkv_XD,
        kv_XD=qkv_XD[config.num_heads * config.head_dim :],
        own_DX=fold_output(attention.o.weight.data, config.num_heads, config.num_kv_heads),
        o_DX=attention.o.weight.data,
        gate_up_2ID=fuse([mlp.gate.weight, mlp.up.weight]),
        down_DI=mlp.down.weight.data,
        input_norm=gemma_weight(layer.input_norm),
        post_attn_norm=gemma_weight(layer.post_attn_norm),
        pre_ffn_norm=gemma_weight(layer.pre_ffn_norm),
        post_ffn_norm=gemma_weight(layer.post_ffn_norm),
        scores=Scores(config.scale, float(config.attn_softcap or 0), layer.window),
    )


def tower_layer(layer: nn.Module) -> TowerWeights:
    assert isinstance(layer, TowerLayer)
    a = layer.attention
    qkv = fuse([a.q.weight, a.k.weight, a.v.weight])
    biases = [m.bias.data if m.bias is not None else m.weight.new_zeros(m.out_features) for m in (a.q, a.k, a.v)]
    return TowerWeights(
        norm1=layer_norm(layer.norm1),
        qkv=Affine(qkv, torch.cat(biases)),
        out=affine(a.out),
        norm2=layer_norm(layer.norm2),
        fc1=affine(layer.mlp.fc1),
        fc2=affine(layer.mlp.fc2),
        num_heads=a.num_heads,
        scale=a.scale,
    )
