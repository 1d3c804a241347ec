"""The oracle at the released sizes, part by part: one layer of each tower, the bridge, an even and an odd decoder layer, the
head, and self-attention across the window. Configuration and weights are the tests' own (`tests.released`, `weights`).

Each part is fed tensors that bfloat16 holds exactly, so that all arithmetics start from the same: a part's error is its own.

Dims as in the oracle: F frames, P pieces, L tokens, B samples, T text, S cached keys, D width, G kv heads, H head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
from safetensors.numpy import load_file

from goldens.oracle import Arithmetic, bridge, decoder, models, nine, round_bf16, text, towers
from goldens.oracle.case import Trace
from goldens.oracle.pointwise import gelu_erf, layer_norm
from tests import released
from tests.full_width import weights

__all__ = ["PARTS", "SEED", "fed", "forget", "held", "in_turn", "naive", "truth"]

SEED = 3
CONFIG = released.config(vision_layers=2, audio_layers=1, num_hidden_layers=2, vocab_size=weights.VOCABULARY)
SIZES = models.read(CONFIG)
TABLE = load_file(Path(__file__).parents[2] / "goldens" / "pos_freq.safetensors")["3584"]
KEYS = 4101  # of a text just past the window: the last query, at 4100, sees keys 4 to 4100 where there is one
QUERIES = 3

Run = dict[str, np.ndarray]


@cache
def _made() -> Mapping[str, np.ndarray]:
    return {name: weights.tensor(name, SEED) for name in weights.SHAPES}


@cache
def held(part: str) -> Mapping[str, np.ndarray]:
    """The weights of a part, float32, by official name. In part "decoder" some are four times as large, so that scores and
    logits come as near to their caps as trained ones do."""
    if part != "decoder":
        return _made()
    large = ("model.norm.weight", *(f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)))
    return {**_made(), **{name: 4 * _made()[name] for name in large}}


def forget() -> None:
    """Gives the memory back: some gigabytes."""
    for kept in (_made, held, fed, truth, naive, in_turn):
        kept.cache_clear()


@cache
def fed(part: str) -> Mapping[str, np.ndarray]:
    """What goes into a part."""
    draw = np.random.default_rng(5)

    def normal(*shape: int) -> np.ndarray:
        return round_bf16(draw.standard_normal(shape).astype(np.float32))

    if part == "vision":
        return {"frames": (draw.integers(-128, 129, (1, 3, 384, 384)) / 128).astype(np.float32)}
    if part == "audio":
        return {"mel": (draw.integers(-128, 129, (1, 128, 3000)) / 128).astype(np.float32)}
    if part in ("visual", "resized"):  # two frames: the last one stands at the end of time
        tower = round_bf16(truth("vision")["vision.tower"])
        return {"tower": np.concatenate([tower, tower[:, ::-1]])}
    if part == "sound":
        return {"tower": round_bf16(truth("audio")["audio.tower"]), "size": np.array([106])}
    if part == "decoder":
        ids = draw.integers(3, weights.VOCABULARY, (2, 8))
        keep = {"text": np.array([8, 5]), "image": np.array([12, 7]), "audio": np.array([6, 4])}
        masks = {name: np.arange(counts[0]) < counts[:, None] for name, counts in keep.items()}
        # As the bridge leaves them, about 1/32; some tokens so faint that an epsilon counts.
        faint = np.where(np.arange(2)[:, None, None] == 1, 2.0**-11, 2.0**-5).astype(np.float32)
        streams = {
            name: normal(2, int(keep[name][0]), 3584) * faint * masks[name][..., None] for name in ("image", "audio")
        }
        return {"ids": ids, **streams, **{f"keep.{name}": mask for name, mask in masks.items()}}
    assert part == "window"
    # Faint keys weigh alike; the first values are worth all others together: whoever sees one key more, or less, is seen.
    k, v = normal(1, KEYS - QUERIES, 8, 256) / 32, normal(1, KEYS - QUERIES, 8, 256)
    v[:, :6] *= 64
    return {"n": normal(1, QUERIES, 3584), "k": k, "v": v}


def _vision(ar: Arithmetic, w: weights.Tensors, given: Mapping[str, np.ndarray]) -> Run:
    root = "model.mm_vis.vision_model.encoder.layers.0."
    frames = given["frames"].astype(ar.work)
    embedded = towers.siglip(ar, dataclasses.replace(SIZES, vision_layers_run=0), w, frames)
    normed = layer_norm(ar, embedded, w(root + "layer_norm1.weight"), w(root + "layer_norm1.bias"), SIZES.vision_eps)
    return {
        "vision.embedding": embedded,
        "vision.attention": towers._attention(ar, w, root + "self_attn.", normed, SIZES.vision_heads),
        "vision.tower": towers.siglip(ar, SIZES, w, frames),
    }


def _audio(ar: Arithmetic, w: weights.Tensors, given: Mapping[str, np.ndarray]) -> Run:
    root = "model.mm_aud.encoder."
    mel = given["mel"].astype(ar.work)
    x = ar.store(gelu_erf(towers._conv3(ar, w, root + "conv1.", np.swapaxes(mel, 1, 2), stride=1)))
    x = ar.store(gelu_erf(towers._conv3(ar, w, root + "conv2.", x, stride=2)))
    embedded = ar.store(x + w(root + "embed_positions.weight"))
    norm = root + "layers.0.self_attn_layer_norm."
    normed = layer_norm(ar, embedded, w(norm + "weight"), w(norm + "bias"), SIZES.audio_eps)
    return {
        "audio.embedding": embedded,
        "audio.attention": towers._attention(ar, w, root + "layers.0.self_attn.", normed, SIZES.audio_heads),
        "audio.tower": towers.whisper(ar, SIZES, w, mel),
    }


def _visual(ar: Arithmetic, w: weights.Tensors, given: Mapping[str, np.ndarray]) -> Run:
    """From the tower's output on; its input only says that there is a signal."""
    trace, tower = Trace(), given["tower"].astype(ar.work)
    raw = np.ones((len(tower), 3, 1, 1), np.float32)
    with mock.patch.object(bridge, "siglip", return_value=tower):
        bridge.visual_tokens(ar, SIZES, w, {"inputs.images.0": raw}, 1, TABLE, trace)
    return trace.result()


def _resized(ar: Arithmetic, w: weights.Tensors, given: Mapping[str, np.ndarray]) -> Run:
    """The grid of a video of 1,000 frames, for which the released budget leaves 14 of 28 a side."""
    side = nine.grid_side(SIZES, 1000, 28)
    assert side == 14
    grid = given["tower"].astype(ar.work).reshape(2, 27, 27, 1152).transpose(0, 3, 1, 2)
    matrix = nine.resize_matrix(28, side, ar.work).astype(ar.work)
    grid = ar.store(matrix @ np.pad(grid, ((0, 0), (0, 0), (0, 1), (0, 1))) @ matrix.T)
    return {"vision.resize": grid, "vision.space_to_depth": nine.space_to_depth(grid, 2)}


def _sound(ar: Arithmetic, w: weights.Tensors, given: Mapping[str, np.ndarray]) -> Run:
    trace, tower = Trace(), given["tower"].astype(ar.work)
    inputs = {"inputs.audios.0": np.ones((1, 1, 3000), np.float32), "inputs.audio_sizes": given["size"]}
    with mock.patch.object(bridge, "whisper", return_value=tower):
        bridge.audio_tokens(ar, SIZES, w, inputs, 1, TABLE, trace)
    return trace.result()


def _decoder(ar: Arithmetic, w: weights.Tensors, given: Mapping[str, np.ndarray]) -> Run:
    trace = Trace(lambda stage: not stage.startswith("xattn"))
    streams = {
        letter: decoder.carry_stream(ar, SIZES, w, name, given[name].astype(ar.work), given[f"keep.{name}"], trace)
        for letter, name in (("v", "image"), ("a", "audio"))
    }
    x = text.embed(ar, w, given["ids"], given["keep.text"], trace)
    x = decoder.run_text(ar, SIZES, w, x, given["keep.text"], streams, trace)
    nine.logits(ar, SIZES, w, x, trace)
    return trace.result()


def _window(ar: Arithmetic, w: weights.Tensors, given: Mapping[str, np.ndarray]) -> Run:
    """Self-attention of three new rows to a text just past the window, cached keys before them: layer.0 has a window,
    layer.1 none. And the rotary factors of every position up to there."""
    trace = Trace()
    cos, sin = decoder.rope_tables(ar, SIZES, KEYS, trace)
    recent = slice(KEYS - QUERIES, KEYS)
    n, past_k, past_v = (given[name].astype(ar.work) for name in ("n", "k", "v"))
    for i, window in ((0, 4096), (1, None)):
        layer = decoder.Layer(ar, SIZES, w, i)
        q = decoder._rotated(ar, layer.heads("q_proj", n, 16), cos[:, recent], sin[:, recent])
        k = decoder._rotated(ar, layer.heads("k_proj", n, 8), cos[:, recent], sin[:, recent])
        v = layer.heads("v_proj", n, 8)
        k, v = (np.concatenate([x.transpose(0, 2, 1, 3), y], axis=2) for x, y in ((past_k, k), (past_v, v)))
        keep = decoder.window_mask(KEYS, window)[None, recent]
        trace.put(f"layer.{i}.t2t", layer.output(decoder.attend(ar, SIZES, q, k, v, keep)))
    return trace.result()


PARTS: Mapping[str, Callable[[Arithmetic, weights.Tensors, Mapping[str, np.ndarray]], Run]] = {
    "vision": _vision,
    "audio": _audio,
    "visual": _visual,
    "resized": _resized,
    "sound": _sound,
    "decoder": _decoder,
    "window": _window,
}


def _run(part: str, ar: Arithmetic) -> Run:
    return PARTS[part](ar, weights.Tensors(ar, held(part)), fed(part))


@cache
def truth(part: str) -> Run:
    """Every stage of a part in float64."""
    return _run(part, Arithmetic())


class _InTurn(Arithmetic):
    """Products summed term by term, as torch's convolutions do on some processors."""

    def contract(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        total = np.zeros((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]), a.dtype)
        for k in range(a.shape[-1]):
            total += a[..., :, k, None] * b[..., k, None, :]
        return total


@cache
def in_turn(part: str) -> Run:
    """A float32 run whose products are summed term by term."""
    return _run(part, _InTurn("cast", "fp32", 4))


@cache
def naive(part: str, dtype: str) -> Run:
    """The rounded run that errors are measured by. In the bridge its sums have another order than the plain one, which there
    follows the recordings' machine step by step, for minutes at this width."""
    order = 4 if part in ("visual", "sound") else None
    return _run(part, Arithmetic("cast", {"float32": "fp32", "bfloat16": "bf16"}[dtype], order))
