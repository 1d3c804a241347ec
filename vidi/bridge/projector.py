"""Two linear layers with an exact GELU between them (spec §1: mlp2x_gelu)."""

from __future__ import annotations

import torch.nn.functional as nnf
from torch import Tensor, nn

__all__ = ["Projector"]


class Projector(nn.Module):
    """(…, width_in) -> (…, width_out); GELU is the erf form, not tanh."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width_in, width_out)
        self.fc2 = nn.Linear(width_out, width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nnf.gelu(self.fc1(x)))
