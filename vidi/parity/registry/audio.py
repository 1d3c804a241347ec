"""The audio path (spec §4)."""

from __future__ import annotations

import torch
from torch import Tensor

from vidi.bridge import audio, mask, position
from vidi.inputs import batch as batches
from vidi.parity.bench import Site, Stage
from vidi.parity.registry import code

__all__ = ["STAGES"]


def _audio_tower(s: Site) -> Tensor:
    assert s.bench.batch.audios is not None
    return s.model.audio_tower(torch.cat(s.bench.batch.audios).to(s.model.device, s.model.dtype), s.model.tower_backend)


def _trim(s: Site) -> Tensor:
    assert s.bench.batch.audios is not None
    positions = [audio.num_positions(size, s.model.config) for size in s.bench.audio_sizes]
    return audio.trim(s["audio.tower"], [len(x) for x in s.bench.batch.audios], positions)


def _audio_projector(s: Site) -> Tensor:
    pooled = s["audio.pool"]
    rows = torch.cat([row.T[:n] for row, n in zip(pooled, s.bench.audio_tokens, strict=True)])
    return s.model.bridge.audio_projector(rows)


def _audio_pos_t(s: Site) -> Tensor:
    embeds = [s.bench.golden(f"audio.pos_t.embed.{b}") for b, n in enumerate(s.bench.audio_tokens) if n]
    return position.add(s["audio.norm"], torch.cat(embeds))


STAGES: tuple[Stage, ...] = (
    Stage(
        "audio.tower",
        ("inputs.audios",),
        _audio_tower,
        ("vidi.towers.whisper.", "model.audio_tower", *code.TOWER),
        "§4.1",
        "Whisper encoder",
    ),
    Stage(
        "audio.trim",
        ("audio.tower", "inputs.audio_sizes"),
        _trim,
        (code.BRIDGE + "audio.trim", code.BRIDGE + "audio.num_positions", "vidi.inputs.batch.pad_rows"),
        "§4.2",
        "pieces joined, cut to the sound's length, zero-padded",
    ),
    Stage(
        "audio.pool",
        ("audio.trim",),
        lambda s: audio.pool(s["audio.trim"], s.model.bridge.audio_pool),
        (code.BRIDGE + "audio.pool", "model.bridge.audio_pool"),
        "§4.3",
        "Conv1d of kernel and stride 5: width change and pooling in one",
    ),
    Stage(
        "audio.projector",
        ("audio.pool", "inputs.audio_sizes"),
        _audio_projector,
        (
            code.BRIDGE + "audio.encode",
            code.BRIDGE + "audio.num_tokens",
            code.BRIDGE + "projector.",
            "model.bridge.audio_projector",
        ),
        "§4.4",
        "Linear, GELU (erf), Linear",
    ),
    Stage(
        "audio.norm",
        ("audio.projector",),
        lambda s: s.model.bridge.audio_norm(s["audio.projector"]),
        (*code.RMS, "model.bridge.audio_norm"),
        "§4.4",
        "bridge RMSNorm",
    ),
    Stage(
        "audio.pos_t.embed.{b}",
        ("pos.freq",),
        lambda s: s.embed(s.model.bridge.pos_t, f"t_a.{s.places['b']}", s.bench.audio_tokens[int(s.places["b"])]),
        code.position("t", "t_a"),
        "§5",
        "time embedding of one sample's audio, before rms",
    ),
    Stage(
        "audio.pos_t",
        ("audio.norm", "audio.pos_t.embed.{b}"),
        _audio_pos_t,
        (code.BRIDGE + "position.add[t_a]", *code.RMS),
        "§4.4",
        "+ rms(time)",
    ),
    Stage(
        "audio.packed",
        ("audio.pos_t",),
        lambda s: batches.pad_rows(list(s["audio.pos_t"].split(s.bench.audio_tokens))),
        (code.BRIDGE + "pack.to_stream[split]", "vidi.inputs.batch.pad_rows"),
        "§4.5",
        "zero-padded at the right",
    ),
    Stage(
        "audio.mask",
        ("audio.packed", "inputs.audios"),
        lambda s: mask.keep_tokens(s["audio.packed"], s.bench.signal("a")),
        (code.BRIDGE + "mask.keep_tokens", code.BRIDGE + "mask.has_signal[a]"),
        "§4.5",
        "kept audio tokens",
    ),
    Stage(
        "audio.llm_norm",
        ("audio.packed", "audio.mask"),
        lambda s: s.model.bridge.llm_norm(s["audio.packed"]) * s["audio.mask"][..., None],
        (code.BRIDGE + "pack.to_stream[norm]", *code.RMS, "model.bridge.llm_norm"),
        "§4.5",
        "shared RMSNorm, then the mask",
    ),
)
