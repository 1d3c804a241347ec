"""Gated feed-forward of the decoder (spec §1): down(gelu_tanh(gate(x)) · up(x)), no biases."""

from __future__ import annotations

import torch.nn.functional as nnf
from torch import Tensor, nn

__all__ = ["GatedMlp"]


class GatedMlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nnf.gelu(self.gate(x), approximate="tanh") * self.up(x))
