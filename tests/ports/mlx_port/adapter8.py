"""The same port with MLX's own 8-bit weights, in groups of 64: embedding, projectors and decoder."""

import mlx.nn as nn
from adapter import STAGES, forward
from adapter import build as build_float32

__all__ = ["STAGES", "build", "forward"]


def build(config, weights):
    model = build_float32(config, weights)
    nn.quantize(model, group_size=64, bits=8, class_predicate=quantised)
    return model


def quantised(path, module):
    """Not the towers, and not the position MLPs: their angles are worth float32 even inside a half-precision model (§5)."""
    return hasattr(module, "to_quantized") and not any(part in path for part in ("mm_vis", "mm_aud", "mm_rand_pos"))
