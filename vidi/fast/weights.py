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
from vidi.towers.layer import TowerLayer

__all__ = ["LayerWeights", "TowerWeights", "decoder_layer", "fold_output", "fuse", "tower_layer"]


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. qkv_XD: q, k and v below each other; kv: its last 2·G·H rows; gate_up_2ID: gate, then up."""

    qkv_XD: Tensor
    kv_XD: Tensor
    own_DX: Tensor
    o_DX: Tensor
    gate_up_2ID: Tensor
    down_DI: Tensor
    input_norm_D: Tensor
    post_attn_norm_D: Tensor
    pre_ffn_norm_D: Tensor
    post_ffn_norm_D: Tensor
    window: int | None


@dataclass(frozen=True)
class TowerWeights:
    """One tower layer: matrices with their biases; q, k and v below each other (a missing bias is 0)."""

    norm1: tuple[Tensor, Tensor]
    qkv: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    norm2: tuple[Tensor, Tensor]
    fc1: tuple[Tensor, Tensor]
    fc2: tuple[Tensor, Tensor]
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


def decoder_layer(layer: nn.Module) -> LayerWeights:
    assert isinstance(layer, DecoderLayer)
    attention, mlp, config = layer.attention, layer.mlp, layer.attention.config
    qkv_XD = fuse([attention.q.weight, attention.k.weight, attention.v.weight])
    return LayerWeights(
        qkv_XD=qkv_XD,
        kv_XD=qkv_XD[config.num_heads * config.head_dim :],
        own_DX=fold_output(attention.o.weight.data, config.num_heads, config.num_kv_heads),
        o_DX=attention.o.weight.data,
        gate_up_2ID=fuse([mlp.gate.weight, mlp.up.weight]),
        down_DI=mlp.down.weight.data,
        input_norm_D=layer.input_norm.weight.data,
        post_attn_norm_D=layer.post_attn_norm.weight.data,
        pre_ffn_norm_D=layer.pre_ffn_norm.weight.data,
        post_ffn_norm_D=layer.post_ffn_norm.weight.data,
        window=layer.window,
    )


def tower_layer(layer: nn.Module) -> TowerWeights:
    assert isinstance(layer, TowerLayer)

    def pair(module: nn.Linear | nn.LayerNorm) -> tuple[Tensor, Tensor]:
        return module.weight.data, module.bias.data

    a = layer.attention
    qkv = fuse([a.q.weight, a.k.weight, a.v.weight])
    biases = [m.bias.data if m.bias is not None else m.weight.new_zeros(m.out_features) for m in (a.q, a.k, a.v)]
    return TowerWeights(
        norm1=pair(layer.norm1),
        qkv=(qkv, torch.cat(biases)),
        out=pair(a.out),
        norm2=pair(layer.norm2),
        fc1=pair(layer.mlp.fc1),
        fc2=pair(layer.mlp.fc2),
        num_heads=a.num_heads,
        scale=a.scale,
    )
