"""The decoder layers (spec §7), what enters the first (§6), cross-attention taken apart (§9)."""

from __future__ import annotations

from functools import partial
from typing import Any

from stageparity.code import code, part
from stageparity.stage import Stage
from vidi.parity.stages.code import (
    ALONE,
    CARRY,
    CROSS,
    DECODER,
    KEYS_VALUES,
    LAYER,
    QUERIES,
    SELF,
    STREAM_KEYS,
    TO_STREAM,
    UNPAD,
    attention,
    decoder,
    layer,
    mask,
    norm,
)  # fmt: skip
from vidi.parity.stages.visual import rounded

__all__ = ["STAGES"]

FEED = (
    layer.feed_forward, code("vidi.decoder.mlp"), norm,
    *(part(f"decoder.layers.{{i}}.{x}") for x in ("mlp", "post_attn_norm", "pre_ffn_norm", "post_ffn_norm")),
)  # fmt: skip
STREAM = (
    layer.update_stream, layer.merge["stream"], attention.attend_own_token, attention.output,
    code("vidi.decoder.attention.repeat_heads"), code("vidi.decoder.decoder.update_in_chunks"), *STREAM_KEYS, *FEED,
)  # fmt: skip
SCALED = (decoder.scaled, code("vidi.precision.sqrt_in"))
QKV = tuple(f"xattn.{{i}}.{{m}}.{x}" for x in "qkv")
HEADS: dict[str, Any] = {"rows": (0, 2), "heads": 1}  # (B, N, T, H)
APART = ("modality", "taken")
# One bit of a value that rounds apart moves every row that sees it (22 % seen), or the rest of its own (2 %).
WIDE, ROWS = {"float16": 0.3}, {"float16": 0.05}


def _unpadded(name: str, members: tuple[str, ...], what: str, **more: Any) -> Stage:
    return Stage(
        f"xattn.{{i}}.{{m}}.unpad.{name}", what, "§9", inputs=(*QKV, "text.mask", "{path}.mask"), run=ALONE.unpad,
        code=(UNPAD._unpad_xattn_input[name], *(code(f"vidi.attention.unpad.{x}") for x in members)),
        when=(*APART, "unpad"), derived=True, **more,
    )  # fmt: skip


STAGES: tuple[Stage, ...] = (
    Stage(
        "layer.{i=0}.input", "text on its way in; 9B: times sqrt(D)", "§6", "B T D",
        inputs=("text.embeds",), run=lambda s: s.model.decoder.scaled(s["text.embeds"]), wiring=(DECODER["input"],),
        code=SCALED, rounded=partial(rounded.scaled, "text.embeds"),
    ),
    Stage(
        "layer.{i}.input", "text before the layer: the output of the one before", "§7", "B T D",
        inputs=("{before}",), wiring=(DECODER["input"],),
    ),
    Stage(
        "layer.{i=0}.image_input", "visual stream on its way in; 9B: times sqrt(D)", "§6", "B V D",
        inputs=("vision.llm_norm",),
        run=lambda s: s.model.decoder.scaled(s["vision.llm_norm"]),
        when=("visual",), wiring=(CARRY["v"],), places={"m": "v"},
        code=SCALED, rounded=partial(rounded.scaled, "vision.llm_norm"),
    ),
    Stage(
        "layer.{i=0}.audio_input", "audio stream on its way in; 9B: times sqrt(D)", "§6", "B A D",
        inputs=("audio.llm_norm",), run=lambda s: s.model.decoder.scaled(s["audio.llm_norm"]),
        when=("audio",), wiring=(CARRY["a"],), code=SCALED, rounded=partial(rounded.scaled, "audio.llm_norm"), places={"m": "a"},
    ),
    Stage(
        "layer.{i}.t2t", "causal self-attention; window on even layers, 7B: on all", "§7", "B T D",
        inputs=("layer.{i}.input", "rope.cos", "rope.sin", "text.mask"), wiring=(LAYER["t2t"],),
        run=lambda s: s.layer.text_to_text(s.layer.input_norm(s["layer.{i}.input"]), s.text),
        code=(
            layer.text_to_text["whole"], attention.attend_self, attention.keys_values, attention.output,
            mask.sees["whole"], code("vidi.attention.rope.apply"), part("decoder.layers.{i}.window"), *SELF, *QUERIES,
        ),
        rounded=rounded.text_to_text, spreads=WIDE,
    ),
    # Recorded beside the attention, told from the masks after the run: a wrong mask in attention shows in `out`.
    Stage(
        "xattn.{i}.{m}.q_mask", "the text mask", "§9",
        exact=True, inputs=("text.mask",), run=lambda s: s["text.mask"], when=APART,
    ),
    Stage(
        "xattn.{i}.{m}.kv_mask", "the stream's mask", "§9",
        exact=True, inputs=("{path}.mask",), run=lambda s: s["{path}.mask"], when=APART,
    ),
    Stage(
        "xattn.{i}.{m}.q", "queries, not rotated", "§7", "B N T H", **HEADS,
        inputs=("layer.{i}.input",), when=APART, wiring=(TO_STREAM["queries"],),
        run=lambda s: s.layer.attention.queries(s.layer.input_norm(s["layer.{i}.input"])).transpose(1, 2),
        code=QUERIES, rounded=partial(rounded.projections, "q"),
    ),
    Stage(
        "xattn.{i}.{m}.k", "stream keys, not rotated; recorded with heads repeated", "§7", "B N · H", **HEADS,
        inputs=("{stream}",), run=partial(ALONE.stream_key, 0), when=APART, wiring=(CARRY["keys"],),
        code=(layer.stream_keys_values["keys"], *KEYS_VALUES), rounded=partial(rounded.projections, "k"),
    ),
    Stage(
        "xattn.{i}.{m}.v", "stream values; recorded with heads repeated", "§7", "B N · H", **HEADS,
        inputs=("{stream}",), run=partial(ALONE.stream_key, 1), when=APART, wiring=(CARRY["keys"],),
        code=(layer.stream_keys_values["values"], *KEYS_VALUES), rounded=partial(rounded.projections, "v"),
    ),
    _unpadded("indices_q", ("Rows.indices",), "flat places of the kept queries", exact=True),
    _unpadded("cu_seqlens_q", ("Rows.cu_seqlens", "Rows.lengths_B"), "cumulative query lengths", exact=True),
    _unpadded("cu_seqlens_k", ("Rows.cu_seqlens", "Rows.lengths_B"), "cumulative key lengths", exact=True),
    _unpadded("max_seqlen", ("Rows.max_seqlen", "Rows.lengths_B"), "longest query and key length", exact=True),
    _unpadded("q", ("Rows.indices", "unpad"), "kept queries on one axis", rows=(0,), heads=1),
    _unpadded("k", ("Rows.indices", "unpad"), "kept keys on one axis", rows=(0,), heads=1),
    _unpadded("v", ("Rows.indices", "unpad"), "kept values on one axis", rows=(0,), heads=1),
    Stage(
        "xattn.{i}.{m}.out", "cross-attention, before the output projection", "§7", "B T N H", heads=2,
        inputs=(*QKV, "text.mask", "{path}.mask"), run=ALONE.cross_attention, when=APART, 
        wiring=(TO_STREAM["text mask"], TO_STREAM["stream mask"]),
        code=(
            attention.attend_stream, UNPAD, *CROSS,
        ),
        rounded=rounded.attended,
    ),
    Stage(
        "layer.{i}.t2{m}", "text to one stream", "§7", "B T D",
        inputs=("layer.{i}.input", "rope.cos", "rope.sin", "text.mask", "{stream}", "{path}.mask"),
        when=("modality",), wiring=(LAYER["t2s"],),
        run=lambda s: s.layer.text_to_stream(s.layer.input_norm(s["layer.{i}.input"]), s.text, s.keys, s.places["m"]),
        code=(TO_STREAM, attention.attend_stream, attention.output, UNPAD, *CROSS, *QUERIES, *STREAM_KEYS),
        rounded=rounded.text_to_stream, spreads=WIDE,
    ),
    Stage(
        "layer.{i}.t2{m}.gate", "does the sample keep a token", "§7", "B",
        exact=True, inputs=("{path}.mask",), run=lambda s: s["{path}.mask"].any(-1),
        when=("modality",), wiring=(CARRY["gate"],),
    ),
    Stage(
        "layer.{i}.image_stream", "visual stream after the layer", "§7", "B V D",
        inputs=("{stream}",), run=ALONE.stream, when=("visual",), code=STREAM, wiring=(CARRY["v"],), places={"m": "v"},
        rounded=rounded.stream, spreads=ROWS,
    ),
    Stage(
        "layer.{i}.audio_stream", "audio stream after the layer", "§7", "B A D",
        inputs=("{stream}",), run=ALONE.stream, when=("audio",), code=STREAM, wiring=(CARRY["a"],), places={"m": "a"},
        rounded=rounded.stream, spreads=ROWS,
    ),
    Stage(
        "layer.{i}.output", "text after the layer", "§7", "B T D",
        inputs=("layer.{i}.input", "layer.{i}.t2t", "layer.{i}.t2v", "layer.{i}.t2a"), run=ALONE.layer_output,
        wiring=(LAYER["output"],),
        code=(layer.merge["text"], *FEED), rounded=rounded.layer_output, spreads=ROWS,
    ),
)  # fmt: skip
