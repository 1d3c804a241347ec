"""Tower features of frames -> visual tokens (spec §3.2-3.9). How a patch grid becomes tokens is the grid's own: `fold`
or `conv_pool`.

Dims: B videos, F frames of all videos joined, L patches, C encoder width, D decoder width, S grid side, V tokens.

Everything up to packing acts on single frames, so frames pass in chunks of any size: a memory knob, never a result.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from vidi.bridge import pack, position
from vidi.bridge.bridge import Bridge
from vidi.bridge.fold import Group, groups
from vidi.bridge.position import Noise
from vidi.config import VidiConfig
from vidi.stream import Stream
from vidi.tap import Tap, no_tap

__all__ = ["Group", "encode", "groups", "split_at"]


def split_at(chunks_FLC: Iterable[Tensor], sizes: Iterable[int]) -> Iterator[Tensor]:
    """Cut a sequence of frame chunks further, so that none reaches over the end of a run of ``sizes`` frames."""
    ends = itertools.accumulate(sizes)
    start, end = 0, next(ends)
    for chunk in chunks_FLC:
        while start + len(chunk) > end:
            if end > start:
                yield chunk[: end - start]
                chunk, start = chunk[end - start :], end
            end = next(ends, sys.maxsize)
        if len(chunk):
            yield chunk
        start += len(chunk)


def encode(
    bridge: Bridge,
    features_FLC: Iterable[Tensor],
    num_frames_B: Sequence[int],
    signal_B: Tensor,
    config: VidiConfig,
    *,
    noise: Noise | None = None,
    tap: Tap = no_tap,
) -> Stream:
    """Tower features, in chunks of consecutive frames of the joined videos, to one right-padded stream.

    ``signal_B`` (B,) bool: the raw frames of that video are not all zero. ``noise`` (training): index noise by axis
    ("h", "w", "t_v.b") and length. Raises ValueError where the chunks do not hold exactly the announced frames.
    """
    grid = bridge.image_grid
    plan = [group for group in grid.groups(num_frames_B, config) if group.num_frames]
    chunks = split_at(features_FLC, [group.num_frames for group in plan])
    dtype = bridge.llm_norm.weight.dtype
    tokens, tokens_B = [], [0] * len(num_frames_B)
    for group in plan:
        side = grid.tokens_side(group)
        pos_h, pos_w = (
            position.embed(module, axis, side, noise, dtype)
            for module, axis in ((bridge.pos_h, "h"), (bridge.pos_w, "w"))
        )
        along = {
            "pos_h": tap(f"vision.pos_h.embed{group.suffix}", pos_h[None, :, None]),
            "pos_w": tap(f"vision.pos_w.embed{group.suffix}", pos_w[None, None]),
        }
        time = []
        for b in group.videos:
            tokens_B[b] = num_frames_B[b] * side**2
            if num_frames_B[b]:
                embed = position.embed(bridge.pos_t, f"t_v.{b}", num_frames_B[b], noise, dtype)
                time.append(tap(f"vision.pos_t.embed.{b}", embed[:, None, None]))
        time_F11D = torch.cat(time)
        done = 0
        while done < group.num_frames:
            chunk = next(chunks, None)
            if chunk is None:
                raise ValueError(f"the tower gave too few frames; {list(num_frames_B)} per video were announced")
            embeddings = along | {"pos_t": time_F11D[done : done + len(chunk)]}
            tokens.append(_frame_tokens(bridge, chunk, group, embeddings, tap).flatten(0, 2))
            done += len(chunk)
    if next(chunks, None) is not None:
        raise ValueError(f"the tower gave too many frames; {list(num_frames_B)} per video were announced")
    return pack.to_stream(torch.cat(tokens), tokens_B, signal_B, bridge.llm_norm, "vision", tap)


def _frame_tokens(
    bridge: Bridge, tower_FLC: Tensor, group: Group, embeddings: Mapping[str, Tensor], tap: Tap
) -> Tensor:
    """(f, L, C) -> (f, h, w, D): grid, project, norm, then the three embeddings in the order height, width, time."""
    tower_FLC = tap("vision.tower", tower_FLC)
    x = tap(f"vision.projector{group.suffix}", bridge.image_projector(bridge.image_grid(tower_FLC, group, tap)))
    x = tap(f"vision.norm{group.suffix}", bridge.image_norm(x))
    for name, embedding in embeddings.items():
        x = tap(f"vision.{name}{group.suffix}", position.add(x, embedding))
    return x
