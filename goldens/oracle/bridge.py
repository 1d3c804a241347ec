"""Tower features to the tokens that the decoder attends to: the visual path (spec §3) and the audio path (§4).

Dims: B batch, F frames, C encoder width, D decoder width, V visual tokens, A audio tokens, y x grid, M mel bins.
"""

import math
from collections.abc import Iterator, Mapping

import numpy as np

from .case import Sizes, Trace, Weights, audio_samples, video_samples
from .casts import Arithmetic
from .pointwise import gelu_erf
from .positions import bridge_norm, position_embedding, rms
from .towers import siglip, whisper

__all__ = ["audio_tokens", "visual_tokens"]

FRAMES_AT_ONCE = 4
Inputs = Mapping[str, np.ndarray]
Tokens = tuple[np.ndarray, np.ndarray]


def visual_tokens(
    ar: Arithmetic, sizes: Sizes, w: Weights, inputs: Inputs, batch: int, freq: np.ndarray, trace: Trace
) -> Tokens | None:
    """(x_BVD, keep_BV) after llm_norm and mask, or None where no sample has a frame.

    With budget_scope "video" each video has its own grid: the ids from vision.resize to vision.pos_t (and
    pos_h.embed, pos_w.embed) then end in the sample's number, because grids of unequal sides do not join.
    """
    if "inputs.feat_table" in inputs:
        counts, seen = [len(inputs["inputs.feat_index"])], [True]
        frames = None
    else:
        frames = video_samples(inputs, batch)
        if frames is None:
            return None
        counts, seen = [len(f) for f in frames], [bool(np.any(f)) for f in frames]

    def features(b: int) -> Iterator[np.ndarray]:
        for start in range(0, counts[b], FRAMES_AT_ONCE):
            span = slice(start, start + FRAMES_AT_ONCE)
            yield _stored_features(ar, inputs, span) if frames is None else siglip(ar, sizes, w, frames[b][span])

    own_grid = sizes.budget_scope == "video"
    flat_VD: list[np.ndarray] = []
    embeds: dict[str, np.ndarray] = {}
    for b in range(batch):
        suffix = f".{b}" if own_grid else ""
        if counts[b] == 0:
            flat_VD.append(np.zeros((0, sizes.width), ar.work))
            continue
        total = counts[b] if own_grid else sum(counts)
        grid_FyxD = _grid(ar, sizes, w, features(b), total, trace, suffix)
        for axis, name in ((1, "h"), (2, "w")):
            stage = f"vision.pos_{name}.embed{suffix}"
            if stage not in embeds:  # one row for all videos of a grid, recorded once
                length = grid_FyxD.shape[axis]
                noise = _noise(inputs, name, own_grid)
                embed = position_embedding(ar, w, f"model.mm_rand_pos_{name}.", length, sizes.image_pool, freq, noise)
                embeds[stage] = trace.put(stage, embed.reshape((1, length, 1, -1) if axis == 1 else (1, 1, length, -1)))
            grid_FyxD = trace.put(f"vision.pos_{name}{suffix}", ar.store(grid_FyxD + rms(ar, embeds[stage])))
        embed = _time(ar, sizes, w, counts[b], freq, inputs, f"t_v.{b}").reshape(-1, 1, 1, sizes.width)
        embed = trace.put(f"vision.pos_t.embed.{b}", embed)
        grid_FyxD = trace.put(f"vision.pos_t{suffix}", ar.store(grid_FyxD + rms(ar, embed)))
        flat_VD.append(grid_FyxD.reshape(-1, sizes.width))
    return _packed(ar, w, flat_VD, seen, "vision", trace)


def audio_tokens(
    ar: Arithmetic, sizes: Sizes, w: Weights, inputs: Inputs, batch: int, freq: np.ndarray, trace: Trace
) -> Tokens | None:
    """(x_BAD, keep_BA) after llm_norm and mask, or None where no sample has one whole audio token."""
    mels = audio_samples(inputs, batch)
    if mels is None:
        return None
    mel_frames = mels[0].shape[2]
    sizes_B = [int(s) if len(mel) else 0 for s, mel in zip(inputs["inputs.audio_sizes"], mels, strict=True)]
    positions = [
        min(s * sizes.audio_positions // mel_frames, len(mel) * sizes.audio_positions)
        for s, mel in zip(sizes_B, mels, strict=True)
    ]
    lengths = [p // sizes.audio_pool for p in positions]
    if not any(lengths):
        return None
    trimmed: list[np.ndarray] = []
    for mel, kept in zip(mels, positions, strict=True):
        if len(mel) == 0:
            trimmed.append(np.zeros((0, len(w("model.mm_aud.encoder.layer_norm.weight"))), ar.work))
            continue
        pieces_PLC = trace.put("audio.tower", whisper(ar, sizes, w, mel))
        trimmed.append(pieces_PLC.reshape(-1, pieces_PLC.shape[-1])[:kept])
    trim_BLC = trace.put("audio.trim", _right_padded(trimmed))
    pool_BOA = trace.put("audio.pool", np.swapaxes(_pool(ar, sizes, w, trim_BLC), 1, 2))
    pool_BAO = np.swapaxes(pool_BOA, 1, 2)
    flat_AD: list[np.ndarray] = []
    for b, length in enumerate(lengths):
        if length == 0:
            flat_AD.append(np.zeros((0, sizes.width), ar.work))
            continue
        x_AD = _projector(ar, w, "model.mm_rand_aud_projector.", pool_BAO[b, :length])
        x_AD = trace.put("audio.projector", x_AD)
        x_AD = trace.put("audio.norm", bridge_norm(ar, x_AD, w("model.mm_rand_aud_norm.weight")))
        embed_AD = _time(ar, sizes, w, length, freq, inputs, f"t_a.{b}")
        embed_AD = trace.put(f"audio.pos_t.embed.{b}", embed_AD)
        flat_AD.append(trace.put("audio.pos_t", ar.store(x_AD + rms(ar, embed_AD))))
    return _packed(ar, w, flat_AD, [bool(np.any(mel)) for mel in mels], "audio", trace)


def _grid(
    ar: Arithmetic, sizes: Sizes, w: Weights, chunks: Iterator[np.ndarray], total: int, trace: Trace, suffix: str
) -> np.ndarray:
    """Tower features of one video, a few frames at a time, through grid, projector and norm -> (F, y, x, D).
    `total` counts the frames that share a token budget."""
    done: list[np.ndarray] = []
    for tower_FLC in chunks:
        tower_FLC = trace.put("vision.tower", tower_FLC)
        count, length, width = tower_FLC.shape
        patches = math.isqrt(length)
        x_FCyx = tower_FLC.reshape(count, patches, patches, width).transpose(0, 3, 1, 2)
        x_FCyx = sizes.parts.grid(ar, sizes, w, x_FCyx, total, trace, suffix)
        x_FyxD = _projector(ar, w, "model.mm_rand_img_projector.", x_FCyx.transpose(0, 2, 3, 1))
        x_FyxD = trace.put(f"vision.projector{suffix}", x_FyxD)
        x_FyxD = bridge_norm(ar, x_FyxD, w("model.mm_rand_img_norm.weight"))
        done.append(trace.put(f"vision.norm{suffix}", x_FyxD))
    return np.concatenate(done)


def _pool(ar: Arithmetic, sizes: Sizes, w: Weights, trim_BLC: np.ndarray) -> np.ndarray:
    """Conv1d (to the decoder's width or the encoder's own, kernel = stride = pool, no bias) over the zero-padded batch
    -> (B, max // pool, its width)."""
    batch, length, width = trim_BLC.shape
    windows = trim_BLC[:, : length - length % sizes.audio_pool].reshape(batch, -1, sizes.audio_pool, width)
    weight_OCK = w("model.mm_rand_aud_pool.weight")
    return ar.linear(
        np.swapaxes(windows, 2, 3).reshape(batch, windows.shape[1], -1), weight_OCK.reshape(len(weight_OCK), -1)
    )


def _projector(ar: Arithmetic, w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    hidden = ar.store(gelu_erf(ar.linear(x, w(name + "model.0.weight"), w(name + "model.0.bias"))))
    return ar.linear(hidden, w(name + "model.2.weight"), w(name + "model.2.bias"))


def _time(
    ar: Arithmetic, sizes: Sizes, w: Weights, length: int, freq: np.ndarray, inputs: Inputs, noise: str
) -> np.ndarray:
    """The time embedding: one module for frames and audio tokens."""
    return position_embedding(
        ar, w, "model.mm_rand_pos_t.", length, sizes.time_interval, freq, inputs.get(f"inputs.pos_noise.{noise}")
    )


def _noise(inputs: Inputs, axis: str, own_grid: bool) -> np.ndarray | None:
    noise = inputs.get(f"inputs.pos_noise.{axis}")
    if noise is not None and own_grid:
        raise ValueError("position noise along h and w is one vector for the batch; it needs budget_scope='batch'")
    return noise


def _packed(ar: Arithmetic, w: Weights, flat: list[np.ndarray], seen: list[bool], path: str, trace: Trace) -> Tokens:
    """Pad the batch at the right, find the kept tokens, norm, blank the others. `seen`: the raw input is not all 0."""
    packed_BLD = trace.put(f"{path}.packed", _right_padded(flat))
    keep_BL = (np.sum(np.abs(packed_BLD), axis=-1) != 0) & np.asarray(seen)[:, None]
    trace.put(f"{path}.mask", keep_BL)
    normed_BLD = bridge_norm(ar, packed_BLD, w("model.mm_rand_llm_norm.weight"))
    return trace.put(f"{path}.llm_norm", normed_BLD * keep_BL[:, :, None].astype(ar.work)), keep_BL


def _right_padded(rows: list[np.ndarray]) -> np.ndarray:
    """(L_b, X) each -> (B, max L, X), zeros at the right."""
    longest = max(len(row) for row in rows)
    return np.stack([np.pad(row, ((0, longest - len(row)), (0, 0))) for row in rows])


def _stored_features(ar: Arithmetic, inputs: Inputs, span: slice) -> np.ndarray:
    """Synthetic tower output of a case without frames: table[index]/64·scale in float32, then cast."""
    table = inputs["inputs.feat_table"][inputs["inputs.feat_index"][span]].astype(np.float32) / np.float32(64)
    return ar.store((table * inputs["inputs.feat_scale"][span][:, None, None].astype(np.float32)).astype(ar.work))
