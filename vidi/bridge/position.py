"""Position embeddings along height, width and time (spec §5), in at least float32 also inside a half-precision model.

Any length spans the same interval [0, extent - 1]: 2 for height and width, 10,000 for time. At the far end of time one
unit in the last place of a frequency is 6e-4 rad, so the table of frequencies is a constant of the model: built by
torch on the CPU, kept as `pos.freq` among the goldens, replaceable by the stored one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from vidi.bridge import norm

__all__ = [
    "NOISE_LIMIT",
    "NOISE_SCALE",
    "Noise",
    "PositionEmbedding",
    "add",
    "draw_noise",
    "embed",
    "frequencies",
    "positions",
    "sinusoid",
]

Noise = Callable[[str, int], Tensor]  #: axis, length -> (L,) added to the index in training

NOISE_SCALE = 0.45
NOISE_LIMIT = 0.45


def frequencies(width: int) -> Tensor:
    """`pos.freq`: the (width/2,) float32 table exp(2k · (-ln 10000 / width)), always from torch on the CPU."""
    even = torch.arange(0, width, 2, dtype=torch.float32, device="cpu")
    return torch.exp(even * (-math.log(10000.0) / width))


def positions(length: int, extent: int, dtype: torch.dtype, noise_L: Tensor | None = None) -> Tensor:
    """arange(L) / (L - 1) · (extent - 1) in exactly that order, (L,) of ``dtype``; a length of 1 stands at 0 (§10).

    ``noise_L`` (training) is added to the index and the sum clipped to [0, L - 1] before scaling.
    """
    index = torch.arange(length, dtype=dtype, device="cpu")
    if noise_L is not None:
        index = (index + noise_L.to(index)).clamp(0, length - 1)
    return index / max(length - 1, 1) * (extent - 1)


def sinusoid(p_L: Tensor, freq_K: Tensor) -> Tensor:
    """(L,), (K,) -> (L, 2K): even columns sin(p·w_k), odd columns cos(p·w_k)."""
    angle = p_L[:, None] * freq_K[None, :]
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


def draw_noise(axis: str, length: int, generator: torch.Generator | None = None) -> Tensor:
    """Training noise on the index along any axis: normal · 0.45, cut at ±0.45; (L,) float32 on the CPU."""
    return (torch.randn(length, generator=generator) * NOISE_SCALE).clamp(-NOISE_LIMIT, NOISE_LIMIT)


def add(x: Tensor, embed: Tensor) -> Tensor:
    """x + rms(embedding), the embedding already broadcastable and in the dtype of ``x`` (§3.6)."""
    return x + norm.rms(embed)


def embed(module: PositionEmbedding, axis: str, length: int, noise: Noise | None, dtype: torch.dtype) -> Tensor:
    """The embeddings along one axis ("h", "w", "t_v.b", "t_a.b"), before rms(): (L, D), cast to the model's ``dtype``."""
    return module(length, noise(axis, length) if noise else None).to(dtype)


class PositionEmbedding(nn.Module):
    """Sinusoid, Linear, GELU (erf), Linear. The weights stay in at least float32 (`precision.cast_model`); ``rounded``:
    they have passed through the model's dtype before."""

    at_least_float32 = True

    def __init__(self, width: int, extent: int, rounded: bool = False) -> None:
        super().__init__()
        self.extent = extent
        self.rounded = rounded
        self.freq_K = frequencies(width)
        self.fc1 = nn.Linear(width, width, dtype=torch.float32)
        self.fc2 = nn.Linear(width, width, dtype=torch.float32)

    def forward(self, length: int, noise_L: Tensor | None = None) -> Tensor:
        """The embeddings of ``length`` evenly spaced positions, before rms(): (L, D), in the weights' dtype."""
        weight = self.fc1.weight
        p_L = positions(length, self.extent, weight.dtype, noise_L).to(weight.device)
        table_LD = sinusoid(p_L, self.freq_K.to(weight))
        return self.fc2(nnf.gelu(self.fc1(table_LD)))
