"""Faults between tower and tokens: pad, resize, fold, project, norm, pack (spec §3.2-3.9, §4.4), with every misreading that
people had of the 4608 inputs of the projector."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf

from vidi.parity.faults.plant import plant


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
    return lambda grid, side: nnf.interpolate(grid, size=(side, side), **options)


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


@plant("vidi.bridge.norm.EPS")
def rms_eps(original: float) -> float:
    """Epsilon 1e-6, the decoder's, in every norm of the bridge (1e-5)."""
    return 1e-6


@plant("vidi.bridge.norm.rms")
def rms_eps_outside(original: Any) -> Any:
    """Epsilon added to the root in place of to the mean square."""
    return lambda x: x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-5)


@plant("vidi.bridge.norm.rms")
def rms_centred(original: Any) -> Any:
    """The mean is subtracted, as in LayerNorm."""
    return lambda x: original(x - x.mean(-1, keepdim=True))


@plant("vidi.bridge.norm.rms")
def rms_as_l2(original: Any) -> Any:
    """The sum of squares in place of their mean."""
    return lambda x: original(x) / x.shape[-1] ** 0.5


@plant("vidi.bridge.norm.RMSNorm.forward")
def norm_weight_plus_one(original: Any) -> Any:
    """The bridge's weight taken as Gemma's, stored minus one."""
    return lambda self, x: original(self, x) * (1 + 1 / self.weight)


@plant("model.bridge.image_norm")
def image_norm_without_weight(original: Any) -> Any:
    """The weight of the image norm is not applied."""
    module = original.__self__
    return lambda x: original(x) / module.weight


@plant("model.bridge.image_norm")
def image_norm_is_audio_norm(original: Any, model: Any) -> Any:
    """Image features normed with the audio norm's weight."""
    return lambda x: model.bridge.audio_norm(x)


@plant("model.bridge.audio_norm")
def audio_norm_is_image_norm(original: Any, model: Any) -> Any:
    """Audio features normed with the image norm's weight."""
    return lambda x: model.bridge.image_norm(x)


@plant("model.bridge.llm_norm.weight")
def llm_norm_one_percent(original: Any) -> Any:
    """The last norm's weight one percent too large."""
    return original * 1.01


@plant("model.bridge.llm_norm.weight")
def llm_norm_initial(original: Any) -> Any:
    """The last norm at its initial value: its weight was not loaded."""
    return torch.full_like(original, 0.028976401314139366)


@plant("model.bridge.llm_norm")
def llm_norm_over_tokens(original: Any) -> Any:
    """The last norm takes its mean over tokens in place of channels."""
    module = original.__self__
    return lambda x: module.weight * x * torch.rsqrt(x.square().mean(-2, keepdim=True) + 1e-5)


@plant("vidi.bridge.pack.to_stream[norm]", case="absent")
def llm_norm_not_masked(original: Any) -> Any:
    """Tokens that are not kept are normed and passed on, not multiplied by the mask."""
    from vidi.inputs import batch
    from vidi.stream import Stream

    def to_stream(rows: Any, tokens: Any, signal: Any, llm_norm: Any, modality: str, tap: Any) -> Any:
        kept = original(rows, tokens, signal, llm_norm, modality, lambda i, x: i.endswith("llm_norm") or tap(i, x))
        x = llm_norm(batch.pad_rows(list(rows.split(list(tokens)))))
        tap(f"{modality}.llm_norm", x)
        return Stream(x, kept.keep_BL)

    return to_stream


@plant("vidi.bridge.pack.to_stream[split]")
def samples_exchanged(original: Any) -> Any:
    """The token counts of the samples stand in the wrong order."""
    return lambda rows, tokens, *rest: original(rows, list(tokens)[::-1], *rest)


@plant("vidi.bridge.visual._frame_tokens[flatten]")
def flattened_columns_first(original: Any) -> Any:
    """Flattened in the order (t, w, h)."""
    return lambda *given: original(*given).transpose(1, 2)


@plant("vidi.bridge.visual._frame_tokens[flatten]")
def flattened_backwards(original: Any) -> Any:
    """Rows of a frame from the bottom up."""
    return lambda *given: original(*given).flip(1)


@plant("vidi.bridge.visual._frame_tokens[flatten]")
def flattened_time_last(original: Any) -> Any:
    """Flattened in the order (h, w, t): the frames of all videos interleave."""

    def frame_tokens(*given: Any) -> Any:
        x = original(*given)
        return x.permute(1, 2, 0, 3).reshape(x.shape)

    return frame_tokens


@plant("vidi.inputs.batch.pad_rows")
def padded_at_the_left(original: Any) -> Any:
    """Streams padded at the left."""

    def pad_rows(rows: Any, length: int | None = None) -> Any:
        padded = original(rows, length)
        return torch.stack([x.roll(len(x) - len(row), 0) for x, row in zip(padded, rows, strict=True)])

    return pad_rows


@plant("vidi.inputs.batch.pad_rows")
def padded_with_last_row(original: Any) -> Any:
    """Padding holds the last token: features are padded before the mask is computed from them."""

    def pad_rows(rows: Any, length: int | None = None) -> Any:
        padded = original(rows, length).clone()
        for x, row in zip(padded, rows, strict=True):
            if len(row):
                x[len(row) :] = row[-1]
        return padded

    return pad_rows
