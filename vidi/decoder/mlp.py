"""Gated feed-forward of the decoder (spec §1): down(activation(gate(x)) · up(x)), no biases."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["GatedMlp"]


class GatedMlp(nn.Module):
    def __init__(self, width: int, inner: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))
