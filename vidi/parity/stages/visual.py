"""The visual path (spec §3) and the table of position frequencies (§5)."""

from __future__ import annotations

from functools import partial

from stageparity.code import code, part
from stageparity.stage import Stage
from vidi.parity.stages.code import ALONE, PACK, RMS, TOWER, VISUAL, position, position_code

__all__ = ["FRAMES", "PURE", "STAGES"]

conv_pool, fold, mask = (code(f"vidi.bridge.{name}") for name in ("conv_pool", "fold", "mask"))
batches, pixels = code("vidi.inputs.batch"), code("vidi.inputs.pixels")
rounded, rounded_towers = code("vidi.parity.stages.rounded"), code("vidi.parity.stages.rounded_towers")

VIDEO = ("visual",)
FOLD, CONV = (*VIDEO, "fold"), (*VIDEO, "conv")  # how a model makes tokens of patches
TOKENS = (0, 1, 2)  # rows of (F, h, w, D)
PATCHES = (0, 2, 3)  # rows of (F, C, h, w)
FRAMES = {"float16": 0.1}  # one bit that rounds apart moves its frame, or piece of sound (2 % seen)
PURE = frozenset({"no-float32-step"})


STAGES: tuple[Stage, ...] = (
    Stage(
        "pos.freq", "table of position frequencies, torch on the CPU", "§5", "D/2",
        exact=True, rows=(0,), when=("streams",),
        run=lambda s: position.frequencies(s.model.config.decoder.hidden_size),
        code=(position.frequencies,),
        machine=ALONE.frequencies_here,
    ),
    Stage(
        "vision.tower", "SigLIP2 at hidden state -2", "§3.1", "F L C",
        inputs=("inputs.images",), run=ALONE.vision_tower, when=VIDEO, tags=PURE,
        code=(code("vidi.towers.siglip"), pixels, part("vision_tower"), *TOWER),
        rounded=rounded_towers.vision, spreads=FRAMES,
    ),
    Stage(
        "vision.pad", "patch grid padded to even, right and below", "§3.2", "F C S S",
        rows=PATCHES, inputs=("vision.tower",), when=FOLD, tags=PURE, wiring=(VISUAL["pad"],),
        run=lambda s: fold.pad(s["vision.tower"], s.model.config.image_pool_size),
        code=(fold.pad,),
    ),
    Stage(
        "vision.resize{g}", "bilinear, when the token budget acts", "§3.3", "F C s s",
        rows=PATCHES, inputs=("vision.pad",), when=(*FOLD, "resize"), tags=PURE, wiring=(VISUAL["resize"],),
        run=lambda s: fold.resize(s["vision.pad"][s.frames], s.group.side),
        code=(fold.resize, fold.resized_side, fold.groups),
        rounded=rounded.resized,
    ),
    Stage(
        "vision.space_to_depth{g}", "2×2 patches into channels", "§3.4", "F 4C h w",
        rows=PATCHES, inputs=("vision.pad", "vision.resize{g}"), when=FOLD, tags=PURE, wiring=(VISUAL["space_to_depth"],),
        run=ALONE.space_to_depth,
        code=(fold.space_to_depth,),
    ),
    Stage(
        "vision.conv", "7B: convolution over the patch grid, stride 1", "§3.2", "F C · ·",
        rows=PATCHES, inputs=("vision.tower",), when=CONV, tags=PURE, wiring=(conv_pool.ConvPool.forward["conv"],),
        run=ALONE.conv,
        code=(conv_pool.square, part("bridge.image_grid.conv")),
        rounded=rounded.conv,
    ),
    Stage(
        "vision.pool", "7B: bilinear samples of it, corner to corner", "§3.3", "F C h w",
        rows=PATCHES, inputs=("vision.conv",), when=CONV, tags=PURE, wiring=(conv_pool.ConvPool.forward["pool"],),
        run=lambda s: s.model.bridge.image_grid.sample(s.model.bridge.image_grid.sampled(s["vision.conv"])),
        code=(
            conv_pool.corner_rows, conv_pool.ConvPool.sample, conv_pool.ConvPool.sampled,
            part("bridge.image_grid.rows"), part("bridge.image_grid.weights_NS"),
        ),
        rounded=rounded.pooled,
    ),
    Stage(
        "vision.projector{g}", "Linear, GELU (erf), Linear", "§3.5", "F h w D",
        rows=TOKENS, inputs=("vision.space_to_depth{g}", "vision.pool"), when=VIDEO, tags=PURE,
        wiring=(VISUAL["projector"], conv_pool.ConvPool.forward["projector"]),
        run=ALONE.image_projector,
        code=(code("vidi.bridge.projector"), part("bridge.image_projector")),
        rounded=partial(rounded.projected, "vision"),
    ),
    Stage(
        "vision.norm{g}", "bridge RMSNorm", "§3.5", "F h w D",
        rows=TOKENS, inputs=("vision.projector{g}",), when=VIDEO, wiring=(VISUAL["norm"],),
        run=lambda s: s.model.bridge.image_norm(s["vision.projector{g}"]),
        code=(*RMS, part("bridge.image_norm")),
        rounded=partial(rounded.normed, "vision.projector{g}", "image_norm"),
    ),
    Stage(
        "vision.pos_h.embed{g}", "height embedding, before rms", "§5", "1 h 1 D",
        rows=(1,), inputs=("pos.freq",), when=VIDEO, wiring=(VISUAL["pos_h.embed"],),
        run=lambda s: s.embed(s.model.bridge.pos_h, "h", s.grid)[None, :, None],
        code=position_code("h"),
        rounded=partial(rounded.embedded, "h"),
    ),
    Stage(
        "vision.pos_h{g}", "+ rms(height)", "§3.6", "F h w D",
        rows=TOKENS, inputs=("vision.norm{g}", "vision.pos_h.embed{g}"), when=VIDEO, wiring=(VISUAL["pos_h"],),
        run=lambda s: position.add(s["vision.norm{g}"], s["vision.pos_h.embed{g}"]),
        code=(position.add["h"], *RMS),
        rounded=partial(rounded.added, "vision.norm{g}", "vision.pos_h.embed{g}"),
    ),
    Stage(
        "vision.pos_w.embed{g}", "width embedding, before rms", "§5", "1 1 w D",
        rows=(2,), inputs=("pos.freq",), when=VIDEO, wiring=(VISUAL["pos_w.embed"],),
        run=lambda s: s.embed(s.model.bridge.pos_w, "w", s.grid)[None, None],
        code=position_code("w"),
        rounded=partial(rounded.embedded, "w"),
    ),
    Stage(
        "vision.pos_w{g}", "+ rms(width)", "§3.6", "F h w D",
        rows=TOKENS, inputs=("vision.pos_h{g}", "vision.pos_w.embed{g}"), when=VIDEO, wiring=(VISUAL["pos_w"],),
        run=lambda s: position.add(s["vision.pos_h{g}"], s["vision.pos_w.embed{g}"]),
        code=(position.add["w"], *RMS),
        rounded=partial(rounded.added, "vision.pos_h{g}", "vision.pos_w.embed{g}"),
    ),
    Stage(
        "vision.pos_t.embed.{b}", "time embedding of one video, before rms", "§5", "· 1 1 D",
        rows=(0,), inputs=("pos.freq",), when=VIDEO, wiring=(VISUAL["pos_t.embed"],),
        run=lambda s: s.embed(s.model.bridge.pos_t, f"t_v.{s.sample}", s.bench.num_frames[s.sample])[:, None, None],
        code=position_code("t", "t_v"),
        rounded=partial(rounded.embedded, "t_v"),
    ),
    Stage(
        "vision.pos_t{g}", "+ rms(time), per video", "§3.6", "F h w D",
        rows=TOKENS, inputs=("vision.pos_w{g}", "vision.pos_t.embed.{b}"), when=VIDEO, wiring=(VISUAL["pos_t"],),
        run=ALONE.vision_pos_t,
        code=(position.add["t"], *RMS),
        rounded=partial(rounded.added_in_turn, "vision.pos_w{g}"),
    ),
    Stage(
        "vision.packed", "(t, h, w) flattened per video, zero-padded at the right", "§3.7", "B V D",
        inputs=("vision.pos_t{g}",), when=VIDEO, wiring=(VISUAL["flatten"], PACK["split"]),
        run=ALONE.vision_packed,
        code=(batches.pad_rows,),
    ),
    Stage(
        "vision.mask", "kept visual tokens", "§3.8", "B V",
        exact=True, inputs=("vision.packed", "inputs.images"), when=VIDEO, wiring=(PACK["mask"],),
        run=lambda s: mask.keep_tokens(s["vision.packed"], s.bench.signal("v")),
        code=(mask.keep_tokens, mask.has_signal["v"]),
    ),
    Stage(
        "vision.llm_norm", "shared RMSNorm, then the mask", "§3.9", "B V D",
        inputs=("vision.packed", "vision.mask"), when=VIDEO, wiring=(PACK["norm"],),
        run=lambda s: s.model.bridge.llm_norm(s["vision.packed"]) * s["vision.mask"][..., None],
        code=(*RMS, part("bridge.llm_norm")),
        rounded=partial(rounded.llm_norm, "vision"),
    ),
)  # fmt: skip
