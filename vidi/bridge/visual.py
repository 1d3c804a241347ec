"""Tower features of frames -> visual tokens (spec §3.2-3.9).

Dims: B videos, F frames of all videos joined, L patches, C encoder width, D decoder width, S grid side, V tokens.

Everything up to packing acts on single frames, so frames pass in chunks of any size: a memory knob, never a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from vidi.bridge import fold, pack, position
from vidi.bridge.bridge import Bridge
from vidi.config import VidiConfig
from vidi.stream import Stream
from vidi.tap import Tap, no_tap

__all__ = ["encode", "grid_sides", "split_at"]

Noise = Callable[[int], Tensor]


def grid_sides(num_frames_B: Sequence[int], config: VidiConfig) -> list[int]:
    """Side of the (padded, maybe shrunk) patch grid of each video, before folding (§3.3).

    Scope "batch": the frames of all videos share one budget, as in the official release. Scope "video": each video has
    its own, so that a result does not depend on its neighbours.
    """
    side = config.vision.patches_per_side
    side += -side % config.image_pool_size
    total = sum(num_frames_B)
    return [
        fold.resized_side(total if config.budget_scope == "batch" else n, side, config.visual_token_budget)
        for n in num_frames_B
    ]


def split_at(chunks_FLC: Iterable[Tensor], cuts: Iterable[int]) -> Iterator[Tensor]:
    """Cut a sequence of frame chunks further, at the absolute frame numbers ``cuts`` (ascending)."""
    start, pending = 0, list(cuts)
    for chunk in chunks_FLC:
        while pending and pending[0] < start + len(chunk):
            cut = pending.pop(0) - start
            if cut > 0:
                yield chunk[:cut]
                chunk, start = chunk[cut:], start + cut
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

    ``signal_B`` (B,) bool: the raw frames of that video are not all zero. ``noise`` (training): length -> index noise.
    Raises ValueError where the chunks do not hold exactly the announced frames.
    """
    sides = grid_sides(num_frames_B, config)
    starts = [sum(num_frames_B[:b]) for b in range(len(num_frames_B) + 1)]
    side_cuts = [starts[b] for b in range(1, len(sides)) if sides[b] != sides[b - 1]]
    dtype, device = bridge.llm_norm.weight.dtype, bridge.llm_norm.weight.device

    def embed(module: position.PositionEmbedding, length: int) -> Tensor:
        return module(length, dtype, noise(length) if noise else None)

    along_side = {
        s: (embed(bridge.pos_h, s // 2)[None, :, None], embed(bridge.pos_w, s // 2)[None, None]) for s in sides
    }
    time_FD = []
    for b, frames in enumerate(num_frames_B):
        time_FD.append(embed(bridge.pos_t, frames))
        tap(f"vision.pos_t.embed.{b}", time_FD[b][:, None, None])
    time_FD = torch.cat(time_FD)

    tokens: list[Tensor] = []
    done = 0
    tapped_side = None
    for chunk in split_at(features_FLC, side_cuts):
        video = next(b for b in range(len(sides)) if starts[b + 1] > done)
        side = sides[video]
        pos_h, pos_w = along_side[side]
        if side != tapped_side:
            tap("vision.pos_h.embed", pos_h)
            tap("vision.pos_w.embed", pos_w)
            tapped_side = side
        time_F11D = time_FD[done : done + len(chunk), None, None].to(device)
        tokens.append(_frame_tokens(bridge, chunk, side, pos_h, pos_w, time_F11D, config.image_pool_size, tap))
        done += len(chunk)
    if done != starts[-1]:
        raise ValueError(f"the tower gave {done} frames, {starts[-1]} were announced ({list(num_frames_B)} per video)")

    rows = torch.cat([t.flatten(0, 2) for t in tokens])
    tokens_B = [
        frames * (side // config.image_pool_size) ** 2 for frames, side in zip(num_frames_B, sides, strict=True)
    ]
    return pack.to_stream(rows, tokens_B, signal_B, bridge.llm_norm, "vision", tap)


def _frame_tokens(
    bridge: Bridge, tower_FLC: Tensor, side: int, pos_h: Tensor, pos_w: Tensor, time_F11D: Tensor, pool: int, tap: Tap
) -> Tensor:
    """(f, L, C) -> (f, h, w, D): fold, project, norm, then the three embeddings in the order height, width, time."""
    tap("vision.tower", tower_FLC)
    grid = fold.pad(tower_FLC, pool)
    tap("vision.pad", grid)
    if grid.shape[-1] != side:
        grid = fold.resize(grid, side)
        tap("vision.resize", grid)
    folded = fold.space_to_depth(grid, pool)
    tap("vision.space_to_depth", folded)
    x = bridge.image_projector(folded.permute(0, 2, 3, 1))
    tap("vision.projector", x)
    x = bridge.image_norm(x)
    tap("vision.norm", x)
    for name, embedding in (("pos_h", pos_h), ("pos_w", pos_w), ("pos_t", time_F11D)):
        x = position.add(x, embedding)
        tap(f"vision.{name}", x)
    return x
