"""The decoder's root-mean-square norms (spec §7): Gemma's weight is stored minus one and applied before the cast back,
Mistral's is plain and applied after it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vidi import precision

__all__ = ["GemmaNorm", "PlainNorm", "gemma_norm", "plain_norm"]


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


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · (x / sqrt(mean(x²) + eps)) over the last axis, the norm in at least float32 and cast back before the product."""
    wide = precision.at_least_float32(x)
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class PlainNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return plain_norm(x, self.weight, self.eps)
