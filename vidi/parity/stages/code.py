"""Code that several stages have as theirs (`Stage.code`), and what feeds them (`Stage.wiring`)."""

from __future__ import annotations

from stageparity.code import Code, code, part

__all__ = [
    "ALONE",
    "AUDIO",
    "CARRY",
    "CROSS",
    "DECODER",
    "KEYS_VALUES",
    "LAYER",
    "NORM",
    "PACK",
    "QUERIES",
    "RMS",
    "SELF",
    "STREAM_KEYS",
    "TEXT",
    "TOWER",
    "TO_STREAM",
    "UNPAD",
    "VISUAL",
    "attention",
    "decoder",
    "layer",
    "mask",
    "norm",
    "position",
    "position_code",
]  # fmt: skip

ALONE = code("vidi.parity.stages.alone")  # how a stage is fed alone, where one line does not say it
eager, dispatch, mask = code("vidi.attention.eager"), code("vidi.attention.dispatch"), code("vidi.attention.mask")
layer = code("vidi.decoder.layer.DecoderLayer")
attention = code("vidi.decoder.attention.DecomposedAttention")
decoder = code("vidi.decoder.decoder.Decoder")
norm, position = code("vidi.decoder.norm"), code("vidi.bridge.position")

TOWER = (code("vidi.towers.layer"), code("vidi.attention.sdpa"), dispatch["tower"])
RMS = (code("vidi.bridge.norm"),)
CROSS = (eager["cross"], dispatch["cross"], mask.zero_rows)
SELF = (eager["self"], dispatch["self"], mask.zero_rows)
NORM = (norm, part("decoder.layers.{i}.input_norm"), part("decoder.layers.{i}.attention"))
QUERIES = (attention.queries, *NORM)
KEYS_VALUES = (attention.keys_values, *NORM)
STREAM_KEYS = (layer.stream_keys_values, *KEYS_VALUES)
UNPAD = code("vidi.attention.unpad")
TO_STREAM = layer.text_to_stream
# Who feeds a stage and takes what it gives; in brackets the stage for which it does.
VISUAL, AUDIO, PACK = (code(f"vidi.bridge.{name}") for name in ("visual", "audio", "pack"))
TEXT = code("vidi.model.Pipeline.decode_text")
DECODER, CARRY, LAYER = decoder.forward, decoder.carry, layer.forward


def position_code(axis: str, use: str | None = None) -> tuple[Code, ...]:
    """The code of an embedding, as far as it serves an axis (for one modality, where ``use`` says which)."""
    parts = (position.PositionEmbedding, position.embed, position.positions, position.sinusoid)
    uses = (axis,) if use is None else (axis, use)
    return (*(c[u] for c in parts for u in uses), part(f"bridge.pos_{axis}"))
