"""The plain model's weights in the layouts that the fast path multiplies with.

Matrices that meet the same input lie in one buffer, and the plain parameters become views of it: one product instead of
two or three, and no second copy in memory.

Dims: D width, X = (N + 2·G)·H rows of q, k and v, I inner width of the feed-forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vidi import precision
from vidi.decoder.decoder import Decoder
from vidi.decoder.layer import DecoderLayer
from vidi.decoder.norm import GemmaNorm, PlainNorm
from vidi.fast.operands import Activation, Affine, GemmaWeight, Head, LayerNorm, NormWeight, PlainWeight, Scores
from vidi.towers.layer import TowerLayer

__all__ = [
    "LayerWeights",
    "TowerWeights",
    "affine",
    "decoder_layer",
    "entry_factor",
    "fold_output",
    "fuse",
    "head",
    "layer_norm",
    "norm_weight",
    "tower_layer",
]


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. qkv_XD: q, k and v below each other; kv: its last 2·G·H rows; gate_up_2ID: gate, then up.

    own_DX: the output projection of a stream token's own value (`fold_output`). post_attn_norm, post_ffn_norm: None where
    outputs are added as they are.
    """

    qkv_XD: Tensor
    kv_XD: Tensor
    own_DX: Tensor
    o_DX: Tensor
    gate_up_2ID: Tensor
    down_DI: Tensor
    input_norm: NormWeight
    post_attn_norm: NormWeight | None
    pre_ffn_norm: NormWeight
    post_ffn_norm: NormWeight | None
    activation: Activation
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


_NORMS: Mapping[type[nn.Module], type[GemmaWeight] | type[PlainWeight]] = {
    GemmaNorm: GemmaWeight,
    PlainNorm: PlainWeight,
}
_ACTIVATIONS: Mapping[str, Activation] = {"gemma2": "gelu_tanh", "mistral": "silu"}


def norm_weight(module: GemmaNorm | PlainNorm) -> NormWeight:
    return _NORMS[type(module)](module.weight.data, module.eps)


def _after(module: nn.Module) -> NormWeight | None:
    """None: what attention or feed-forward gives is added without a norm of its own."""
    if isinstance(module, nn.Identity):
        return None
    assert isinstance(module, GemmaNorm | PlainNorm)
    return norm_weight(module)


def entry_factor(decoder: Decoder, dtype: torch.dtype) -> float:
    """What text and streams are multiplied by on their way in (§6), as ``dtype`` holds it."""
    return decoder.scaled(torch.ones(decoder.config.hidden_size, dtype=dtype, device="cpu"))[0].item()


def head(decoder: Decoder) -> Head:
    """The embedding or the head of its own, and what `Decoder.finished` does after it."""
    weight_VD = (decoder.embed if decoder.head is None else decoder.head).weight.data
    return Head(weight_VD, decoder.config.final_softcap, decoder.finished(weight_VD[:1, :1]).dtype)


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
        input_norm=norm_weight(layer.input_norm),
        post_attn_norm=_after(layer.post_attn_norm),
        pre_ffn_norm=norm_weight(layer.pre_ffn_norm),
        post_ffn_norm=_after(layer.post_ffn_norm),
        activation=_ACTIVATIONS[config.kind],
        scores=Scores(config.scale, config.attn_softcap, layer.window),
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
