"""The visual path (spec §3) and the table of position frequencies (§5)."""

from __future__ import annotations

import torch
from torch import Tensor

from vidi.bridge import fold, mask, position
from vidi.inputs import batch as batches
from vidi.inputs import pixels
from vidi.parity.bench import NotHeld, Site, Stage
from vidi.parity.registry import code

__all__ = ["STAGES"]


def _vision_tower(s: Site) -> Tensor:
    if s.bench.batch.images is None:
        raise NotHeld("the case gives the tower's output in place of frames")
    frames = torch.cat([pixels.normalize(x, s.model.dtype, s.model.device) for x in s.bench.batch.images])
    return s.model.vision_tower(frames, s.model.tower_backend)


def _space_to_depth(s: Site) -> Tensor:
    resized = s.id("vision.resize{g}")
    grid = s.bench.golden(resized) if s.bench.holds(resized) else s["vision.pad"][s.frames]
    return fold.space_to_depth(grid, s.model.config.image_pool_size)


def _pos_t(s: Site) -> Tensor:
    embeds = [s.bench.golden(f"vision.pos_t.embed.{b}") for b in s.group.videos if s.bench.num_frames[b]]
    return position.add(s["vision.pos_w{g}"], torch.cat(embeds))


def _vision_packed(s: Site) -> Tensor:
    rows = torch.cat([s.bench.golden(f"vision.pos_t{g.suffix}").flatten(0, 2) for g in s.bench.plan])
    tokens = [0] * len(s.bench.num_frames)
    for g in s.bench.plan:
        for b in g.videos:
            tokens[b] = s.bench.num_frames[b] * (g.side // s.model.config.image_pool_size) ** 2
    return batches.pad_rows(list(rows.split(tokens)))


STAGES: tuple[Stage, ...] = (
    Stage(
        "pos.freq",
        (),
        lambda s: position.frequencies(s.model.config.decoder.hidden_size),
        (code.BRIDGE + "position.frequencies",),
        "§5",
        "table of position frequencies, torch on the CPU",
    ),
    Stage(
        "vision.tower",
        ("inputs.images",),
        _vision_tower,
        ("vidi.towers.siglip.", "vidi.inputs.pixels.", "model.vision_tower", *code.TOWER),
        "§3.1",
        "SigLIP2 at hidden state -2",
    ),
    Stage(
        "vision.pad",
        ("vision.tower",),
        lambda s: fold.pad(s["vision.tower"], s.model.config.image_pool_size),
        (code.BRIDGE + "fold.pad",),
        "§3.2",
        "patch grid padded to even, right and below",
    ),
    Stage(
        "vision.resize{g}",
        ("vision.pad",),
        lambda s: fold.resize(s["vision.pad"][s.frames], s.group.side),
        (code.BRIDGE + "fold.resize", code.BRIDGE + "fold.resized_side", code.BRIDGE + "visual.groups"),
        "§3.3",
        "bilinear, when the token budget acts",
    ),
    Stage(
        "vision.space_to_depth{g}",
        ("vision.pad", "vision.resize{g}"),
        _space_to_depth,
        (code.BRIDGE + "fold.space_to_depth",),
        "§3.4",
        "2×2 patches into channels",
    ),
    Stage(
        "vision.projector{g}",
        ("vision.space_to_depth{g}",),
        lambda s: s.model.bridge.image_projector(s["vision.space_to_depth{g}"].permute(0, 2, 3, 1)),
        (code.BRIDGE + "projector.", "model.bridge.image_projector"),
        "§3.5",
        "Linear, GELU (erf), Linear",
    ),
    Stage(
        "vision.norm{g}",
        ("vision.projector{g}",),
        lambda s: s.model.bridge.image_norm(s["vision.projector{g}"]),
        (*code.RMS, "model.bridge.image_norm"),
        "§3.5",
        "bridge RMSNorm",
    ),
    Stage(
        "vision.pos_h.embed{g}",
        ("pos.freq",),
        lambda s: s.embed(s.model.bridge.pos_h, "h", s.group.side // s.model.config.image_pool_size)[None, :, None],
        code.position("h"),
        "§5",
        "height embedding, before rms",
    ),
    Stage(
        "vision.pos_h{g}",
        ("vision.norm{g}", "vision.pos_h.embed{g}"),
        lambda s: position.add(s["vision.norm{g}"], s["vision.pos_h.embed{g}"]),
        (code.BRIDGE + "position.add[h]", *code.RMS),
        "§3.6",
        "+ rms(height)",
    ),
    Stage(
        "vision.pos_w.embed{g}",
        ("pos.freq",),
        lambda s: s.embed(s.model.bridge.pos_w, "w", s.group.side // s.model.config.image_pool_size)[None, None],
        code.position("w"),
        "§5",
        "width embedding, before rms",
    ),
    Stage(
        "vision.pos_w{g}",
        ("vision.pos_h{g}", "vision.pos_w.embed{g}"),
        lambda s: position.add(s["vision.pos_h{g}"], s["vision.pos_w.embed{g}"]),
        (code.BRIDGE + "position.add[w]", *code.RMS),
        "§3.6",
        "+ rms(width)",
    ),
    Stage(
        "vision.pos_t.embed.{b}",
        ("pos.freq",),
        lambda s: s.embed(s.model.bridge.pos_t, f"t_v.{s.places['b']}", s.bench.num_frames[int(s.places["b"])])[
            :, None, None
        ],
        code.position("t", "t_v"),
        "§5",
        "time embedding of one video, before rms",
    ),
    Stage(
        "vision.pos_t{g}",
        ("vision.pos_w{g}", "vision.pos_t.embed.{b}"),
        _pos_t,
        (code.BRIDGE + "position.add[t]", *code.RMS),
        "§3.6",
        "+ rms(time), per video",
    ),
    Stage(
        "vision.packed",
        ("vision.pos_t{g}",),
        _vision_packed,
        (
            code.BRIDGE + "pack.to_stream[split]",
            "vidi.inputs.batch.pad_rows",
            code.BRIDGE + "visual.encode",
            code.BRIDGE + "visual._frame_tokens[flatten]",
        ),
        "§3.7",
        "(t, h, w) flattened per video, zero-padded at the right",
    ),
    Stage(
        "vision.mask",
        ("vision.packed", "inputs.images"),
        lambda s: mask.keep_tokens(s["vision.packed"], s.bench.signal("v")),
        (code.BRIDGE + "mask.keep_tokens", code.BRIDGE + "mask.has_signal[v]"),
        "§3.8",
        "kept visual tokens",
    ),
    Stage(
        "vision.llm_norm",
        ("vision.packed", "vision.mask"),
        lambda s: s.model.bridge.llm_norm(s["vision.packed"]) * s["vision.mask"][..., None],
        (code.BRIDGE + "pack.to_stream[norm]", *code.RMS, "model.bridge.llm_norm"),
        "§3.9",
        "shared RMSNorm, then the mask",
    ),
)
