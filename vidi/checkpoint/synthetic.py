"""Checkpoints of any size from a counter: the same bits on every machine, on a CPU and on a GPU.

Element i of a tensor depends on (seed, official name, i) alone. Two keyed 32-bit mixes of i give four 16-bit words;
their sum less its mean, scaled by a power of two and added to a constant, is exact in float32, so no logarithm, cosine
or division enters, and a narrower dtype differs by one rounding to nearest even. All arithmetic is on non-negative
int64 below 2**63: nothing overflows, nothing depends on the platform.

The four-word sum has a standard deviation of 2**15.21. Weights get the power of two that brings sqrt(fan-in) · std
nearest to the gain of their kind (`RECIPES`), so that activations stay of order one through all layers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vidi import precision
from vidi.checkpoint import headers, names
from vidi.checkpoint.load import Progress, empty_model
from vidi.checkpoint.names import Expected
from vidi.checkpoint.save import Item, limit_for, plan, write
from vidi.config import VidiConfig

if TYPE_CHECKING:
    from vidi.model import VidiModel

__all__ = ["RECIPES", "VERSION", "Recipe", "create", "fill_", "keys", "recipe", "sums", "synth", "values"]

VERSION = 1
NUM_SHARDS = 5
MEAN = 2 * 65535  # of the sum of four 16-bit words
_WORD, _C1, _C2 = 0xFFFFFFFF, 0x2C1B3C6D, 0x297A2D39  # constants below 2**30: a product with a word stays below 2**62
# Pieces small enough that temporaries stay in a cache: 8 bytes an element on top of the values.
_PIECE = {"cpu": 1 << 16, "cuda": 1 << 22}


@dataclass(frozen=True)
class Recipe:
    """value = base + (sum - MEAN) · 2**-shift."""

    base: float
    shift: int


# Our names, first match counts. A number g: std·sqrt(fan-in) within a factor sqrt 2 of 2**g. A pair (base, shift): as
# is; shift 18 is a std of 0.14. "std": a constant near the config's mm_std.
RECIPES: tuple[tuple[str, int | tuple[float, int] | str], ...] = (
    ("bridge.llm_norm.weight", "std"),
    ("bridge.*_norm.weight", (1.0, 19)),
    # Sharp attention: scores with a std of about 4, as if trained; else thousands of keys average to nothing.
    ("decoder.layers.*.attention.[qk].weight", 1),
    # Small embeddings and a last norm of 1 + 7: what the layers add outweighs the token itself in the tied head, so
    # greedy decoding does not repeat one token.
    ("decoder.embed.weight", -3),
    ("decoder.norm.weight", (7.0, 19)),
    # After a block 1 + w = 1/2: 84 of them add up to an rms below 5.
    ("decoder.layers.*.post_*_norm.weight", (-0.5, 19)),
    ("decoder.*_norm.weight", (0.0, 19)),
    # Towers have no norm after a block: half a gain there keeps the residual of 32 layers of order one.
    ("*_tower.layers.*.attention.q.weight", 1),
    ("*_tower.layers.*.attention.out.weight", -1),
    ("*_tower.layers.*.mlp.fc2.weight", -1),
    ("*_tower.position.weight", (0.0, 17)),
    ("vision_tower.unused.probe", (0.0, 17)),
    ("*norm*.weight", (1.0, 19)),
    ("*bias", (0.0, 18)),
    ("*weight", 0),
)


# Mistral's norms hold the factor itself, and none follows a block: the head's own gain keeps greedy decoding alive.
RECIPES_7B: tuple[tuple[str, int | tuple[float, int] | str], ...] = (
    ("decoder.head.weight", 3),
    ("decoder.*norm.weight", (1.0, 19)),
    ("decoder.layers.*.attention.o.weight", -1),
    ("decoder.layers.*.mlp.down.weight", -1),
)


def recipe(want: Expected, config: VidiConfig) -> Recipe:
    """How the values of one tensor are scaled; integers only."""
    recipes = (*RECIPES_7B, *RECIPES) if config.decoder.kind == "mistral" else RECIPES
    kind = next(kind for pattern, kind in recipes if fnmatchcase(want.ours, pattern))
    if isinstance(kind, tuple):
        return Recipe(*kind)
    if kind == "std":
        mantissa, exponent = math.frexp(config.norm_std)
        exponent -= mantissa < math.sqrt(0.5)
        return Recipe(2.0**exponent, 19 - exponent)
    assert isinstance(kind, int), want.ours
    fan_in = want.shape[-1] if want.ours == "decoder.embed.weight" else math.prod(want.shape[1:])
    # var = (65536² - 1)/3 for four words; the smallest shift with var · fan_in ≤ 2 · 4^(shift + gain).
    shift = 0
    while (65536**2 - 1) * fan_in > 6 * 4 ** (shift + kind):
        shift += 1
    return Recipe(0.0, shift)


def keys(seed: int, name: str) -> tuple[int, int, int, int]:
    """The four 32-bit keys of a tensor: the first 16 bytes of sha256("vidi-synth-VERSION:SEED:NAME"), little-endian."""
    digest = hashlib.sha256(f"vidi-synth-{VERSION}:{seed}:{name}".encode()).digest()
    first, second, third, fourth = (int.from_bytes(digest[i : i + 4], "little") for i in (0, 4, 8, 12))
    return first, second, third, fourth


def sums(key: tuple[int, int, int, int], first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Sums of four 16-bit words for elements [first, first + count): (count,) int64 in [0, 262140]."""
    if first + count > _WORD + 1:
        raise ValueError(f"element {first + count}: the counter has 32 bits")
    index = torch.arange(first, first + count, dtype=torch.int64, device=device)
    total = _mixed(index ^ key[0], key[1])
    total += _mixed(index.bitwise_xor_(key[2]), key[3])
    return total


def _mixed(x: Tensor, key: int) -> Tensor:
    """One 32-bit word of each x (overwritten), as the sum of its two halves."""
    x ^= x >> 15
    x *= _C1
    x &= _WORD
    x ^= key
    x ^= x >> 12
    x *= _C2
    x &= _WORD
    x ^= x >> 15
    high = x >> 16
    x &= 0xFFFF
    x += high
    return x


def values(seed: int, want: Expected, config: VidiConfig, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """The tensor in flat float32 pieces, in order, exact."""
    key, how, total = keys(seed, want.official), recipe(want, config), math.prod(want.shape)
    step = _PIECE["cuda" if torch.device(device).type == "cuda" else "cpu"]
    for first in range(0, total, step):
        piece = sums(key, first, min(step, total - first), device).sub_(MEAN).to(torch.float32)
        yield piece.mul_(2.0**-how.shift).add_(how.base)


@torch.no_grad()
def fill_(model: VidiModel, seed: int = 0, progress: Progress | None = None) -> VidiModel:
    """Overwrite every parameter in place, on its own device and in its own dtype; meta parameters are refused.

    Temporaries are a few times 32 MiB on a GPU, whatever the model's size. Returns the model.
    """
    parameters = dict(model.named_parameters())
    if left := [name for name, parameter in parameters.items() if parameter.is_meta]:
        raise ValueError(f"{len(left)} parameters have no memory ({', '.join(left[:3])}); use create()")
    total, done = sum(p.nbytes for p in parameters.values()), 0
    for want in names.expected(model.config).values():
        flat, first = parameters[want.ours].view(-1), 0
        for piece in values(seed, want, model.config, flat.device):
            flat[first : first + len(piece)].copy_(piece)
            first += len(piece)
        done += flat.nbytes
        if progress is not None:
            progress(done, total, want.official)
    return model


def create(
    config: VidiConfig,
    seed: int = 0,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress | None = None,
) -> VidiModel:
    """A synthetic model straight in device memory, no disk: the bits that ``load`` gives from ``synth``'s folder."""
    return precision.cast_model(fill_(empty_model(config, device=device, dtype=dtype), seed, progress), dtype)


def synth(
    folder: str | Path,
    config: VidiConfig,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.bfloat16,
    extra: dict[str, str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a synthetic checkpoint of ``config`` in the official layout: 5 shards, index, config.json, ``extra`` texts.

    Nothing of the model is built: memory stays at one piece, at any size. Position MLPs are stored in float32 (§5).
    """
    items = [_item(seed, want, config, dtype) for want in names.expected(config).values()]
    limit = limit_for([item.nbytes for item in items], NUM_SHARDS)
    assert len(plan([item.nbytes for item in items], limit)) == NUM_SHARDS, "fewer tensors than shards"
    write(
        folder,
        config.to_official(),
        items,
        max_shard_bytes=limit,
        extra=extra,
        metadata={headers.SYNTHETIC: f"version {VERSION}, seed {seed}"},
        force=force,
        progress=progress,
    )


def _item(seed: int, want: Expected, config: VidiConfig, dtype: torch.dtype) -> Item:
    kind = precision.promoted(dtype) if want.is_float32 else dtype

    def pieces() -> Iterator[Tensor]:
        for piece in values(seed, want, config):
            yield piece.to(kind)

    return Item(want.official, kind, want.shape, pieces)
