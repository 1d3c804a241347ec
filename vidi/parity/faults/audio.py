"""Faults between Whisper's output and audio tokens (spec §4.2-4.3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf

from stageparity.faults.plant import plant


@plant("vidi.bridge.audio.trim")
def one_position_late(original: Any) -> Any:
    """Positions start one late before pooling."""
    return lambda tower, pieces, positions: original(tower, pieces, positions).roll(-1, 1)


@plant("vidi.bridge.audio.trim")
def not_trimmed(original: Any) -> Any:
    """Positions beyond the sound's length are kept, as far as the batch reaches."""

    def trim(tower: Any, pieces: Any, positions: Any) -> Any:
        longest = max(positions)
        have = [min(len(x) * tower.shape[1], longest) for x in tower.split(list(pieces))]
        return original(tower, pieces, have)

    return trim


@plant("vidi.bridge.audio.trim")
def trimmed_by_one_more(original: Any) -> Any:
    """The last position is lost."""

    def trim(tower: Any, pieces: Any, positions: Any) -> Any:
        out = original(tower, pieces, positions).clone()
        for row, count in zip(out, positions, strict=True):
            row[count - 1 :] = 0
        return out

    return trim


@plant("vidi.bridge.audio.trim")
def pieces_reversed(original: Any) -> Any:
    """The pieces of a sample are joined in the wrong order."""
    return lambda tower, pieces, positions: original(
        torch.cat([x.flip(0) for x in tower.split(list(pieces))]), pieces, positions
    )


@plant("vidi.bridge.audio.trim")
def pieces_interleaved(original: Any) -> Any:
    """The pieces of a sample are joined position by position."""
    return lambda tower, pieces, positions: original(
        torch.cat([x.transpose(0, 1).reshape(x.shape) for x in tower.split(list(pieces))]), pieces, positions
    )


@plant("vidi.bridge.audio.trim")
def pieces_of_other_sample(original: Any) -> Any:
    """Pieces are dealt out to the samples from the wrong end."""

    def trim(tower: Any, pieces: Any, positions: Any) -> Any:
        return original(tower.roll(1, 0), pieces, positions)

    return trim


@plant("vidi.bridge.audio.trim")
def trimmed_at_the_front(original: Any) -> Any:
    """The last positions are kept in place of the first."""

    def trim(tower: Any, pieces: Any, positions: Any) -> Any:
        samples = [x.flatten(0, 1) for x in tower.split(list(pieces))]
        out = original(tower, pieces, positions).clone()
        for row, x, count in zip(out, samples, positions, strict=True):
            row[:count] = x[len(x) - count :]
        return out

    return trim


@plant("vidi.bridge.audio.pool")
def stride_four(original: Any) -> Any:
    """A window every four positions."""

    def pool(trimmed: Any, conv: Any) -> Any:
        out = nnf.conv1d(trimmed.transpose(1, 2), conv.weight, stride=4)
        return out[..., : trimmed.shape[1] // 5]

    return pool


@plant("vidi.bridge.audio.pool")
def pool_padded(original: Any) -> Any:
    """Windows centred on their position: two zeros in front."""

    def pool(trimmed: Any, conv: Any) -> Any:
        out = nnf.conv1d(trimmed.transpose(1, 2), conv.weight, stride=5, padding=2)
        return out[..., : trimmed.shape[1] // 5]

    return pool


@plant("model.bridge.audio_pool.weight")
def pool_backwards(original: Any) -> Any:
    """The kernel runs backwards in time."""
    return original.flip(-1)


@plant("model.bridge.audio_pool.weight")
def pool_average(original: Any) -> Any:
    """The kernel's taps are averaged: a mean over five positions, then a projection."""
    return original.mean(-1, keepdim=True).expand_as(original).clone()


@plant("model.bridge.audio_pool.weight")
def pool_drops_last_tap(original: Any) -> Any:
    """A kernel of four."""
    kernel = original.clone()
    kernel[..., -1] = 0
    return kernel


@plant("vidi.bridge.audio.encode[projector]")
def tokens_from_the_end(original: Any) -> Any:
    """Of the pooled windows the last ones are kept, not the first."""
    from vidi.bridge import audio

    def encode(bridge: Any, tower: Any, pieces: Any, sizes: Any, signal: Any, config: Any, **rest: Any) -> Any:
        counts, pool = [audio.num_tokens(size, config) for size in sizes], audio.pool
        tap = rest.pop("tap")

        def turned(trimmed: Any, conv: Any) -> Any:
            out = tap("audio.pool", pool(trimmed, conv))
            return torch.stack([row.roll(n - out.shape[-1], -1) for row, n in zip(out, counts, strict=True)])

        audio.pool = turned  # type: ignore[assignment]
        try:
            own = lambda i, x: x if i == "audio.pool" else tap(i, x)  # noqa: E731
            return original(bridge, tower, pieces, sizes, signal, config, tap=own, **rest)
        finally:
            audio.pool = pool

    return encode
