"""Rotary position embedding of the text (spec §7): rotate-half; never applied in cross-attention."""

from __future__ import annotations

import torch
from torch import Tensor

from vidi import precision

__all__ = ["angles", "apply", "inverse_frequencies"]


def inverse_frequencies(head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """theta^(-2k/H), (H/2,) in at least float32."""
    exponent = torch.arange(0, head_dim, 2, dtype=precision.promoted(dtype)) / head_dim
    return 1.0 / theta**exponent


def angles(pos_BT: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each (B, T, H) of ``dtype``: the H/2 angles written twice, computed in at least float32, then cast."""
    inv_freq = inverse_frequencies(head_dim, theta, dtype).to(pos_BT.device)
    angle = pos_BT[..., None].to(inv_freq.dtype) * inv_freq
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply(x_BTNH: Tensor, cos_BTH: Tensor, sin_BTH: Tensor) -> Tensor:
    """x·cos + cat(-x₂, x₁)·sin with x₁, x₂ the halves of a head."""
    first, second = x_BTNH.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_BTNH * cos_BTH[:, :, None] + turned * sin_BTH[:, :, None]
