"""Every feature that the small cases were made for bites: the oracle without it gives other logits than with it.

Bounds, as largest movement of the logits over their RMS: 1e-2 where the feature is a structure, less for constants; the
least, 1e-6, is a thousand times the gate (1e-9) that holds a float64 model to these cases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from goldens import recipes, recipes_7b
from goldens.oracle import bridge, case, decoder, forward, models, nine, pointwise, positions, run, seven, text

Patch = Callable[[pytest.MonkeyPatch], None]


def _set(module: Any, name: str, value: Any) -> Patch:
    return lambda patch: patch.setattr(module, name, value)


def _kv_mask_ignored(patch: pytest.MonkeyPatch) -> None:
    packed = bridge._packed
    patch.setattr(bridge, "_packed", lambda *args: (lambda x, keep: (x, np.ones_like(keep)))(*packed(*args)))


def _sizes(**changes: Any) -> Patch:
    def patch_sizes(patch: pytest.MonkeyPatch) -> None:
        read = models.read
        patch.setattr(models, "read", lambda config: dataclasses.replace(read(config), **changes))

    return patch_sizes


def _parts(**changes: Any) -> Patch:
    def patch_parts(patch: pytest.MonkeyPatch) -> None:
        read = models.read

        def other(config: Any) -> case.Sizes:
            sizes = read(config)
            return dataclasses.replace(sizes, parts=dataclasses.replace(sizes.parts, **changes))

        patch.setattr(models, "read", other)

    return patch_parts


def _softcap_nowhere(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(decoder, "softcap", lambda x, cap: x)


def _channels_last_in_fold(patch: pytest.MonkeyPatch) -> None:
    def fold(x, pool):
        count, width, rows, cols = x.shape
        blocks = x.reshape(count, width, rows // pool, pool, cols // pool, pool).transpose(0, 3, 5, 1, 2, 4)
        return blocks.reshape(count, width * pool * pool, rows // pool, cols // pool)

    patch.setattr(nine, "space_to_depth", fold)


def _corners_aligned(patch: pytest.MonkeyPatch) -> None:
    def matrix(before, after, dtype):
        source = np.arange(after) * ((before - 1) / (after - 1))
        return np.maximum(0.0, 1.0 - np.abs(source[:, None] - np.arange(before)))

    patch.setattr(nine, "resize_matrix", matrix)


def _pieces_swapped(patch: pytest.MonkeyPatch) -> None:
    whisper = bridge.whisper
    patch.setattr(bridge, "whisper", lambda *args: whisper(*args)[::-1])


def _rows_and_columns_swapped(patch: pytest.MonkeyPatch) -> None:
    embedding = positions.position_embedding
    other = {"model.mm_rand_pos_h.": "model.mm_rand_pos_w.", "model.mm_rand_pos_w.": "model.mm_rand_pos_h."}
    patch.setattr(
        bridge, "position_embedding", lambda ar, w, module, *rest: embedding(ar, w, other.get(module, module), *rest)
    )


def _grid_span(span: int) -> Patch:
    def other(patch: pytest.MonkeyPatch) -> None:
        embedding = positions.position_embedding

        def of_span(ar, w, module, length, own, *rest):
            return embedding(ar, w, module, length, own if module.endswith("pos_t.") else span, *rest)

        patch.setattr(bridge, "position_embedding", of_span)

    return other


def _noise_ignored(patch: pytest.MonkeyPatch) -> None:
    embedding = positions.position_embedding
    patch.setattr(bridge, "position_embedding", lambda *args: embedding(*args[:-1], None))


def _noise_not_clipped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(positions.np, "clip", lambda x, low, high: x)


def _tiled_heads(patch: pytest.MonkeyPatch) -> None:
    attend = decoder.attend

    def tiled(ar, sizes, q, k, v, keep):
        groups = sizes.num_kv_heads  # head n reads kv head n % G
        order = np.argsort(np.arange(sizes.num_heads) % groups, kind="stable")
        return attend(ar, sizes, q[:, order], k, v, keep)[:, :, np.argsort(order)]

    patch.setattr(decoder, "attend", tiled)


def _rope_on_streams(patch: pytest.MonkeyPatch) -> None:
    attend = decoder.attend

    def rotated(ar, sizes, q, k, v, keep):
        if q.shape[2] == k.shape[2]:
            return attend(ar, sizes, q, k, v, keep)
        tables = [decoder.rope_tables(ar, sizes, x.shape[2], case.Trace([])) for x in (q, k)]
        q, k = (decoder._rotated(ar, x, *table) for x, table in zip((q, k), tables, strict=True))
        return attend(ar, sizes, q, k, v, keep)

    patch.setattr(decoder, "attend", rotated)


def _streams_stand_still(patch: pytest.MonkeyPatch) -> None:
    carry = decoder.carry_stream

    def still(ar, sizes, w, name, x, keep, trace):
        parts = dataclasses.replace(sizes.parts, feed_forward=lambda layer, y: decoder.scaled(ar, sizes, x))
        return carry(ar, dataclasses.replace(sizes, parts=parts), w, name, x, keep, trace)

    patch.setattr(run, "carry_stream", still)


def _raw_mask_ignored(patch: pytest.MonkeyPatch) -> None:
    packed = bridge._packed
    patch.setattr(
        bridge, "_packed", lambda ar, w, flat, seen, path, trace: packed(ar, w, flat, [True] * len(seen), path, trace)
    )


def _audio_positions_late(patch: pytest.MonkeyPatch) -> None:
    padded = bridge._right_padded
    patch.setattr(bridge, "_right_padded", lambda rows: np.roll(padded(rows), 1, axis=1))


def _straddle_dropped(patch: pytest.MonkeyPatch) -> None:
    """Audio lengths round up: the window that straddles a sample's end counts."""
    tokens = bridge.audio_tokens

    def ceiling(ar, sizes, w, inputs, batch, freq, trace):
        whole = 2 * sizes.audio_pool  # mel frames of a token
        rounded = -(-np.asarray(inputs["inputs.audio_sizes"]) // whole) * whole
        return tokens(ar, sizes, w, dict(inputs) | {"inputs.audio_sizes": rounded}, batch, freq, trace)

    patch.setattr(run, "audio_tokens", ceiling)


def _rounded_factor(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(decoder, "scaled", lambda ar, sizes, x: x * float(np.float32(np.round(sizes.width**0.5 * 32) / 32)))


def _mask_ignored(patch: pytest.MonkeyPatch) -> None:
    pack = text.pack
    patch.setattr(run, "pack", lambda ids, keep, labels=None, **rest: pack(ids, None, labels, **rest))


def _last_row_out(patch: pytest.MonkeyPatch) -> None:
    """Positions i·(S-k-1)/(P-1): the last corner one row short."""
    corners = seven.corner_matrix
    patch.setattr(seven, "corner_matrix", lambda before, *rest: np.pad(corners(before - 1, *rest), ((0, 0), (0, 1))))


def _half_pixels(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(seven, "corner_matrix", nine.resize_matrix)


def _nearest(patch: pytest.MonkeyPatch) -> None:
    corners = seven.corner_matrix
    patch.setattr(seven, "corner_matrix", lambda *args: np.eye(args[0])[np.argmax(corners(*args), axis=1)])


def _time_first(patch: pytest.MonkeyPatch) -> None:
    """(t, w, h) in place of (t, h, w): the grid of each frame turned."""
    grid = seven.grid
    _parts(grid=lambda *args: np.swapaxes(grid(*args), 2, 3))(patch)


def _plus_one(ar: Any, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return seven.plain_norm(ar, x, weight + 1.0, eps)


def _tied(ar: Any, sizes: Any, w: Any, n: np.ndarray, trace: case.Trace) -> np.ndarray:
    return trace.put("logits", ar.linear(n, w("model.embed_tokens.weight")))


def _capped(ar: Any, sizes: Any, w: Any, n: np.ndarray, trace: case.Trace) -> np.ndarray:
    return trace.put("logits", pointwise.softcap(ar.linear(n, w("lm_head.weight")), 30.0))


BITES: dict[str, tuple[str, Patch, float]] = {
    # feature: (case, the oracle without it, least movement of the logits)
    "sqrt(D) rounded to bf16": ("base", _rounded_factor, 1e-3),
    "scale from head_dim": ("base", _sizes(score_scale=4**-0.5), 1e-2),
    "window w keys, not w+1": ("base", _sizes(window=2), 1e-2),
    "window w+2 keys": ("base", _sizes(window=4), 1e-2),
    "no window": ("base", _sizes(window=99), 1e-2),
    "no attention softcap": ("base", _softcap_nowhere, 1e-2),
    "no final softcap": ("base", _sizes(final_softcap=1e9), 1e-2),
    "gemma eps 1e-5": ("base", _sizes(norm_eps=1e-5), 1e-6),
    "bridge eps 1e-6": ("base", _set(positions, "EPS", 1e-6), 1e-6),
    "time interval 9999": ("base", _sizes(time_interval=9999), 1e-3),
    "kv heads tiled": ("base", _tiled_heads, 1e-2),
    "rope on cross-attention": ("base", _rope_on_streams, 1e-2),
    "streams stand still": ("base", _streams_stand_still, 1e-2),
    "key mask ignored": ("base", _kv_mask_ignored, 1e-2),
    "tower's last layer run": ("base", _sizes(vision_layers_run=3), 1e-2),
    "gelu erf in the decoder": ("base", _parts(activation=pointwise.gelu_erf), 1e-4),
    "gelu tanh in projectors": ("base", _set(bridge, "gelu_erf", pointwise.gelu_tanh), 1e-4),
    "straddling audio window kept": ("base", _straddle_dropped, 1e-2),
    "audio one position late": ("base", _audio_positions_late, 1e-2),
    "fold with channels last": ("base", _channels_last_in_fold, 1e-2),
    "h and w swapped": ("base", _rows_and_columns_swapped, 1e-2),
    "audio pieces swapped": ("base", _pieces_swapped, 1e-2),
    "resize with aligned corners": ("budget", _corners_aligned, 1e-2),
    "budget not applied": ("budget", _sizes(token_budget=60000), 1e-2),
    "budget for each video": ("budget", _sizes(budget_scope="video"), 1e-2),
    "budget shared": ("pervideo", _sizes(budget_scope="batch"), 1e-2),
    "mask ignored": ("holes", _mask_ignored, 1e-2),
    "silent frames kept": ("absent", _raw_mask_ignored, 1e-2),
    "position noise ignored": ("train", _noise_ignored, 1e-2),
    "position noise not clipped": ("train", _noise_not_clipped, 1e-3),
}


# The same for the 7B, the ways of mixing it with the 9B among them.
SEVEN: dict[str, tuple[str, Patch, float]] = {
    "scale from query_pre_attn_scalar 6": ("base", _sizes(score_scale=6**-0.5), 1e-2),
    "window w keys, not w+1": ("base", _sizes(window=2), 1e-2),
    "window on even layers only": ("base", _sizes(windowed_every=2), 1e-2),
    "no window": ("textonly", _sizes(window=None), 1e-2),
    "attention softcap 50": ("base", _sizes(attn_softcap=50.0), 1e-4),
    "final softcap 30": ("base", _parts(logits=_capped), 1e-2),
    "tied head": ("base", _parts(logits=_tied), 1e-2),
    "sqrt(D) factor": ("textonly", _sizes(embed_factor=24**0.5), 1e-2),
    "sqrt(D) factor on the streams": ("oneid", _sizes(embed_factor=24**0.5), 1e-2),
    "norm weight 1 + w": ("base", _parts(norm=_plus_one), 1e-2),
    "norm eps 1e-5, the bridge's": ("base", _sizes(norm_eps=1e-5), 1e-6),
    "bridge eps 4e-5, the decoder's": ("base", _set(positions, "EPS", 4e-5), 1e-6),
    "attention outputs summed and normed": ("base", _parts(join=nine.join), 1e-2),
    "GELU for SiLU": ("base", _parts(activation=pointwise.gelu_tanh), 1e-2),
    "GELU tanh in projectors": ("base", _set(bridge, "gelu_erf", pointwise.gelu_tanh), 1e-5),
    "time interval 10000": ("base", _sizes(time_interval=10000), 1e-3),
    "h and w over 0 … 1, the 9B's": ("base", _grid_span(2), 1e-2),
    "half-pixel centres in the pool": ("base", _half_pixels, 1e-2),
    "nearest in the pool": ("base", _nearest, 1e-2),
    "last row left out of the pool": ("base", _last_row_out, 1e-2),
    "h and w of the grid swapped": ("base", _time_first, 1e-2),
    "h and w embeddings swapped": ("base", _rows_and_columns_swapped, 1e-2),
    "kv heads tiled": ("base", _tiled_heads, 1e-2),
    "rope on cross-attention": ("base", _rope_on_streams, 1e-2),
    "rope theta 10000": ("base", _sizes(rope_theta=10000.0), 1e-3),
    "streams stand still": ("base", _streams_stand_still, 1e-2),
    "key mask ignored": ("base", _kv_mask_ignored, 1e-2),
    "tower's last layer run": ("base", _sizes(vision_layers_run=3), 1e-2),
    "straddling audio window kept": ("base", _straddle_dropped, 1e-2),
    "audio pieces swapped": ("base", _pieces_swapped, 1e-2),
    "silent frames kept": ("absent", _raw_mask_ignored, 1e-2),
    "mask ignored": ("decode", _mask_ignored, 1e-2),
    "position noise ignored": ("train", _noise_ignored, 1e-2),
    "position noise not clipped": ("train", _noise_not_clipped, 1e-3),
    "noise ignored without audio": ("trainvideo", _noise_ignored, 1e-2),
}


@pytest.mark.parametrize(
    ("recipes_of", "feature"),
    [*((recipes, feature) for feature in BITES), *((recipes_7b, feature) for feature in SEVEN)],
    ids=[*BITES, *(f"7b-{feature}" for feature in SEVEN)],
)
def test_bites(recipes_of: Any, feature: str, monkeypatch: pytest.MonkeyPatch, record_property) -> None:
    name, fault, least = (BITES if recipes_of is recipes else SEVEN)[feature]
    recipe, tensors = recipes_of.cases()[name], recipes_of.weights()
    stage = "loss.logits" if recipes_of is recipes_7b and "inputs.labels" in recipe.inputs else "logits"
    wanted = forward(recipe.config, tensors, recipe.inputs, pos_freq=recipes.POS_FREQ)[stage]
    fault(monkeypatch)
    got = forward(recipe.config, tensors, recipe.inputs, pos_freq=recipes.POS_FREQ)[stage]
    if stage == "logits":
        length = min(got.shape[1], wanted.shape[1])  # a mask that is ignored makes the text longer
        got, wanted = got[:, :length], wanted[:, :length]
    movement = float(np.abs(got - wanted).max() / np.sqrt(np.mean(wanted**2)))
    record_property("moved", f"{movement:.2e}")
    print(f"bites {feature:32s} {name:9s} {movement:.1e}")
    assert movement > least
