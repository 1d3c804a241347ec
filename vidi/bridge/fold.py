"""Patch grid -> folded grid (spec §3.2-3.4): pad to even, shrink to the token budget, fold 2×2 patches into channels.

Dims: F frames, P patches a side, C encoder width, S side of the padded or resized grid.
Nothing here is learned. Four patches become one token of 4·C channels; that is why the projector's input is 4608 wide.
"""

from __future__ import annotations

import math

import torch.nn.functional as nnf
from torch import Tensor

__all__ = ["MIN_SIDE", "pad", "resize", "resized_side", "space_to_depth"]

MIN_SIDE = 10


def pad(tower_FLC: Tensor, pool: int = 2) -> Tensor:
    """Rows of patches (F, P·P, C) -> grid (F, C, S, S) with S the next multiple of ``pool``; zeros right and below (§3.2)."""
    frames, patches, channels = tower_FLC.shape
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"{patches} patches are no square grid; the tower's output must keep every patch")
    grid = tower_FLC.transpose(1, 2).reshape(frames, channels, side, side)
    extra = -side % pool
    return nnf.pad(grid, (0, extra, 0, extra))


def resized_side(num_frames: int, side: int, budget: int, pool: int = 2) -> int:
    """Side of the grid once ``num_frames`` frames share ``budget`` visual tokens (§3.3).

    The side shrinks only when the budget is exceeded, to an even number and never below 10: past that point (2,400
    frames at the released budget) the total exceeds the budget.
    """
    allowed = budget * pool**2
    needed = num_frames * side * side
    if needed <= allowed:
        return side
    shrunk = int(side * math.sqrt(allowed / needed))
    return max(shrunk - shrunk % 2, MIN_SIDE)


def resize(grid_FCSS: Tensor, side: int) -> Tensor:
    """Bilinear, align_corners=False, no antialiasing (§3.3). The same tensor where ``side`` is already its side."""
    if grid_FCSS.shape[-1] == side:
        return grid_FCSS
    return nnf.interpolate(grid_FCSS, size=(side, side), mode="bilinear", align_corners=False, antialias=False)


def space_to_depth(grid_FCSS: Tensor, pool: int = 2) -> Tensor:
    """(F, C, S, S) -> (F, pool²·C, S/pool, S/pool); channel = c·pool² + dy·pool + dx (§3.4)."""
    return nnf.pixel_unshuffle(grid_FCSS, pool)
