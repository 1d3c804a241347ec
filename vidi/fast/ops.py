"""Which implementation of the fused operations a device gets: Triton kernels on CUDA, their naive twins elsewhere."""

from __future__ import annotations

import importlib
from typing import Any

import torch

__all__ = ["pick"]


def pick(device: torch.device) -> Any:
    """The module of operations for ``device``; both have the functions of `twins.__all__`. Triton is imported on use."""
    return importlib.import_module("vidi.fast.kernels" if device.type == "cuda" else "vidi.fast.twins")
