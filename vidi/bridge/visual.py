"""Tower features of frames -> visual tokens (spec §3.2-3.9).

Dims: B videos, F frames of all videos joined, L patches, C encoder width, D decoder width, S grid side, V tokens.

Everything up to packing acts on single frames, so frames pass in chunks of any size: a memory knob, never a result.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vidi.bridge import fold, pack, position
from vidi.bridge.bridge import Bridge
from vidi.bridge.position import Noise
from vidi.config import VidiConfig
from vidi.stream import Stream
from vidi.tap import Tap, no_tap

__all__ = ["Group", "encode", "groups", "split_at"]


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
        shrunk = fold.resized_side(total, side, config.visual_token_budget, config.image_pool_size)
        found.append(Group(videos, total, shrunk, "" if shared else f".{videos[0]}"))
    return found


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
    plan = [group for group in groups(num_frames_B, config) if group.num_frames]
    chunks = split_at(features_FLC, [group.num_frames for group in plan])
    dtype = bridge.llm_norm.weight.dtype
    pool, tokens, tokens_B = config.image_pool_size, [], [0] * len(num_frames_B)
    for group in plan:
        pos_h, pos_w = (
            position.embed(module, axis, group.side // pool, noise, dtype)
            for module, axis in ((bridge.pos_h, "h"), (bridge.pos_w, "w"))
        )
        along = {
            "pos_h": tap(f"vision.pos_h.embed{group.suffix}", pos_h[None, :, None]),
            "pos_w": tap(f"vision.pos_w.embed{group.suffix}", pos_w[None, None]),
        }
        time = []
        for b in group.videos:
            tokens_B[b] = num_frames_B[b] * (group.side // pool) ** 2
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
            tokens.append(_frame_tokens(bridge, chunk, group, embeddings, pool, tap).flatten(0, 2))
            done += len(chunk)
    if next(chunks, None) is not None:
        raise ValueError(f"the tower gave too many frames; {list(num_frames_B)} per video were announced")
    return pack.to_stream(torch.cat(tokens), tokens_B, signal_B, bridge.llm_norm, "vision", tap)


def _frame_tokens(
    bridge: Bridge, tower_FLC: Tensor, group: Group, embeddings: Mapping[str, Tensor], pool: int, tap: Tap
) -> Tensor:
    """(f, L, C) -> (f, h, w, D): fold, project, norm, then the three embeddings in the order height, width, time."""
    tower_FLC = tap("vision.tower", tower_FLC)
    grid = tap("vision.pad", fold.pad(tower_FLC, pool))
    if grid.shape[-1] != group.side:
        grid = tap(f"vision.resize{group.suffix}", fold.resize(grid, group.side))
    folded = tap(f"vision.space_to_depth{group.suffix}", fold.space_to_depth(grid, pool))
    x = tap(f"vision.projector{group.suffix}", bridge.image_projector(folded.permute(0, 2, 3, 1)))
    x = tap(f"vision.norm{group.suffix}", bridge.image_norm(x))
    for name, embedding in embeddings.items():
        x = tap(f"vision.{name}{group.suffix}", position.add(x, embedding))
    return x
