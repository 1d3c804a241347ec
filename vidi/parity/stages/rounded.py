"""Stages in NumPy float32 with a rounding wherever the specification rounds (§5-§8): the ``rounded`` of their entries.

``to`` rounds float32 or float64 to the run's dtype, as float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stageparity.stage import NotHeld
from vidi.decoder.norm import PlainNorm
from vidi.parity.bench import Site

__all__ = [
    "added", "attended", "embedded", "final_norm", "logits", "loss_logits", "normed", "per_token", "raw_logits", "scaled",
    "text_to_text", "turned",
]  # fmt: skip

Array = np.ndarray
Round = Callable[[Array], Array]


def _np(x: Tensor) -> Array:
    return x.detach().cpu().float().numpy()


# ---- steps ----------------------------------------------------------------------------------------------------------------


def _rms(x: Array, eps: float) -> Array:
    """float32, not rounded."""
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float32) + np.float32(eps))


def _bridge_norm(x: Array, weight: Array, to: Round) -> Array:
    return to(weight * to(_rms(x, 1e-5)))


def _norm(x: Array, norm: Any, to: Round) -> Array:
    """Of the decoder: Gemma's rounds once, Mistral's before the weight too."""
    if isinstance(norm, PlainNorm):
        return to(_np(norm.weight) * to(_rms(x, norm.eps)))
    return to(_rms(x, norm.eps) * (1 + _np(norm.weight)))


def _linear(x: Array, layer: Any, to: Round) -> Array:
    return to(x @ _np(layer.weight).T)


def _attend(q: Array, k: Array, v: Array, keep: Array, config: Any, to: Round) -> Array:
    """(B, T, N, H) each, heads repeated; keep (B, T, S): scores, softcap, softmax in float32, one rounding at the end."""
    scores = np.einsum("btnh,bsnh->bnts", q, k) * np.float32(config.scale)
    if config.attn_softcap is not None:
        scores = config.attn_softcap * np.tanh(scores / np.float32(config.attn_softcap))
    scores = np.where(keep[:, None], scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    return to(np.einsum("bnts,bsnh->btnh", weights / np.where(total == 0, 1, total), v).astype(np.float32))


def _rotate(x: Array, cos: Array, sin: Array, to: Round) -> Array:
    first, second = np.split(x, 2, -1)
    turned = np.concatenate((-second, first), -1)
    return to(to(x * cos[:, :, None]) + to(turned * sin[:, :, None]))


def _angles(s: Site) -> Array:
    config = s.model.config.decoder
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    inverse = np.float32(1) / np.power(np.float32(config.rope_theta), exponent)
    angle = np.arange(s["text.embeds"].shape[1], dtype=np.float32)[:, None] * inverse
    return np.concatenate((angle, angle), -1)[None]


def _gelu(x: Array) -> Array:
    erf = torch.erf(torch.from_numpy(x / np.float32(math.sqrt(2)))).numpy()
    return x * np.float32(0.5) * (1 + erf)


# ---- stages ---------------------------------------------------------------------------------------------------------------


def scaled(template: str, s: Site, to: Round) -> Array:
    if s.model.config.decoder.kind == "mistral":
        return _np(s[template])
    root = to(np.sqrt(np.array(s.model.config.decoder.hidden_size, np.float64)))
    return to(_np(s[template]) * root)


def normed(template: str, name: str, s: Site, to: Round) -> Array:
    return _bridge_norm(_np(s[template]), _np(getattr(s.model.bridge, name).weight), to)


def added(template: str, embed: str, s: Site, to: Round) -> Array:
    return to(_np(s[template]) + to(_rms(_np(s[embed]), 1e-5)))


def embedded(axis: str, s: Site, to: Round) -> Array:
    """axis: h, w, t_v (a video's time) or t_a (a sample's sound)."""
    if s.bench.noise is not None:
        raise NotHeld("noisy positions are float64 in the golden")
    module = getattr(s.model.bridge, "pos_" + axis[0])
    if axis in "hw":
        length = s.grid
    else:
        length = (s.bench.num_frames if axis == "t_v" else s.bench.audio_tokens)[s.sample]
    p = np.arange(length, dtype=np.float32) / np.float32(max(length - 1, 1)) * np.float32(module.extent - 1)
    angle = p[:, None] * s.bench.targets["pos.freq"].array[None]  # type: ignore[union-attr]
    table = np.stack((np.sin(angle), np.cos(angle)), -1).reshape(length, -1)
    inner = _gelu(table @ _np(module.fc1.weight).T + _np(module.fc1.bias))
    out = to(inner @ _np(module.fc2.weight).T + _np(module.fc2.bias))
    shape = {"h": (1, length, 1, -1), "w": (1, 1, length, -1), "t_v": (length, 1, 1, -1), "t_a": (length, -1)}
    return out.reshape(shape[axis])


def text_to_text(s: Site, to: Round) -> Array:
    config, attention = s.model.config.decoder, s.layer.attention
    n = _norm(_np(s["layer.{i}.input"]), s.layer.input_norm, to)
    q, k, v = (
        _linear(n, p, to).reshape(*n.shape[:2], -1, config.head_dim) for p in (attention.q, attention.k, attention.v)
    )
    cos, sin = _np(s["rope.cos"]), _np(s["rope.sin"])
    q, k = _rotate(q, cos, sin, to), _rotate(k, cos, sin, to)
    group = config.num_heads // config.num_kv_heads
    places = np.arange(n.shape[1])
    behind = places[:, None] - places
    sees = (behind >= 0) & (behind <= (s.layer.window if s.layer.window is not None else len(places)))
    kept = s["text.mask"].numpy()
    keep = sees[None] & kept[:, None, :] & kept[:, :, None]
    heads = _attend(q, np.repeat(k, group, 2), np.repeat(v, group, 2), keep, config, to)
    return _linear(heads.reshape(*n.shape[:2], -1), attention.o, to)


def attended(s: Site, to: Round) -> Array:
    q, k, v = (_np(s[f"xattn.{{i}}.{{m}}.{part}"]).transpose(0, 2, 1, 3) for part in "qkv")
    keep = s["text.mask"].numpy()[:, :, None] & s["{path}.mask"].numpy()[:, None, :]
    return _attend(q, k, v, keep, s.model.config.decoder, to)


def _head(x: Array, s: Site, to: Round) -> Array:
    decoder = s.model.decoder
    return to(x @ _np(decoder.embed.weight if decoder.head is None else decoder.head.weight).T)


def raw_logits(s: Site, to: Round) -> Array:
    return _head(_np(s["final.norm"]), s, to)


def logits(s: Site, to: Round) -> Array:
    held = s.bench.holds("lm_head")
    x, cap = _np(s["lm_head"]) if held else raw_logits(s, to), s.model.config.decoder.final_softcap
    return x if cap is None else to(np.float32(cap) * to(np.tanh(to(x / np.float32(cap)))))


def loss_logits(s: Site, to: Round) -> Array:
    row_N, position_N = s["loss.kept"].numpy().T
    return _head(_np(s["final.norm"])[row_N, position_N], s, to)


def per_token(s: Site, to: Round) -> Array:
    if s.bench.holds("loss.logits"):
        return _cross_entropy(_np(s["loss.logits"]), s["loss.labels"].numpy())
    labels = s["text.labels"].numpy()
    shifted = np.concatenate((labels[:, 1:], np.full_like(labels[:, :1], -100)), 1).reshape(-1)
    return _cross_entropy(_np(s["logits"]).reshape(len(shifted), -1), shifted)


def _cross_entropy(logits: Array, shifted: Array) -> Array:
    top = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
    picked = logits[np.arange(len(shifted)), np.where(shifted == -100, 0, shifted)]
    return np.where(shifted == -100, 0, log_sum - picked).astype(np.float32)


def turned(function: str, s: Site, to: Round) -> Array:
    """Rotary cosines or sines."""
    return to(getattr(np, function)(_angles(s)))


def final_norm(s: Site, to: Round) -> Array:
    return _norm(_np(s["{last}"]), s.model.decoder.norm, to)
