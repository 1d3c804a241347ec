"""A tiny 7B for unit tests: every feature bites, weights are random but fixed."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from vidi import sizes_7b
from vidi.config import VidiConfig
from vidi.model import VidiModel

__all__ = ["OFFICIAL", "config", "model"]

OFFICIAL = sizes_7b.TINY


def config(**changes: Any) -> VidiConfig:
    return VidiConfig.from_official(OFFICIAL | changes)


@cache
def model() -> VidiModel:
    """In float64."""
    made = VidiModel(config()).double()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in made.named_parameters():
        scale = 0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
        parameter.data = values + (1.0 if "norm" in name and parameter.ndim == 1 else 0.0)
    return made.requires_grad_(False)
