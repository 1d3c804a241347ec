"""The synthetic weights of the released sizes in NumPy, from the rule that `vidi/checkpoint/synthetic.py` documents.

Written for the oracle, which must not be fed what the model made: names, shapes and scales are typed here again. Element i
of a tensor: two keyed 32-bit mixes of i, four 16-bit words, their sum less its mean times a power of two, plus a constant;
then rounded to bfloat16, in which the weights of a half-precision checkpoint are stored (position MLPs: float32, §5).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

import numpy as np

from goldens.oracle import Arithmetic, round_bf16
from goldens.oracle.case import Weights

__all__ = ["SHAPES", "VOCABULARY", "Tensors", "tensor"]

VOCABULARY = 2048  # of the 256,000 rows of the embedding: rows do not act on each other
PIECE = 1 << 18

_TOWER_V, _TOWER_A, _LAYER = "model.mm_vis.vision_model.", "model.mm_aud.encoder.", "model.layers."


def _shapes() -> dict[str, tuple[int, ...]]:
    """Two layers of SigLIP (the last one is never computed), one of Whisper, two of the decoder; what they compute with."""
    found: dict[str, tuple[int, ...]] = {
        _TOWER_V + "embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        _TOWER_V + "embeddings.patch_embedding.bias": (1152,),
        _TOWER_V + "embeddings.position_embedding.weight": (729, 1152),
        _TOWER_A + "conv1.weight": (1280, 128, 3),
        _TOWER_A + "conv1.bias": (1280,),
        _TOWER_A + "conv2.weight": (1280, 1280, 3),
        _TOWER_A + "conv2.bias": (1280,),
        _TOWER_A + "embed_positions.weight": (1500, 1280),
        _TOWER_A + "layer_norm.weight": (1280,),
        _TOWER_A + "layer_norm.bias": (1280,),
        "model.mm_rand_img_projector.model.0.weight": (3584, 4608),
        "model.mm_rand_aud_pool.weight": (3584, 1280, 5),
        "model.mm_rand_aud_projector.model.0.weight": (3584, 3584),
        "model.mm_rand_llm_norm.weight": (3584,),
        "model.embed_tokens.weight": (VOCABULARY, 3584),
        "model.norm.weight": (3584,),
    }
    for name in ("img", "aud"):
        found[f"model.mm_rand_{name}_projector.model.2.weight"] = (3584, 3584)
        found[f"model.mm_rand_{name}_norm.weight"] = (3584,)
        found |= {f"model.mm_rand_{name}_projector.model.{k}.bias": (3584,) for k in (0, 2)}
    for axis in "hwt":
        for k in (0, 2):
            found[f"model.mm_rand_pos_{axis}.mlp.{k}.weight"] = (3584, 3584)
            found[f"model.mm_rand_pos_{axis}.mlp.{k}.bias"] = (3584,)
    vision, audio = f"{_TOWER_V}encoder.layers.0.", f"{_TOWER_A}layers.0."
    for layer, width, inner, norms, mlp in (
        (vision, 1152, 4304, ("layer_norm1", "layer_norm2"), "mlp."),
        (audio, 1280, 5120, ("self_attn_layer_norm", "final_layer_norm"), ""),
    ):
        for part in "qkv":
            found[f"{layer}self_attn.{part}_proj.weight"] = (width, width)
            if part != "k" or layer == vision:
                found[f"{layer}self_attn.{part}_proj.bias"] = (width,)
        found |= {f"{layer}self_attn.out_proj.weight": (width, width), f"{layer}self_attn.out_proj.bias": (width,)}
        found |= {f"{layer}{norm}.{kind}": (width,) for norm in norms for kind in ("weight", "bias")}
        found |= {f"{layer}{mlp}fc1.weight": (inner, width), f"{layer}{mlp}fc1.bias": (inner,)}
        found |= {f"{layer}{mlp}fc2.weight": (width, inner), f"{layer}{mlp}fc2.bias": (width,)}
    for i in range(2):
        layer = f"{_LAYER}{i}."
        found |= {f"{layer}self_attn.{p}_proj.weight": (n, 3584) for p, n in (("q", 4096), ("k", 2048), ("v", 2048))}
        found[f"{layer}self_attn.o_proj.weight"] = (3584, 4096)
        found |= {f"{layer}mlp.{part}_proj.weight": (14336, 3584) for part in ("gate", "up")}
        found[f"{layer}mlp.down_proj.weight"] = (3584, 14336)
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            found[f"{layer}{norm}_layernorm.weight"] = (3584,)
    return found


SHAPES: Mapping[str, tuple[int, ...]] = _shapes()

# Pattern of official names -> (base, shift), or a gain g: std · sqrt(fan-in) within a factor sqrt 2 of 2**g.
_RULES: tuple[tuple[str, int | tuple[float, int]], ...] = (
    (r"mm_rand_llm_norm\.weight", (2.0**-5, 24)),  # mm_std 0.029 lies nearest to 2**-5
    (r"mm_rand_(img|aud)_norm\.weight", (1.0, 19)),
    (r"model\.layers\.\d+\.self_attn\.[qk]_proj\.weight", 1),
    (r"embed_tokens\.weight", -3),
    (r"model\.norm\.weight", (7.0, 19)),
    (r"model\.layers\.\d+\.post_.*_layernorm\.weight", (-0.5, 19)),
    (r"model\.layers\.\d+\..*_layernorm\.weight", (0.0, 19)),
    (r"mm_(vis|aud)\..*\.self_attn\.q_proj\.weight", 1),
    (r"mm_(vis|aud)\..*\.self_attn\.out_proj\.weight", -1),
    (r"mm_(vis|aud)\..*fc2\.weight", -1),
    (r"(position_embedding|embed_positions)\.weight", (0.0, 17)),
    (r"norm\d?\.weight", (1.0, 19)),
    (r"\.bias", (0.0, 18)),
    (r"\.weight", 0),
)


def _scale(name: str) -> tuple[float, int]:
    rule = next(rule for pattern, rule in _RULES if re.search(pattern, name))
    if isinstance(rule, tuple):
        return rule
    shape = SHAPES[name]
    fan_in = shape[-1] if name == "model.embed_tokens.weight" else int(np.prod(shape[1:]))
    shift = 0
    while (65536**2 - 1) * fan_in > 6 * 4 ** (shift + rule):  # the variance of four words is (65536² - 1)/3
        shift += 1
    return 0.0, shift


def _halves(x: np.ndarray, key: np.uint32) -> np.ndarray:
    """One keyed mix of uint32 x, as the sum of its two 16-bit words. Products wrap at 32 bits."""
    x = (x ^ (x >> 15)) * np.uint32(0x2C1B3C6D) ^ key
    x = (x ^ (x >> 12)) * np.uint32(0x297A2D39)
    x ^= x >> 15
    return (x >> 16) + (x & np.uint32(0xFFFF))


def tensor(name: str, seed: int) -> np.ndarray:
    """One tensor by its official name, float32."""
    digest = hashlib.sha256(f"vidi-synth-1:{seed}:{name}".encode()).digest()
    keys = np.frombuffer(digest[:16], "<u4")
    base, shift = _scale(name)
    out = np.empty(int(np.prod(SHAPES[name])), np.float32)
    for first in range(0, len(out), PIECE):
        index = np.arange(first, min(first + PIECE, len(out)), dtype=np.uint32)
        total = _halves(index ^ keys[0], keys[1]) + _halves(index ^ keys[2], keys[3])
        values = (total.astype(np.int32) - 131070).astype(np.float32) * np.float32(2.0**-shift) + np.float32(base)
        out[first : first + len(index)] = values if "mm_rand_pos_" in name else round_bf16(values)
    return out.reshape(SHAPES[name])


class Tensors(Weights):
    """The oracle's weights over tensors that are kept once, in float32: exact
    in bfloat16, so that no arithmetic rounds them."""

    def __init__(self, ar: Arithmetic, held: Mapping[str, np.ndarray]) -> None:
        self._ar, self._held = ar, held

    def __call__(self, name: str) -> np.ndarray:
        return self._held[name].astype(self._ar.work, copy=False)

    def optional(self, name: str) -> np.ndarray | None:
        return self(name) if name in self._held else None

    def wide(self, name: str) -> np.ndarray:
        return self._ar.widen(self._held[name])
