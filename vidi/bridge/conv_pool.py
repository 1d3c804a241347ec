"""Patch grid -> a small grid of tokens by a learned convolution and bilinear sampling (spec of the 7B, §3.2-3.3).

Dims: F frames, P patches a side, C encoder width, K kernel, R rows after the convolution (P - K + 1), N tokens a side,
S rows that are sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from vidi import precision
from vidi.bridge.fold import Group
from vidi.config import VidiConfig
from vidi.tap import Tap, no_tap

__all__ = ["ConvPool", "corner_rows", "square"]


def corner_rows(rows: int, samples: int) -> tuple[list[int], Tensor]:
    """Bilinear sampling of one axis from corner to corner: sample i stands at row i·(rows-1)/(samples-1).

    Returns the rows that are touched, S of them, and their weights, (samples, S) float64. For 2 samples of 14 rows that
    is rows 0 and 13; for 4 of 21 it is 0, 6, 7, 13, 14 and 20.
    """
    weights = torch.zeros(samples, rows, dtype=torch.float64, device="cpu")
    for i in range(samples):
        whole, rest = divmod(i * (rows - 1), max(samples - 1, 1))
        part = rest / max(samples - 1, 1)
        weights[i, whole] += 1 - part
        weights[i, min(whole + 1, rows - 1)] += part
    touched = (weights != 0).any(0).nonzero().flatten()
    return touched.tolist(), weights[:, touched]


def square(tower_FLC: Tensor) -> Tensor:
    """Rows of patches (F, P·P, C) -> (F, C, P, P), row by row."""
    frames, patches, channels = tower_FLC.shape
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"{patches} patches are no square grid; the tower's output must keep every patch")
    return tower_FLC.transpose(1, 2).reshape(frames, channels, side, side)


class ConvPool(nn.Module):
    """Convolution with stride 1, then samples from corner to corner: N² tokens a frame, whatever the number of frames.
    `channels` is what the projector sees.

    everywhere: compute the convolution also where no sample touches it, as the recordings hold it. At full size that is
    196 windows a frame instead of 4.
    """

    def __init__(self, config: VidiConfig) -> None:
        super().__init__()
        self.everywhere = False
        self.patches, self.pool, kernel = config.vision.patches_per_side, config.image_pool_size, config.image_kernel
        self.channels = config.vision.hidden_size
        self.conv = nn.Conv2d(self.channels, self.channels, kernel, bias=False)
        self.rows, self.weights_NS = corner_rows(self.patches - kernel + 1, self.pool)

    def groups(self, num_frames_B: Sequence[int], config: VidiConfig) -> list[Group]:
        """All videos share one grid, whatever their number of frames."""
        return [Group(range(len(num_frames_B)), sum(num_frames_B), self.patches, "")]

    def tokens_side(self, group: Group) -> int:
        return self.pool

    def forward(self, tower_FLC: Tensor, group: Group, tap: Tap = no_tap) -> Tensor:
        """Rows of patches (F, P·P, C) -> (F, N, N, C)."""
        grid_FCPP = square(tower_FLC)
        if self.everywhere:
            conv_FCSS = self.sampled(tap("vision.conv", self.conv(grid_FCPP)))
        else:
            conv_FCSS = self.at_samples(grid_FCPP)
        return tap("vision.pool", self.sample(conv_FCSS)).permute(0, 2, 3, 1)

    def sampled(self, conv_FCRR: Tensor) -> Tensor:
        """The sampled rows and columns alone, (F, C, S, S)."""
        return conv_FCRR[:, :, self.rows][..., self.rows]

    def at_samples(self, grid_FCPP: Tensor) -> Tensor:
        """The convolution at the sampled rows and columns alone."""
        kernel = self.conv.kernel_size[0]
        windows = [grid_FCPP[:, :, y : y + kernel, x : x + kernel] for y in self.rows for x in self.rows]
        flat = torch.stack(windows, 1).flatten(2)
        conv_FsC = nnf.linear(flat, self.conv.weight.flatten(1))
        return conv_FsC.transpose(1, 2).unflatten(-1, (len(self.rows), len(self.rows)))

    def sample(self, conv_FCSS: Tensor) -> Tensor:
        """Rows, then columns, in at least float32: (F, C, N, N)."""
        wide = precision.at_least_float32(conv_FCSS)
        weights_NS = self.weights_NS.to(wide)
        return (weights_NS @ wide @ weights_NS.T).to(conv_FCSS.dtype)
