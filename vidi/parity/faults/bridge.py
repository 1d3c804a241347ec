"""Faults between tower and norm: pad, resize, fold, project (spec §3.2-3.5, §4.4), with every misreading that people had of
the 4608 inputs of the projector."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf

from stageparity.faults.plant import plant
from vidi import precision


@plant("vidi.bridge.fold.pad")
def pad_top_left(original: Any) -> Any:
    """Zeros above and at the left."""
    return lambda x, pool=2: original(x, pool).roll((1, 1), (-2, -1))


@plant("vidi.bridge.fold.pad")
def pad_replicate(original: Any) -> Any:
    """The border repeated in place of zeros."""
    return lambda x, pool=2: nnf.pad(original(x, pool)[..., :-1, :-1], (0, 1, 0, 1), mode="replicate")


@plant("vidi.bridge.fold.pad")
def pad_columns_first(original: Any) -> Any:
    """Patches laid out column by column."""
    return lambda x, pool=2: original(x, pool).transpose(-1, -2)


@plant("vidi.bridge.fold.pad")
def pad_by_stretching(original: Any) -> Any:
    """The grid is stretched to its even side in place of being padded."""

    def pad(x: Any, pool: int = 2) -> Any:
        grid = original(x, pool)
        return nnf.interpolate(grid[..., :-1, :-1], size=grid.shape[-2:], mode="bilinear")

    return pad


def _resize(**options: Any) -> Any:
    def resize(grid: Any, side: int) -> Any:  # torch antialiases no half precision
        return nnf.interpolate(grid.to(precision.promoted(grid.dtype)), size=(side, side), **options).to(grid.dtype)

    return resize


@plant("vidi.bridge.fold.resize", case="budget")
def resize_align_corners(original: Any) -> Any:
    """align_corners=True, as in the 7B."""
    return _resize(mode="bilinear", align_corners=True)


@plant("vidi.bridge.fold.resize", case="budget")
def resize_antialias(original: Any) -> Any:
    """Antialiased."""
    return _resize(mode="bilinear", antialias=True)


@plant("vidi.bridge.fold.resize", case="budget")
def resize_bicubic(original: Any) -> Any:
    """Bicubic."""
    return _resize(mode="bicubic")


@plant("vidi.bridge.fold.resize", case="budget")
def resize_nearest(original: Any) -> Any:
    """Nearest neighbour."""
    return _resize(mode="nearest")


@plant("vidi.bridge.fold.resize", case="budget")
def resize_by_pooling(original: Any) -> Any:
    """Adaptive average pooling."""
    return lambda grid, side: nnf.adaptive_avg_pool2d(grid, side)


@plant("vidi.bridge.fold.resize", case="budget")
def resize_after_folding(original: Any) -> Any:
    """Resized on the folded grid, not on the patches."""

    def resize(grid: Any, side: int) -> Any:
        folded = nnf.interpolate(nnf.pixel_unshuffle(grid, 2), size=(side // 2, side // 2), mode="bilinear")
        return nnf.pixel_shuffle(folded, 2)

    return resize


@plant("vidi.bridge.fold.resize", case="budget")
def resize_of_unpadded_grid(original: Any) -> Any:
    """Resized without the zeros at the right and below."""
    return lambda grid, side: original(grid[..., :-1, :-1], side)


@plant("vidi.bridge.fold.space_to_depth")
def fold_channels_last(original: Any) -> Any:
    """Channel order (dy, dx, c) in place of (c, dy, dx)."""
    return lambda grid, pool=2: original(grid, pool).unflatten(1, (-1, pool**2)).transpose(1, 2).flatten(1, 2)


@plant("vidi.bridge.fold.space_to_depth")
def fold_dx_before_dy(original: Any) -> Any:
    """Channel order (c, dx, dy)."""
    return lambda grid, pool=2: original(grid, pool).unflatten(1, (-1, pool, pool)).transpose(2, 3).flatten(1, 3)


@plant("vidi.bridge.fold.space_to_depth")
def fold_four_in_a_row(original: Any) -> Any:
    """Four neighbours of the flattened grid become a token, not a 2×2 block."""

    def fold(grid: Any, pool: int = 2) -> Any:
        frames, channels, side, _ = grid.shape
        return grid.reshape(frames, channels, -1, 4).transpose(2, 3).reshape(frames, channels * 4, side // 2, side // 2)

    return fold


@plant("vidi.bridge.fold.space_to_depth")
def fold_far_apart(original: Any) -> Any:
    """A token holds one patch of each quadrant of the frame."""

    def fold(grid: Any, pool: int = 2) -> Any:
        half = grid.shape[-1] // pool
        blocks = grid.unflatten(-1, (pool, half)).unflatten(-3, (pool, half))  # F C dy h dx w
        return blocks.permute(0, 1, 2, 4, 3, 5).flatten(1, 3)

    return fold


@plant("model.bridge.image_projector")
def one_token_a_frame(original: Any) -> Any:
    """Misreading: the frame is one token (its mean stands at every place)."""
    return lambda x: original(x.mean((1, 2), keepdim=True).expand_as(x))


@plant("model.bridge.image_projector")
def project_each_location(original: Any) -> Any:
    """Misreading: each patch is projected alone, as in the 7B; a block's four results are averaged."""

    def forward(x: Any) -> Any:
        parts = x.unflatten(-1, (-1, 4))
        alone = [original(parts[..., k : k + 1].expand_as(parts).flatten(-2)) for k in range(4)]
        return torch.stack(alone).mean(0)

    return forward


@plant("model.bridge.image_projector")
def pool_to_two_by_two(original: Any) -> Any:
    """Misreading: features pooled to a 2×2 grid (repeated here to keep the count)."""

    def forward(x: Any) -> Any:
        channels_first = x.permute(0, 3, 1, 2)
        pooled = nnf.interpolate(nnf.adaptive_avg_pool2d(channels_first, 2), size=x.shape[1:3], mode="nearest")
        return original(pooled.permute(0, 2, 3, 1))

    return forward


@plant("model.bridge.image_projector")
def project_then_reshape(original: Any) -> Any:
    """Misreading: flatten, project, reshape to 2×2×896: a token's channels are dealt out to a 2×2 block."""

    def forward(x: Any) -> Any:
        y = original(x)
        frames, height, width, channels = y.shape
        dealt = y.view(frames, height, width, 2, 2, channels // 4).permute(0, 1, 3, 2, 4, 5)
        return dealt.reshape(frames, height, width, channels)

    return forward


@plant("vidi.bridge.projector.Projector.forward")
def projector_gelu_tanh(original: Any) -> Any:
    """GELU in its tanh form in both projectors."""
    return lambda self, x: self.fc2(nnf.gelu(self.fc1(x), approximate="tanh"))


@plant("model.bridge.image_projector")
def projector_without_gelu(original: Any) -> Any:
    """The two linear layers without anything between them."""
    module = original.__self__
    return lambda x: module.fc2(module.fc1(x))


@plant("model.bridge.image_projector.fc2.bias")
def projector_without_bias(original: Any) -> Any:
    """The second layer's bias left out."""
    return torch.zeros_like(original)


@plant("model.bridge.audio_projector")
def audio_projector_gelu_tanh(original: Any) -> Any:
    """GELU in its tanh form in the audio projector alone."""
    module = original.__self__
    return lambda x: module.fc2(nnf.gelu(module.fc1(x), approximate="tanh"))


@plant("model.bridge.audio_projector")
def audio_projector_skipped(original: Any) -> Any:
    """The pooled features pass as they are: the convolution has changed the width already."""
    return lambda x: x
