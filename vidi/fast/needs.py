"""How much memory a run takes: each tensor that is held at the peak, counted from the sizes.

Counted is the fast path over one video with sound as long, a frame a second, in bfloat16: what torch's allocator peaks at.
Measured peaks at full size lie within 1 % (`docs/performance.md`).

Dims in comments: S stream tokens, D width, F frames a batch, L patches, C encoder width, I inner width, R rows of a chunk.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

from vidi.checkpoint import names
from vidi.config import VidiConfig
from vidi.fast import floors
from vidi.fast.streams import chunk_rows

__all__ = ["CONTEXT_BYTES", "Needs", "count", "room"]

WIDTH = 2  # bytes of a bfloat16
STREAM_CHUNK, FRAME_BATCH, PIECE_BATCH = 32768, 100, 16  # defaults of FastModel
MEL_FRAMES_PER_SECOND = 100
TEXT_TOKENS = 1100  # a question, and the 1,024 tokens that `vidi retrieve` leaves room for
CONTEXT_BYTES = 600 << 20  # what CUDA takes beside torch's tensors, about
LONGEST = 24 * 3600
MOST_STEPS = 1000  # full size has about 110; sizes from a hostile config could make one of every frame


@dataclass(frozen=True)
class Needs:
    """Bytes held at the peak of a run, by what holds them; ``phase`` is when that is."""

    frames: int
    visual_tokens: int
    audio_tokens: int
    phase: str
    terms: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.terms.values())

    def fits(self, memory: int) -> bool:
        return self.peak + CONTEXT_BYTES <= memory


def count(config: VidiConfig, num_frames: int, *, text_tokens: int = TEXT_TOKENS) -> Needs:
    """What one video of ``num_frames`` seconds needs. Raises ValueError for no frames."""
    if num_frames < 1:
        raise ValueError(f"{num_frames} frames; at least 1")
    v, a, d = config.vision, config.audio, config.decoder
    mel_frames = num_frames * MEL_FRAMES_PER_SECOND
    pieces = -(-mel_frames // a.mel_frames)
    work = floors.count(config, num_frames, mel_frames, pieces, text_tokens, WIDTH)
    tokens = work.visual_tokens + work.audio_tokens
    kept = {
        "weights": _weights(config),
        # The output projection of un-repeated heads, a layer each, and the audio pool as a matrix.
        "weights in a second layout": WIDTH
        * (
            d.hidden_size * d.num_layers * d.num_kv_heads * d.head_dim
            + config.audio_pool_width * config.audio_pool_size * a.hidden_size
        ),
        "pixels and log-mel": num_frames * v.num_channels * v.image_size**2
        + WIDTH * pieces * a.num_mel_bins * a.mel_frames,
    }
    stream = WIDTH * tokens * d.hidden_size  # (S, D)
    rows = chunk_rows(tokens, STREAM_CHUNK)
    prefill = kept | {
        "visual and audio tokens, padded and in one row": 2 * stream,
        "keys and values": WIDTH * (tokens + text_tokens) * d.num_layers * 2 * d.num_kv_heads * d.head_dim,
        # normed and branch (R, D), gate and up (R, 2I), their product (R, I)
        "one chunk on its way through the layers": WIDTH * rows * (2 * d.hidden_size + 3 * d.intermediate_size),
    }
    frames, batch = min(num_frames, FRAME_BATCH), min(pieces, PIECE_BATCH)
    # Rows of a tower: residual, normed, q, k, v, attended twice (C each) and the inner layer (I).
    vision = frames * v.patches_per_side**2 * (7 * v.hidden_size + v.intermediate_size)
    sound = batch * a.max_source_positions * (7 * a.hidden_size + a.intermediate_size)
    encode = kept | {
        "visual and audio tokens, while they are put together": 3 * stream,
        "one batch in a tower": WIDTH * max(vision, sound),
        "features of all sound": WIDTH * 2 * pieces * a.max_source_positions * a.hidden_size,
    }
    phase, terms = max((("encode", encode), ("prefill", prefill)), key=lambda found: sum(found[1].values()))
    return Needs(num_frames, work.visual_tokens, work.audio_tokens, phase, terms)


@lru_cache
def _weights(config: VidiConfig) -> int:
    wanted = names.expected(config).values()
    return sum(math.prod(want.shape) * (4 if want.is_float32 else WIDTH) for want in wanted)


def room(config: VidiConfig, memory: int) -> list[tuple[int, int]]:
    """The lengths that fit, as (first, last) of each run of frames; empty where none does.

    More frames may need less: above the budget of visual tokens each frame gets fewer, and more chunks are smaller ones.
    Between such steps the need grows, so each run is found by bisection.
    """

    def step(num_frames: int) -> tuple[int, int]:
        found = count(config, num_frames)
        tokens = found.visual_tokens + found.audio_tokens
        return -(found.visual_tokens // num_frames), -(-tokens // STREAM_CHUNK)

    runs: list[tuple[int, int]] = []
    first = 1
    for _ in range(MOST_STEPS):
        if first > LONGEST:
            break
        end = first - 1 + bisect_right(range(first, LONGEST + 1), step(first), key=step)
        last = first - 1 + bisect_right(range(first, end + 1), False, key=lambda n: not count(config, n).fits(memory))
        if last >= first:
            joined = bool(runs) and runs[-1][1] == first - 1
            runs[-1:] = [(runs[-1][0], last)] if joined else [*runs[-1:], (first, last)]
        first = end + 1
    return runs
