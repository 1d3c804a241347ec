"""Patch grid -> folded grid (spec §3.2-3.4): pad to even, shrink to the token budget, fold 2×2 patches into channels.

Dims: F frames, P patches a side, C encoder width, S side of the padded or resized grid.
Nothing here is learned. Four patches become one token of 4·C channels; that is why the projector's input is 4608 wide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as nnf
from torch import Tensor, nn

from vidi.config import VidiConfig
from vidi.tap import Tap, no_tap

__all__ = ["MIN_SIDE", "Fold", "Group", "groups", "pad", "resize", "resized_side", "space_to_depth"]

MIN_SIDE = 10


@dataclass(frozen=True)
class Group:
    """Consecutive videos that share one token budget, hence one grid."""

    videos: range
    num_frames: int
    side: int  #: of the padded, maybe shrunk patch grid, before folding
    suffix: str  #: appended to the ids of stages that differ in shape between groups


def groups(num_frames_B: Sequence[int], config: VidiConfig) -> list[Group]:
    """Which videos share the visual token budget, and the grid that leaves them (§3.3).

    Scope "batch": one group, as in the official release. Scope "video": a group each, so that a result does not depend
    on its neighbours; the ids from `vision.resize` to `vision.pos_t` then end in the video's number.
    """
    side = config.vision.patches_per_side
    side += -side % config.image_pool_size
    shared = config.budget_scope == "batch"
    parts = [range(len(num_frames_B))] if shared else [range(b, b + 1) for b in range(len(num_frames_B))]
    found = []
    for videos in parts:
        total = sum(num_frames_B[b] for b in videos)
        shrunk = resized_side(total, side, config.visual_token_budget, config.image_pool_size)
        found.append(Group(videos, total, shrunk, "" if shared else f".{videos[0]}"))
    return found


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


class Fold(nn.Module):
    """The whole of it for a group of videos. No weights; `channels` is what the projector sees."""

    def __init__(self, config: VidiConfig) -> None:
        super().__init__()
        self.pool = config.image_pool_size
        self.channels = config.vision.hidden_size * self.pool**2

    def groups(self, num_frames_B: Sequence[int], config: VidiConfig) -> list[Group]:
        return groups(num_frames_B, config)

    def tokens_side(self, group: Group) -> int:
        return group.side // self.pool

    def forward(self, tower_FLC: Tensor, group: Group, tap: Tap = no_tap) -> Tensor:
        """Rows of patches (F, P·P, C) -> (F, h, w, channels)."""
        grid = tap("vision.pad", pad(tower_FLC, self.pool))
        if grid.shape[-1] != group.side:
            grid = tap(f"vision.resize{group.suffix}", resize(grid, group.side))
        return tap(f"vision.space_to_depth{group.suffix}", space_to_depth(grid, self.pool)).permute(0, 2, 3, 1)
