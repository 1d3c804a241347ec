"""Names of code that several stages have as theirs (`Stage.sites`)."""

from __future__ import annotations

__all__ = ["ATTENTION", "BRIDGE", "DECODER", "LAYER", "LAYER_PART", "RMS", "TOWER", "position"]

BRIDGE, DECODER = "vidi.bridge.", "vidi.decoder."
TOWER = ("vidi.towers.layer.", "vidi.attention.sdpa.", "vidi.attention.dispatch.[tower]")
RMS = (BRIDGE + "norm.",)
LAYER, LAYER_PART = DECODER + "layer.DecoderLayer.", "model.decoder.layers.{i}."
ATTENTION = DECODER + "attention.DecomposedAttention."


def position(*uses: str) -> tuple[str, ...]:
    """The code of an embedding, as far as it serves these axes."""
    code = ("PositionEmbedding", "embed", "positions", "sinusoid")
    named = (f"{BRIDGE}position.{name}[{use}]" for name in code for use in uses)
    return (*named, f"model.bridge.pos_{uses[0]}")
