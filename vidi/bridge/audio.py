"""Tower features of audio pieces -> audio tokens (spec §4.2-4.5).

Dims: B samples, P pieces of all samples joined, L tower positions, C encoder width, D decoder width, A tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vidi.bridge import pack, position
from vidi.bridge.bridge import Bridge
from vidi.bridge.position import Noise
from vidi.config import VidiConfig
from vidi.inputs import batch
from vidi.stream import Stream
from vidi.tap import Tap, no_tap

__all__ = ["encode", "num_positions", "num_tokens", "pool", "trim"]


def num_positions(size: int, config: VidiConfig) -> int:
    """Tower positions that carry ``size`` mel frames of sound: floor(size · positions / mel frames of a piece) (§4.2)."""
    return size * config.audio.max_source_positions // config.audio.mel_frames


def num_tokens(size: int, config: VidiConfig) -> int:
    """Audio tokens of ``size`` mel frames: whole pooling windows only (§4.3). 0 means: this sample has no audio."""
    return num_positions(size, config) // config.audio_pool_size


def trim(tower_PLC: Tensor, num_pieces_B: Sequence[int], num_positions_B: Sequence[int]) -> Tensor:
    """Join each sample's pieces, cut to its positions, zero-pad the batch: (B, max, C) (§4.2)."""
    samples = tower_PLC.split(list(num_pieces_B))
    return batch.pad_rows([x.flatten(0, 1)[:n] for x, n in zip(samples, num_positions_B, strict=True)])


def pool(trimmed_BLC: Tensor, conv: torch.nn.Conv1d) -> Tensor:
    """Width change and pooling in one strided convolution over the padded batch: (B, D, L // 5), untrimmed (§4.3)."""
    return conv(trimmed_BLC.transpose(1, 2))


def encode(
    bridge: Bridge,
    tower_PLC: Tensor,
    num_pieces_B: Sequence[int],
    sizes_B: Sequence[int],
    signal_B: Tensor,
    config: VidiConfig,
    *,
    noise: Noise | None = None,
    tap: Tap = no_tap,
) -> Stream:
    """Features of all pieces to one right-padded stream; at least one sample must hold a whole token (`num_tokens`).

    ``sizes_B``: mel frames of sound per sample. ``signal_B`` (B,) bool: that sample's log-mel is not all zero.
    """
    tower_PLC = tap("audio.tower", tower_PLC)
    positions_B = [num_positions(size, config) for size in sizes_B]
    tokens_B = [n // config.audio_pool_size for n in positions_B]
    trimmed_BLC = tap("audio.trim", trim(tower_PLC, num_pieces_B, positions_B))
    pooled_BDA = tap("audio.pool", pool(trimmed_BLC, bridge.audio_pool))
    x = torch.cat([row.T[:n] for row, n in zip(pooled_BDA, tokens_B, strict=True)])
    x = tap("audio.projector", bridge.audio_projector(x))
    x = tap("audio.norm", bridge.audio_norm(x))
    embeds = []
    for b, length in enumerate(tokens_B):
        if length:
            embed = position.embed(bridge.pos_t, f"t_a.{b}", length, noise, x.dtype)
            embeds.append(tap(f"audio.pos_t.embed.{b}", embed))
    x = tap("audio.pos_t", position.add(x, torch.cat(embeds)))
    return pack.to_stream(x, tokens_B, signal_B, bridge.llm_norm, "audio", tap)
