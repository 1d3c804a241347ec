"""The fused operations as plain torch: what each kernel of `kernels/` must compute, in any dtype, on any device.

Outputs are written in place or into tensors that the caller holds, as the kernels do.

Dims: R rows, D width, I inner width, K branches, T text rows, S keys, N query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from vidi import precision
from vidi.attention import eager, rope
from vidi.bridge import norm as bridge_norm
from vidi.decoder.decoder import softcap
from vidi.decoder.norm import gemma_norm
from vidi.fast.plan import Plan

__all__ = [
    "add_gemma_norm",
    "attend",
    "cut_patches",
    "gate_up_step",
    "gelu_mul",
    "gelu_product",
    "head_step",
    "layer_norm",
    "product_step",
    "qkv_step",
    "rms_norm",
]

# ---- rows of streams and text ---------------------------------------------------------------------------------------


def add_gemma_norm(
    x_RD: Tensor, branches_KRD: Tensor | None, post_D: Tensor | None, next_D: Tensor | None, eps: float, out_RD: Tensor
) -> None:
    """x += post_norm(b0 + b1 + …) in place, then out = next_norm(x).

    Without branches x stays as it is; without ``next_D`` nothing is written to ``out_RD``.
    """
    if branches_KRD is not None and post_D is not None:
        mixed = branches_KRD[0]
        for branch in branches_KRD[1:]:
            mixed = mixed + branch
        x_RD += gemma_norm(mixed, post_D, eps)
    if next_D is not None:
        out_RD.copy_(gemma_norm(x_RD, next_D, eps))


def gelu_mul(gate_up_R2I: Tensor, out_RI: Tensor) -> None:
    """out = gelu_tanh(gate) · up."""
    gate, up = gate_up_R2I.chunk(2, dim=-1)
    torch.mul(nnf.gelu(gate, approximate="tanh"), up, out=out_RI)


def layer_norm(x_RC: Tensor, pending_C: Tensor, norm: tuple[Tensor, Tensor] | None, eps: float, out_RC: Tensor) -> None:
    """out = LayerNorm(x + pending), or the sum itself without a norm; ``pending`` is at least float32."""
    wide = x_RC + pending_C
    if norm is not None:
        weight, bias = (precision.at_least_float32(x) for x in norm)
        wide = nnf.layer_norm(wide, wide.shape[-1:], weight, bias, eps)
    out_RC.copy_(wide)


def rms_norm(x_RD: Tensor, weight_D: Tensor, out_RD: Tensor) -> None:
    """The bridge's norm: out = weight · rms(x), rms(x) rounded first (§5)."""
    torch.mul(weight_D, bridge_norm.rms(x_RD), out=out_RD)


def gelu_product(x_RC: Tensor, weight_IC: Tensor, bias_I: Tensor, exact: bool, out_RI: Tensor) -> None:
    """out = gelu(x · weightᵀ + bias); ``exact`` is the erf form, otherwise tanh."""
    torch.addmm(bias_I, x_RC, weight_IC.T, out=out_RI)
    out_RI.copy_(nnf.gelu(out_RI, approximate="none" if exact else "tanh"))


def cut_patches(pixels_F3SS: Tensor, table_256: Tensor, patch: int, side: int, out_RK: Tensor) -> None:
    """uint8 pixels -> patches row by row (F·side², at least 3·patch²) through the table; columns beyond are 0."""
    cut = pixels_F3SS[:, :, : side * patch, : side * patch]
    grid = cut.unflatten(3, (side, patch)).unflatten(2, (side, patch)).permute(0, 2, 4, 1, 3, 5)
    rows = table_256[grid.reshape(len(out_RK), -1).int()]
    out_RK.zero_()
    out_RK[:, : rows.shape[1]] = rows


# ---- attention of text rows -----------------------------------------------------------------------------------------


def attend(
    q_TX: Tensor,
    rotated_TX: Tensor,
    pos_T: Tensor,
    k_SGH: Tensor,
    v_SGH: Tensor,
    cross_SX: Tensor,
    plan: Plan,
    window: int | None,
    scale: float,
    cap: float,
    out_3TX: Tensor,
) -> None:
    """Text rows of one sample to the text, to the visual and to the audio tokens, into out[0], out[1], out[2].

    q, rotated: (T, N·H), before and after rotation. pos: positions of the rows (int64). k, v: the text cache, key s at
    position s. cross: keys, then values, (S, 2·G·H). An absent modality gives exact zeros.
    """
    heads = (k_SGH.shape[1], k_SGH.shape[2])
    split = (1, q_TX.shape[0], -1, heads[1])
    text = slice(0, plan.text_keys)
    out_3TX[0] = eager.attend(
        rotated_TX.reshape(split),
        k_SGH[None, text],
        v_SGH[None, text],
        scale=scale,
        softcap=cap,
        q_pos_BT=pos_T[None],
        window=window,
    ).flatten(-2)[0]
    for branch, (first, stop) in ((1, plan.visual), (2, plan.audio)):
        if first == stop:
            out_3TX[branch] = 0
            continue
        k, v = (x.unflatten(-1, heads)[None] for x in cross_SX[first:stop].chunk(2, dim=-1))
        out_3TX[branch] = eager.attend(q_TX.reshape(split), k, v, scale=scale, softcap=cap).flatten(-2)[0]


# ---- one decoding row -----------------------------------------------------------------------------------------------
# Each starts with what `add_gemma_norm` does, but leaves x alone and writes the sum to x_out.


def _summed(
    x_D: Tensor, branches_KD: Tensor | None, post_D: Tensor | None, next_D: Tensor, eps: float, x_out_D: Tensor
) -> Tensor:
    x_out_D.copy_(x_D)
    normed = torch.empty_like(x_D)
    branches = None if branches_KD is None else branches_KD[:, None]
    add_gemma_norm(x_out_D[None], branches, post_D, next_D, eps, normed[None])
    return normed


def qkv_step(
    x_D: Tensor,
    branches_KD: Tensor | None,
    post_D: Tensor | None,
    next_D: Tensor,
    eps: float,
    x_out_D: Tensor,
    qkv_XD: Tensor,
    pos_1: Tensor,
    cos_SH: Tensor,
    sin_SH: Tensor,
    q_X: Tensor,
    rotated_X: Tensor,
    k_SGH: Tensor,
    v_SGH: Tensor,
) -> None:
    """q before and after rotation; the rotated key and the value into the text cache at position ``pos_1``."""
    groups, head_dim = k_SGH.shape[1:]
    heads_NH = (qkv_XD @ _summed(x_D, branches_KD, post_D, next_D, eps, x_out_D)).unflatten(0, (-1, head_dim))
    turned_NH = rope.apply(heads_NH[None, None], cos_SH[pos_1][None], sin_SH[pos_1][None])[0, 0]
    q_X.copy_(heads_NH[: -2 * groups].flatten())
    rotated_X.copy_(turned_NH[: -2 * groups].flatten())
    k_SGH.index_copy_(0, pos_1, turned_NH[None, -2 * groups : -groups])
    v_SGH.index_copy_(0, pos_1, heads_NH[None, -groups:])


def gate_up_step(
    x_D: Tensor,
    branches_KD: Tensor | None,
    post_D: Tensor | None,
    next_D: Tensor,
    eps: float,
    x_out_D: Tensor,
    gate_up_2ID: Tensor,
    out_I: Tensor,
) -> None:
    """out = gelu_tanh(gate(n)) · up(n)."""
    both = gate_up_2ID @ _summed(x_D, branches_KD, post_D, next_D, eps, x_out_D)
    gelu_mul(both[None], out_I[None])


def head_step(
    x_D: Tensor,
    branches_KD: Tensor | None,
    post_D: Tensor | None,
    next_D: Tensor,
    eps: float,
    x_out_D: Tensor,
    embed_VD: Tensor,
    cap: float,
    out_V: Tensor,
) -> None:
    """out = cap · tanh(embed · n / cap)."""
    out_V.copy_(softcap(embed_VD @ _summed(x_D, branches_KD, post_D, next_D, eps, x_out_D), cap))


def product_step(rows_KX: Tensor, weight_DX: Tensor, out_KD: Tensor) -> None:
    """out = rows · weightᵀ for one or three rows."""
    out_KD.copy_(precision.at_least_float32(rows_KX @ weight_DX.T))
