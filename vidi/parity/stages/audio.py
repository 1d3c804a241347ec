"""The audio path (spec §4)."""

from __future__ import annotations

from functools import partial

from stageparity.code import code, part
from stageparity.stage import Stage
from vidi.parity.stages.code import ALONE, AUDIO, PACK, RMS, TOWER, position, position_code
from vidi.parity.stages.visual import FRAMES, PURE, batches, mask, rounded, rounded_towers

__all__ = ["STAGES"]

audio, projector = code("vidi.bridge.audio"), code("vidi.bridge.projector")
SOUND = ("audio",)


STAGES: tuple[Stage, ...] = (
    Stage(
        "audio.tower", "Whisper encoder", "§4.1", "P l C",
        inputs=("inputs.audios",), run=ALONE.audio_tower, when=SOUND, tags=PURE,
        code=(code("vidi.towers.whisper"), part("audio_tower"), *TOWER),
        rounded=rounded_towers.audio, spreads=FRAMES,
    ),
    Stage(
        "audio.trim", "pieces joined, cut to the sound's length, zero-padded", "§4.2", "B · C",
        inputs=("audio.tower", "inputs.audio_sizes"), run=ALONE.trim, when=SOUND, tags=PURE, wiring=(AUDIO["trim"],),
        code=(audio.trim, audio.num_positions, batches.pad_rows),
    ),
    Stage(
        "audio.pool", "Conv1d of kernel and stride 5: width change and pooling in one", "§4.3", "B D A",
        rows=(0, 2), inputs=("audio.trim",), when=SOUND, tags=PURE, wiring=(AUDIO["pool"],),
        run=lambda s: audio.pool(s["audio.trim"], s.model.bridge.audio_pool),
        code=(audio.pool, part("bridge.audio_pool")),
        rounded=rounded.audio_pool,
    ),
    Stage(
        "audio.projector", "Linear, GELU (erf), Linear", "§4.4", "n D",
        rows=(0,), inputs=("audio.pool", "inputs.audio_sizes"), run=ALONE.audio_projector, when=SOUND, tags=PURE,
        wiring=(AUDIO["projector"],),
        code=(audio.num_tokens, projector, part("bridge.audio_projector")),
        rounded=partial(rounded.projected, "audio"),
    ),
    Stage(
        "audio.norm", "bridge RMSNorm", "§4.4", "n D",
        rows=(0,), inputs=("audio.projector",), when=SOUND, wiring=(AUDIO["norm"],),
        run=lambda s: s.model.bridge.audio_norm(s["audio.projector"]),
        code=(*RMS, part("bridge.audio_norm")),
        rounded=partial(rounded.normed, "audio.projector", "audio_norm"),
    ),
    Stage(
        "audio.pos_t.embed.{b}", "time embedding of one sample's audio, before rms", "§5", "· D",
        rows=(0,), inputs=("pos.freq",), when=SOUND, wiring=(AUDIO["pos_t.embed"],),
        run=lambda s: s.embed(s.model.bridge.pos_t, f"t_a.{s.sample}", s.bench.audio_tokens[s.sample]),
        code=position_code("t", "t_a"),
        rounded=partial(rounded.embedded, "t_a"),
    ),
    Stage(
        "audio.pos_t", "+ rms(time)", "§4.4", "n D",
        rows=(0,), inputs=("audio.norm", "audio.pos_t.embed.{b}"), run=ALONE.audio_pos_t, when=SOUND, wiring=(AUDIO["pos_t"],),
        code=(position.add["t_a"], *RMS),
        rounded=partial(rounded.added_in_turn, "audio.norm"),
    ),
    Stage(
        "audio.packed", "zero-padded at the right", "§4.5", "B A D",
        inputs=("audio.pos_t",), when=SOUND, wiring=(PACK["split"],),
        run=lambda s: batches.pad_rows(list(s["audio.pos_t"].split(s.bench.audio_tokens))),
        code=(batches.pad_rows,),
    ),
    Stage(
        "audio.mask", "kept audio tokens", "§4.5", "B A",
        exact=True, inputs=("audio.packed", "inputs.audios"), when=SOUND, wiring=(PACK["mask"],),
        run=lambda s: mask.keep_tokens(s["audio.packed"], s.bench.signal("a")),
        code=(mask.keep_tokens, mask.has_signal["a"]),
    ),
    Stage(
        "audio.llm_norm", "shared RMSNorm, then the mask", "§4.5", "B A D",
        inputs=("audio.packed", "audio.mask"), when=SOUND, wiring=(PACK["norm"],),
        run=lambda s: s.model.bridge.llm_norm(s["audio.packed"]) * s["audio.mask"][..., None],
        code=(*RMS, part("bridge.llm_norm")),
        rounded=partial(rounded.llm_norm, "audio"),
    ),
)  # fmt: skip
