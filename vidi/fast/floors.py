"""The least time a machine could take: counted work over the rates it reaches (a large product, a copy).

Counted is what the formulas ask for, also where the fast path needs less (folded output projection); not counted are the
bridge, the text rows and every intermediate tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from vidi.bridge import audio
from vidi.bridge.bridge import GRIDS
from vidi.bridge.conv_pool import ConvPool
from vidi.bridge.fold import Fold
from vidi.config import VidiConfig

__all__ = ["Ceilings", "Work", "count"]


@dataclass(frozen=True)
class Ceilings:
    """Rates measured on one device in one run: operations a second of a product, bytes a second of a copy.

    sustained_flops: the product's rate once it has run for seconds, as a long video does. Floors do not use it.
    """

    product_flops: float
    copy_bytes: float
    sustained_flops: float


@dataclass(frozen=True)
class Work:
    """Counted work of one video: operations to encode and prefill, bytes read by a decoding step."""

    visual_tokens: int
    audio_tokens: int
    encode_flops: int
    prefill_flops: int
    decode_bytes: int

    def floors(self, ceilings: Ceilings) -> dict[str, float]:
        """encode_s, prefill_s, decode_ms."""
        return {
            "encode_s": self.encode_flops / ceilings.product_flops,
            "prefill_s": self.prefill_flops / ceilings.product_flops,
            "decode_ms": 1e3 * self.decode_bytes / ceilings.copy_bytes,
        }


def count(config: VidiConfig, num_frames: int, mel_frames: int, num_pieces: int, text_tokens: int, width: int) -> Work:
    """Work for one video; ``width``: bytes of a parameter and of a cached value."""
    v, a, d = config.vision, config.audio, config.decoder
    patches = v.patches_per_side**2
    frame = (v.num_layers - 1) * _tower_layer(patches, v.hidden_size, v.intermediate_size)
    piece = a.num_layers * _tower_layer(a.max_source_positions, a.hidden_size, a.intermediate_size)
    piece += 2 * 3 * a.hidden_size * (a.mel_frames * a.num_mel_bins + a.max_source_positions * a.hidden_size)
    grid = _grid(config)
    visual_tokens = num_frames * grid.tokens_side(grid.groups([num_frames], config)[0]) ** 2
    audio_tokens = audio.num_tokens(mel_frames, config)
    keys_values = d.hidden_size * 2 * d.num_kv_heads * d.head_dim
    output = d.num_heads * d.head_dim * d.hidden_size
    mlp = 3 * d.hidden_size * d.intermediate_size
    token = 2 * (d.num_layers * keys_values + (d.num_layers - 1) * (output + mlp))
    layer = keys_values + 2 * output + mlp
    weights = d.num_layers * layer + d.vocab_size * d.hidden_size
    cached = (visual_tokens + audio_tokens + text_tokens) * d.num_layers * 2 * d.num_kv_heads * d.head_dim
    return Work(
        visual_tokens=visual_tokens,
        audio_tokens=audio_tokens,
        encode_flops=num_frames * frame + num_pieces * piece,
        prefill_flops=(visual_tokens + audio_tokens) * token,
        decode_bytes=width * (weights + cached),
    )


@lru_cache
def _grid(config: VidiConfig) -> Fold | ConvPool:
    """What turns patches into tokens, for its counts alone: no weights."""
    with torch.device("meta"):
        return GRIDS[config.image_grid](config)


def _tower_layer(length: int, width: int, inner: int) -> int:
    """Operations of one tower layer over one sequence: four projections, two of the MLP, scores and weighted sum."""
    return 2 * length * (4 * width * width + 2 * width * inner + 2 * length * width)
