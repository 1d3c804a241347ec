"""Text, rotary angles, and what enters the first layer (spec §6)."""

from __future__ import annotations

import torch
from torch import Tensor

from vidi.parity import trace
from vidi.parity.bench import Site, Stage
from vidi.parity.registry import code

__all__ = ["STAGES"]


def _text_tap(s: Site, stage_id: str) -> Tensor:
    tap = trace.Trace()
    s.model.embed_text(s.bench.batch, tap)
    return tap.tensors()[stage_id]


def _rope(s: Site, part: str) -> Tensor:
    length = s["text.embeds"].shape[1]
    pos_BT = torch.arange(length, device=s.model.device)[None]
    rows = s.model.decoder.text_rows(pos_BT, None, s.model.backend, s.model.dtype)
    return {"position_ids": rows.pos_BT, "cos": rows.cos_BTH, "sin": rows.sin_BTH}[part]


STAGES: tuple[Stage, ...] = (
    Stage(
        "text.embeds",
        ("inputs.input_ids",),
        lambda s: _text_tap(s, "text.embeds"),
        (
            code.DECODER + "decoder.Decoder.embed_tokens",
            "vidi.inputs.batch.pack_text[ids]",
            "vidi.model.VidiModel.embed_text[embeds]",
        ),
        "§6",
        "kept tokens packed left, embedded, padding exact 0",
    ),
    Stage(
        "text.mask",
        ("inputs.input_ids",),
        lambda s: _text_tap(s, "text.mask"),
        ("vidi.inputs.batch.pack_text[mask]", "vidi.model.VidiModel.embed_text[mask]"),
        "§6",
        "kept text tokens, the placeholder gone",
    ),
    Stage(
        "text.labels",
        ("inputs.input_ids", "inputs.labels"),
        lambda s: _text_tap(s, "text.labels"),
        ("vidi.inputs.batch.pack_text[labels]",),
        "§6",
        "labels, the placeholder gone",
    ),
    Stage(
        "rope.position_ids",
        ("text.embeds",),
        lambda s: _rope(s, "position_ids"),
        (code.DECODER + "decoder.Decoder.text_rows[positions]",),
        "§6",
        "0, 1, 2, …",
    ),
    Stage(
        "rope.cos",
        ("text.embeds",),
        lambda s: _rope(s, "cos"),
        (
            "vidi.attention.rope.angles[cos]",
            "vidi.attention.rope.inverse_frequencies",
            code.DECODER + "decoder.Decoder.text_rows[angles]",
        ),
        "§7",
        "rotary cosines",
    ),
    Stage(
        "rope.sin",
        ("text.embeds",),
        lambda s: _rope(s, "sin"),
        (
            "vidi.attention.rope.angles[sin]",
            "vidi.attention.rope.inverse_frequencies",
            code.DECODER + "decoder.Decoder.text_rows[angles]",
        ),
        "§7",
        "rotary sines",
    ),
    Stage(
        "layer.0.image_input",
        ("vision.llm_norm",),
        lambda s: s.model.decoder.scaled(s["vision.llm_norm"]),
        (
            code.DECODER + "decoder.Decoder.scaled",
            code.DECODER + "decoder.Decoder.carry[v]",
            "vidi.precision.sqrt_in",
        ),
        "§6",
        "visual stream · sqrt(D)",
    ),
    Stage(
        "layer.0.audio_input",
        ("audio.llm_norm",),
        lambda s: s.model.decoder.scaled(s["audio.llm_norm"]),
        (
            code.DECODER + "decoder.Decoder.scaled",
            code.DECODER + "decoder.Decoder.carry[a]",
            "vidi.precision.sqrt_in",
        ),
        "§6",
        "audio stream · sqrt(D)",
    ),
    Stage(
        "layer.0.input",
        ("text.embeds",),
        lambda s: s.model.decoder.scaled(s["text.embeds"]),
        (code.DECODER + "decoder.Decoder.scaled", "vidi.precision.sqrt_in"),
        "§6",
        "text · sqrt(D)",
    ),
)
