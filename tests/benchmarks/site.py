"""Where a kernel is measured, and what is known of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vidi import precision
from vidi.config import VidiConfig

__all__ = ["HALF", "Kernel", "Site"]

M = TypeVar("M", bound=nn.Module)

HALF = torch.bfloat16


@dataclass(frozen=True)
class Site:
    """Where a kernel runs, and at what size."""

    device: torch.device
    small: bool

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.float32).to(HALF)

    def module(self, module: M) -> M:
        with torch.no_grad():
            for p in module.parameters():
                p.normal_(std=p.shape[-1] ** -0.5)
        return precision.cast_model(module, HALF).to(self.device).requires_grad_(False)

    @property
    def config(self) -> VidiConfig:
        return VidiConfig.tiny() if self.small else VidiConfig.full()


@dataclass(frozen=True)
class Kernel:
    """``variants`` by name, each a function without arguments that makes ``calls`` calls; flops and nbytes are one call's."""

    variants: dict[str, Callable[[], Any]]
    flops: int
    nbytes: int
    calls: int = 1
