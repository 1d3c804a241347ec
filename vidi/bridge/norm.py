"""The bridge's root-mean-square norm (spec §5). Not the decoder's: another epsilon, a plain weight, another cast order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vidi import precision

__all__ = ["EPS", "RMSNorm", "rms"]

EPS = 1e-5


def rms(x: Tensor) -> Tensor:
    """x / sqrt(mean(x²) + 1e-5) over the last axis, computed in at least float32, in the dtype of ``x``."""
    wide = precision.at_least_float32(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


class RMSNorm(nn.Module):
    """weight · rms(x), the product in the activations' dtype."""

    def __init__(self, width: int, init: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), init))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * rms(x)
