"""Gemma's root-mean-square norm (spec §7): the weight is stored minus one and applied before the cast back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vidi import precision

__all__ = ["GemmaNorm", "gemma_norm"]


def gemma_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · (1 + weight) over the last axis, all in at least float32, in the dtype of ``x``."""
    wide = precision.at_least_float32(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + precision.at_least_float32(weight))).to(x.dtype)


class GemmaNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return gemma_norm(x, self.weight, self.eps)
