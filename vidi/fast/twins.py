"""The fused operations as plain torch: what each kernel of `kernels/` must compute, in any dtype, on any device.

Outputs are written in place or into tensors that the caller holds, as the kernels do.

Dims: R rows, D width, I inner width, K branches, T text rows, S keys, N query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from vidi import precision
from vidi.attention import eager, rope
from vidi.attention.call import AttentionCall
from vidi.bridge import norm as bridge_norm
from vidi.decoder.decoder import softcap
from vidi.decoder.norm import gemma_norm, plain_norm
from vidi.fast.operands import (
    Activation,
    Affine,
    GemmaWeight,
    Head,
    Keys,
    LayerNorm,
    NormWeight,
    PlainWeight,
    Queries,
    Residual,
    Rotation,
    Scores,
)

__all__ = [
    "add_norm",
    "attend",
    "cut_patches",
    "gate_up_step",
    "gated_mul",
    "gelu_product",
    "head_step",
    "layer_norm",
    "product_step",
    "qkv_step",
    "rms_norm",
]

# ---- rows of streams and text ---------------------------------------------------------------------------------------


_NORMS: Mapping[type[Any], Callable[[Tensor, Tensor, float], Tensor]] = {
    GemmaWeight: gemma_norm,
    PlainWeight: plain_norm,
}
_ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": partial(nnf.gelu, approximate="tanh"),
    "silu": nnf.silu,
}


def _normed(x: Tensor, norm: NormWeight) -> Tensor:
    return _NORMS[type(norm)](x, norm.weight_D, norm.eps)


def add_norm(residual: Residual, out_RD: Tensor) -> None:
    """x += post(b0 + b1 + …) in place, or without ``post`` x += b0, x += b1, …; then out = following(x).

    Without branches x stays as it is; without ``following`` nothing is written to ``out_RD``.
    """
    x_RD, branches, post, following = residual.x, residual.branches, residual.post, residual.following
    if branches is not None and post is not None:
        mixed = branches[0]
        for branch in branches[1:]:
            mixed = mixed + branch
        branches = _normed(mixed, post)[None]
    for branch in () if branches is None else branches:
        x_RD += branch
    if following is not None:
        out_RD.copy_(_normed(x_RD, following))


def gated_mul(gate_up_R2I: Tensor, activation: Activation, out_RI: Tensor) -> None:
    """out = activation(gate) · up."""
    gate, up = gate_up_R2I.chunk(2, dim=-1)
    torch.mul(_ACTIVATIONS[activation](gate), up, out=out_RI)


def layer_norm(x_RC: Tensor, pending_C: Tensor, norm: LayerNorm | None, out_RC: Tensor) -> None:
    """out = LayerNorm(x + pending), or the sum itself without a norm; ``pending`` is at least float32."""
    wide = x_RC + pending_C
    if norm is not None:
        weight, bias = (precision.at_least_float32(x) for x in (norm.weight_C, norm.bias_C))
        wide = nnf.layer_norm(wide, wide.shape[-1:], weight, bias, norm.eps)
    out_RC.copy_(wide)


def rms_norm(x_RD: Tensor, weight_D: Tensor, out_RD: Tensor) -> None:
    """The bridge's norm: out = weight · rms(x), rms(x) rounded first (§5)."""
    torch.mul(weight_D, bridge_norm.rms(x_RD), out=out_RD)


def gelu_product(x_RC: Tensor, linear: Affine, exact: bool, out_RI: Tensor) -> None:
    """out = gelu(x · weightᵀ + bias); ``exact`` is the erf form, otherwise tanh."""
    torch.addmm(linear.bias_I, x_RC, linear.weight_IC.T, out=out_RI)
    out_RI.copy_(nnf.gelu(out_RI, approximate="none" if exact else "tanh"))


def cut_patches(pixels_F3SS: Tensor, table_256: Tensor, patch: int, side: int, out_RK: Tensor) -> None:
    """uint8 pixels -> patches row by row (F·side², at least 3·patch²) through the table; columns beyond are 0."""
    cut = pixels_F3SS[:, :, : side * patch, : side * patch]
    grid = cut.unflatten(3, (side, patch)).unflatten(2, (side, patch)).permute(0, 2, 4, 1, 3, 5)
    rows = table_256[grid.reshape(len(out_RK), -1).int()]
    out_RK.zero_()
    out_RK[:, : rows.shape[1]] = rows


# ---- attention of text rows -----------------------------------------------------------------------------------------


def attend(queries: Queries, keys: Keys, scores: Scores, out_3TX: Tensor) -> None:
    """Text rows of one sample to the text (rotated queries), to the visual and to the audio tokens (queries before
    rotation), into out[0], out[1], out[2]. An absent modality gives exact zeros."""
    heads = (keys.k_SGH.shape[1], keys.k_SGH.shape[2])
    q_1TNH, rotated_1TNH = (x.reshape(1, len(x), -1, heads[1]) for x in (queries.q_TX, queries.rotated_TX))
    k, v = (x[None, : keys.plan.text_keys] for x in (keys.k_SGH, keys.v_SGH))
    text = AttentionCall(rotated_1TNH, k, v, scores.scale, scores.cap, queries.pos_T[None], scores.window)
    out_3TX[0] = eager.attend(text).flatten(-2)[0]
    for branch, (first, stop) in ((1, keys.plan.visual), (2, keys.plan.audio)):
        if first == stop:
            out_3TX[branch] = 0
            continue
        k, v = (x.unflatten(-1, heads)[None] for x in keys.cross_SX[first:stop].chunk(2, dim=-1))
        stream = AttentionCall(q_1TNH, k, v, scores.scale, scores.cap)
        out_3TX[branch] = eager.attend(stream).flatten(-2)[0]


# ---- one decoding row -----------------------------------------------------------------------------------------------
# Each starts with what `add_norm` does, but leaves x alone and writes the sum to sum_D.


def _summed(residual: Residual, sum_D: Tensor) -> Tensor:
    sum_D.copy_(residual.x)
    normed = torch.empty_like(sum_D)
    branches = None if residual.branches is None else residual.branches[:, None]
    add_norm(replace(residual, x=sum_D[None], branches=branches), normed[None])
    return normed


def qkv_step(
    residual: Residual, sum_D: Tensor, qkv_XD: Tensor, rotation: Rotation, queries: Queries, keys: Keys
) -> None:
    """q before and after rotation into ``queries``; the rotated key and the value into the text cache at its position."""
    groups, head_dim = keys.k_SGH.shape[1:]
    heads_NH = (qkv_XD @ _summed(residual, sum_D)).unflatten(0, (-1, head_dim))
    cos_1H, sin_1H = (x[queries.pos_T] for x in (rotation.cos_SH, rotation.sin_SH))
    turned_NH = rope.apply(heads_NH[None, None], cos_1H[None], sin_1H[None])[0, 0]
    queries.q_TX[0] = heads_NH[: -2 * groups].flatten()
    queries.rotated_TX[0] = turned_NH[: -2 * groups].flatten()
    keys.k_SGH.index_copy_(0, queries.pos_T, turned_NH[None, -2 * groups : -groups])
    keys.v_SGH.index_copy_(0, queries.pos_T, heads_NH[None, -groups:])


def gate_up_step(residual: Residual, sum_D: Tensor, gate_up_2ID: Tensor, activation: Activation, out_I: Tensor) -> None:
    """out = activation(gate(n)) · up(n)."""
    gated_mul((gate_up_2ID @ _summed(residual, sum_D))[None], activation, out_I[None])


def head_step(residual: Residual, sum_D: Tensor, head: Head, out_V: Tensor) -> None:
    """out = cap · tanh(weight · n / cap), or weight · n without a cap; rounded to the model's dtype first, `out` may be wider."""
    raw_V = head.weight_VD @ _summed(residual, sum_D)
    out_V.copy_(raw_V if head.cap is None else softcap(raw_V, head.cap))


def product_step(rows_KX: Tensor, weight_DX: Tensor, out_KD: Tensor) -> None:
    """out = rows · weightᵀ for one or three rows."""
    out_KD.copy_(precision.at_least_float32(rows_KX @ weight_DX.T))
