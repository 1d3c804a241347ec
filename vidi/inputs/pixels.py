"""Pixel values to the tower's range, bit for bit as the reference image processor makes them (spec §2)."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

__all__ = ["normalize", "table"]


@functools.cache
def table() -> Tensor:
    """(256,) float32: value/255, then (x - 0.5)/0.5; the quotient in float64, the rest in float32."""
    value = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    return torch.from_numpy((value - np.float32(0.5)) / np.float32(0.5))


def normalize(frames: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """uint8 frames of any shape -> floats in [-1, 1] through the table; floats are taken as normalised already.

    No table entry is 0, so a frame of uint8 pixels is never silent (spec §3.8).
    """
    frames = frames.to(device)
    if frames.dtype == torch.uint8:
        return table().to(device, dtype)[frames.int()]
    return frames.to(dtype)
