"""One table: the model's parameter names, the official checkpoint's, and every shape as letters (spec §1).

This is the only place of ``vidi/`` (beside ``parity/maps``) where official names appear. ``{i}`` is a layer. Letters:
C encoder width, J its MLP width, P positions, S patch side, K image channels, M mel bins, D decoder width,
Q query heads × head dim, G key/value heads × head dim, F feed-forward width, Z vocabulary, W audio pool,
a digit in front multiplies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from vidi.config import VidiConfig

__all__ = [
    *("HEAD", "HEAD_TIED_TO", "PARTS", "TABLE", "Expected", "Row"),
    *("expected", "layer_of", "official_name", "our_name", "part_of", "without_layer"),
]

PARTS = ("vision_tower", "audio_tower", "bridge", "decoder")
HEAD = "lm_head.weight"  # tied: absent from the released files, allowed where it equals the embedding bit for bit
HEAD_TIED_TO = "model.embed_tokens.weight"
MAX_LAYERS = 1000


@dataclass(frozen=True)
class Row:
    """One kind of tensor. ``shape`` is a string of letters, one word per axis."""

    ours: str
    official: str
    shape: str

    @property
    def part(self) -> str:
        return self.ours.partition(".")[0]

    @property
    def is_float32(self) -> bool:
        """The position MLPs stay float32 inside a half-precision model (spec §5)."""
        return self.ours.startswith("bridge.pos_")


@dataclass(frozen=True)
class Expected:
    """One tensor that a checkpoint of a given config must hold."""

    official: str
    ours: str
    shape: tuple[int, ...]
    part: str
    is_float32: bool
    layer: int | None


def _linear(ours: str, official: str, shape: str, *, bias: bool = True) -> list[Row]:
    rows = [Row(f"{ours}.weight", f"{official}.weight", shape)]
    return rows + ([Row(f"{ours}.bias", f"{official}.bias", shape.split()[0])] if bias else [])


def _layer_norm(ours: str, official: str) -> list[Row]:
    return [Row(f"{ours}.{kind}", f"{official}.{kind}", "C") for kind in ("weight", "bias")]


def _decoder(norms: Mapping[str, str]) -> Iterator[Row]:
    ours, official = "decoder.layers.{i}", "model.layers.{i}"
    yield Row("decoder.embed.weight", HEAD_TIED_TO, "Z D")
    for letter, shape in (("q", "Q D"), ("k", "G D"), ("v", "G D"), ("o", "D Q")):
        yield Row(f"{ours}.attention.{letter}.weight", f"{official}.self_attn.{letter}_proj.weight", shape)
    for name, shape in (("gate", "F D"), ("up", "F D"), ("down", "D F")):
        yield Row(f"{ours}.mlp.{name}.weight", f"{official}.mlp.{name}_proj.weight", shape)
    for norm, name in norms.items():
        yield Row(f"{ours}.{norm}_norm.weight", f"{official}.{name}_layernorm.weight", "D")
    yield Row("decoder.norm.weight", "model.norm.weight", "D")


def _vision() -> Iterator[Row]:
    root = "model.mm_vis.vision_model"
    ours, official = "vision_tower.layers.{i}", root + ".encoder.layers.{i}"
    yield from _linear("vision_tower.patch_embed", root + ".embeddings.patch_embedding", "C K S S")
    yield Row("vision_tower.position.weight", root + ".embeddings.position_embedding.weight", "P C")
    for name in ("q", "k", "v", "out"):
        yield from _linear(f"{ours}.attention.{name}", f"{official}.self_attn.{name}_proj", "C C")
    yield from _layer_norm(f"{ours}.norm1", f"{official}.layer_norm1")
    yield from _layer_norm(f"{ours}.norm2", f"{official}.layer_norm2")
    yield from _linear(f"{ours}.mlp.fc1", f"{official}.mlp.fc1", "J C")
    yield from _linear(f"{ours}.mlp.fc2", f"{official}.mlp.fc2", "C J")
    # Weights that feed nothing (the release reads the layer before the last), carried so that a saved file is complete.
    unused, head = "vision_tower.unused", root + ".head"
    yield from _layer_norm(f"{unused}.post_norm", root + ".post_layernorm")
    yield Row(f"{unused}.probe", f"{head}.probe", "1 1 C")
    yield Row(f"{unused}.in_proj_weight", f"{head}.attention.in_proj_weight", "3C C")
    yield Row(f"{unused}.in_proj_bias", f"{head}.attention.in_proj_bias", "3C")
    yield from _linear(f"{unused}.out_proj", f"{head}.attention.out_proj", "C C")
    yield from _layer_norm(f"{unused}.norm", f"{head}.layernorm")
    yield from _linear(f"{unused}.fc1", f"{head}.mlp.fc1", "J C")
    yield from _linear(f"{unused}.fc2", f"{head}.mlp.fc2", "C J")


def _audio() -> Iterator[Row]:
    root = "model.mm_aud.encoder"
    ours, official = "audio_tower.layers.{i}", root + ".layers.{i}"
    yield from _linear("audio_tower.conv1", root + ".conv1", "C M 3")
    yield from _linear("audio_tower.conv2", root + ".conv2", "C C 3")
    yield Row("audio_tower.position.weight", root + ".embed_positions.weight", "P C")
    for name in ("q", "k", "v", "out"):
        yield from _linear(f"{ours}.attention.{name}", f"{official}.self_attn.{name}_proj", "C C", bias=name != "k")
    yield from _layer_norm(f"{ours}.norm1", f"{official}.self_attn_layer_norm")
    yield from _layer_norm(f"{ours}.norm2", f"{official}.final_layer_norm")
    yield from _linear(f"{ours}.mlp.fc1", f"{official}.fc1", "J C")
    yield from _linear(f"{ours}.mlp.fc2", f"{official}.fc2", "C J")
    yield from _layer_norm("audio_tower.norm", root + ".layer_norm")


def _bridge(seen: str, heard: str) -> Iterator[Row]:
    """seen, heard: what the projectors are given, in terms of Vc and Ac, the widths of the two towers."""
    for ours, official, width in (("image", "img", seen), ("audio", "aud", heard)):
        yield from _linear(f"bridge.{ours}_projector.fc1", f"model.mm_rand_{official}_projector.model.0", f"D {width}")
        yield from _linear(f"bridge.{ours}_projector.fc2", f"model.mm_rand_{official}_projector.model.2", "D D")
    for ours, official in (("image", "img"), ("audio", "aud"), ("llm", "llm")):
        yield Row(f"bridge.{ours}_norm.weight", f"model.mm_rand_{official}_norm.weight", "D")
    for axis in "hwt":
        yield from _linear(f"bridge.pos_{axis}.fc1", f"model.mm_rand_pos_{axis}.mlp.0", "D D")
        yield from _linear(f"bridge.pos_{axis}.fc2", f"model.mm_rand_pos_{axis}.mlp.2", "D D")
    yield Row("bridge.audio_pool.weight", "model.mm_rand_aud_pool.weight", f"{heard} Ac W")


# Gemma 2 norms what attention and feed-forward give back; in Mistral post_attention_layernorm is what comes before the latter.
_GEMMA2 = {
    "input": "input",
    "post_attn": "post_attention",
    "pre_ffn": "pre_feedforward",
    "post_ffn": "post_feedforward",
}
_MISTRAL = {"input": "input", "pre_ffn": "post_attention"}
# 4Vc because 2×2 patches are folded into channels, not pooled (spec §3); the 7B pools them by a convolution of kernel L.
TABLE: tuple[Row, ...] = (*_decoder(_GEMMA2), *_vision(), *_audio(), *_bridge("4Vc", "D"))
TABLE_7B: tuple[Row, ...] = (
    *_decoder(_MISTRAL),
    Row("decoder.head.weight", HEAD, "Z D"),
    *_vision(),
    *_audio(),
    Row("bridge.image_grid.conv.weight", "model.mm_rand_img_pool.conv.weight", "Vc Vc L L"),
    *_bridge("Vc", "Ac"),
)


def _sizes(config: VidiConfig) -> dict[str, dict[str, int]]:
    v, a, d = config.vision, config.audio, config.decoder
    vision = {"C": v.hidden_size, "J": v.intermediate_size, "K": v.num_channels, "S": v.patch_size}
    vision |= {"P": v.patches_per_side**2, "layers": v.num_layers}
    audio = {"C": a.hidden_size, "J": a.intermediate_size, "M": a.num_mel_bins, "P": a.max_source_positions}
    audio |= {"layers": a.num_layers}
    decoder = {"D": d.hidden_size, "F": d.intermediate_size, "Z": d.vocab_size, "layers": d.num_layers}
    decoder |= {"Q": d.num_heads * d.head_dim, "G": d.num_kv_heads * d.head_dim}
    bridge = {"D": d.hidden_size, "Vc": v.hidden_size, "Ac": a.hidden_size, "W": config.audio_pool_size}
    bridge |= {"L": config.image_kernel}
    sizes = {"vision_tower": vision, "audio_tower": audio, "bridge": bridge, "decoder": decoder}
    for part, letters in sizes.items():
        for letter, size in letters.items():
            if type(size) is not int or not 1 <= size < 1 << 31 or (letter == "layers" and size > MAX_LAYERS):
                text = f"config gives the {part} a size {letter} = {str(size)[:40]}"
                raise ValueError(f"{text}: a whole number is needed, above 0 (layers: at most {MAX_LAYERS})")
    return sizes


def _axis(word: str, sizes: Mapping[str, int]) -> int:
    factor, letters = re.fullmatch(r"(\d*)([A-Za-z]*)", word).groups()  # type: ignore[union-attr]
    return int(factor or 1) * (sizes[letters] if letters else 1)


@lru_cache(maxsize=8)
def expected(config: VidiConfig) -> Mapping[str, Expected]:
    """Every tensor that a checkpoint of ``config`` stores: official name -> Expected, layers in order.

    At full size 1,423 tensors and 10,462,005,312 parameters (spec §1); the tied head is not among them.
    Raises ValueError where the config holds a size that is no positive integer.
    """
    sizes = _sizes(config)
    found: dict[str, Expected] = {}
    for part in PARTS:
        rows = [row for row in table(config) if row.part == part]
        layered = [row for row in rows if "{i}" in row.ours]
        first = rows.index(layered[0]) if layered else len(rows)
        singles = [row for row in rows if "{i}" not in row.ours]
        order: list[tuple[Row, int | None]] = [(row, None) for row in singles if rows.index(row) < first]
        order += [(row, i) for i in range(sizes[part].get("layers", 0)) for row in layered]
        order += [(row, None) for row in singles if rows.index(row) > first]
        for row, i in order:
            shape = tuple(_axis(word, sizes[part]) for word in row.shape.split())
            official, ours = row.official.replace("{i}", str(i)), row.ours.replace("{i}", str(i))
            found[official] = Expected(official, ours, shape, part, row.is_float32, i)
    return found


def table(config: VidiConfig | None) -> tuple[Row, ...]:
    """The rows of the model that a configuration describes; 1.5 9B without one."""
    return TABLE_7B if config is not None and config.image_grid == "conv" else TABLE


def our_name(official: str, config: VidiConfig | None = None) -> str | None:
    """The model's name of an official one; None where the table has no such tensor."""
    return _translate(official, {row.official: row.ours for row in table(config)})


def official_name(ours: str, config: VidiConfig | None = None) -> str | None:
    """The official name of one of the model's parameters; None where the table has no such tensor."""
    return _translate(ours, {row.ours: row.official for row in table(config)})


def layer_of(name: str) -> int | None:
    """The layer in a name, e.g. 3 for ``model.layers.3.mlp.up_proj.weight``."""
    match = _LAYER.search(name)
    return int(match[2]) if match else None


def without_layer(name: str) -> str:
    """The name with ``{i}`` for its layer, the same for all layers of a kind."""
    return _LAYER.sub(r"\g<1>{i}", name, count=1)


def part_of(official: str) -> str | None:
    """The part of the model that an official name belongs to, known or not; None for a foreign name."""
    return next((part for prefix, part in _PREFIXES if official.startswith(prefix)), None)


_PREFIXES = (
    ("model.mm_vis.", "vision_tower"),
    ("model.mm_aud.", "audio_tower"),
    ("model.mm_", "bridge"),
    ("model.", "decoder"),
    (HEAD, "decoder"),
)
_LAYER = re.compile(r"(\blayers\.)(0|[1-9]\d{0,5})(?=\.)", re.ASCII)


def _translate(name: str, table: Mapping[str, str]) -> str | None:
    layer = layer_of(name)
    if layer is None:
        return table.get(name) if "{i}" not in name else None
    found = table.get(without_layer(name))
    return None if found is None else found.replace("{i}", str(layer))
