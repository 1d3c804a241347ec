"""Stages in NumPy float32 with a rounding wherever the specification rounds (§3-§8): the ``rounded`` of their entries. Those of
the towers have a file of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from stageparity.stage import NotHeld
from vidi.bridge import conv_pool
from vidi.parity.bench import Site
from vidi.parity.stages.rounded_steps import (
    Array,
    Round,
    as_numpy,
    attend,
    bridge_norm,
    gelu_erf,
    gelu_tanh,
    linear,
    norm,
    rms,
    rotate,
    silu,
)

__all__ = [
    "added", "added_in_turn", "attended", "audio_pool", "conv", "embedded", "final_norm", "layer_output", "llm_norm",
    "logits", "loss_logits", "normed", "per_token", "pooled", "projected", "projections", "raw_logits", "resized",
    "scaled", "stream", "text_to_stream", "text_to_text", "turned",
]  # fmt: skip


# ---- bridge -------------------------------------------------------------------------------------------------------------


def resized(s: Site, to: Round) -> Array:
    """Bilinear, the middle of a cell over the middle of its share of the cells before."""
    x, side = as_numpy(s["vision.pad"][s.frames]), s.group.side
    before = x.shape[-1]
    at = np.maximum((np.arange(side, dtype=np.float32) + 0.5) * np.float32(before / side) - 0.5, 0)
    low = at.astype(int)
    matrix, rows = np.zeros((side, before), np.float32), np.arange(side)
    np.add.at(matrix, (rows, low), 1 - (at - low))
    np.add.at(matrix, (rows, np.minimum(low + 1, before - 1)), at - low)
    return to(matrix @ x @ matrix.T)


def conv(s: Site, to: Round) -> Array:
    grid: Any = s.model.bridge.image_grid
    side = grid.patches - grid.conv.kernel_size[0] + 1
    windows = nn.functional.unfold(conv_pool.square(s["vision.tower"]).float(), grid.conv.kernel_size).mT
    return linear(windows.numpy(), grid.conv, to).transpose(0, 2, 1).reshape(len(windows), -1, side, side)


def pooled(s: Site, to: Round) -> Array:
    """Between the rows, then between the columns: one rounding."""
    grid: Any = s.model.bridge.image_grid
    weights = grid.weights_NS.numpy().astype(np.float32)
    return to(weights @ as_numpy(grid.sampled(s["vision.conv"])) @ weights.T)


def audio_pool(s: Site, to: Round) -> Array:
    conv, x = s.model.bridge.audio_pool, as_numpy(s["audio.trim"])
    size, tokens = conv.kernel_size[0], x.shape[1] // conv.kernel_size[0]
    windows = x[:, : tokens * size].reshape(len(x), tokens, size, -1).swapaxes(2, 3)
    return linear(windows.reshape(len(x), tokens, -1), conv, to).transpose(0, 2, 1)


def projected(name: str, s: Site, to: Round) -> tuple[Array, Array]:
    """name: vision or audio, whose projector it is. A product of rows that do not lie side by side in memory, as those of a
    folded grid, is rounded before its bias is added to it; on other machines it is not."""
    if name == "vision":
        grid = "vision.pool" if s.bench.holds("vision.pool") else "vision.space_to_depth{g}"
        x, projector = as_numpy(s[grid]).transpose(0, 2, 3, 1), s.model.bridge.image_projector
    else:
        rows = [row.T[:n] for row, n in zip(as_numpy(s["audio.pool"]), s.bench.audio_tokens, strict=True)]
        x, projector = np.concatenate(rows), s.model.bridge.audio_projector
    inner = linear(x, projector.fc1, to), linear(x, projector.fc1, to, late=True)
    early, late = (linear(to(gelu_erf(y)), projector.fc2, to) for y in inner)
    return early, late


def normed(template: str, name: str, s: Site, to: Round) -> Array:
    return bridge_norm(as_numpy(s[template]), as_numpy(getattr(s.model.bridge, name).weight), to)


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
    inner = gelu_erf(table @ as_numpy(module.fc1.weight).T + as_numpy(module.fc1.bias))
    out = to(inner @ as_numpy(module.fc2.weight).T + as_numpy(module.fc2.bias))
    shape = {"h": (1, length, 1, -1), "w": (1, 1, length, -1), "t_v": (length, 1, 1, -1), "t_a": (length, -1)}
    return out.reshape(shape[axis])


def added(template: str, embed: str, s: Site, to: Round) -> Array:
    return to(as_numpy(s[template]) + to(rms(as_numpy(s[embed]), 1e-5)))


def added_in_turn(template: str, s: Site, to: Round) -> Array:
    """The times of one sample after the other."""
    name = template.partition(".")[0]
    lengths = s.bench.num_frames if name == "vision" else s.bench.audio_tokens
    samples = s.group.videos if name == "vision" else range(len(lengths))
    embeds = [as_numpy(s.bench.golden(f"{name}.pos_t.embed.{b}")) for b in samples if lengths[b]]
    return to(as_numpy(s[template]) + to(rms(np.concatenate(embeds), 1e-5)))


def llm_norm(name: str, s: Site, to: Round) -> Array:
    return normed(f"{name}.packed", "llm_norm", s, to) * s[f"{name}.mask"].numpy()[..., None]


# ---- decoder ------------------------------------------------------------------------------------------------------------


def turned(function: str, s: Site, to: Round) -> Array:
    """Rotary cosines or sines."""
    config = s.model.config.decoder
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    inverse = np.float32(1) / np.power(np.float32(config.rope_theta), exponent)
    angle = np.arange(s["text.embeds"].shape[1], dtype=np.float32)[:, None] * inverse
    return to(getattr(np, function)(np.concatenate((angle, angle), -1)[None]))


def scaled(template: str, s: Site, to: Round) -> Array:
    if s.model.config.decoder.kind == "mistral":
        return as_numpy(s[template])
    root = to(np.sqrt(np.array(s.model.config.decoder.hidden_size, np.float64)))
    return to(as_numpy(s[template]) * root)


def _heads(part: str, template: str, s: Site, to: Round) -> Array:
    """q, k or v of a layer, (B, T, N, H), keys and values with their heads repeated."""
    config, x = s.model.config.decoder, norm(as_numpy(s[template]), s.layer.input_norm, to)
    heads = linear(x, getattr(s.layer.attention, part), to).reshape(*x.shape[:2], -1, config.head_dim)
    return np.repeat(heads, config.num_heads // heads.shape[2], 2)


def _output(heads: Array, s: Site, to: Round) -> Array:
    return linear(heads.reshape(*heads.shape[:2], -1), s.layer.attention.o, to)


def projections(part: str, s: Site, to: Round) -> Array:
    """Queries, keys or values of cross-attention, (B, N, T, H)."""
    return _heads(part, "layer.{i}.input" if part == "q" else "{stream}", s, to).transpose(0, 2, 1, 3)


def text_to_text(s: Site, to: Round) -> Array:
    config, cos, sin = s.model.config.decoder, as_numpy(s["rope.cos"]), as_numpy(s["rope.sin"])
    q, k, v = (_heads(part, "layer.{i}.input", s, to) for part in "qkv")
    places = np.arange(q.shape[1])
    behind = places[:, None] - places
    sees = (behind >= 0) & (behind <= (s.layer.window if s.layer.window is not None else len(places)))
    kept = s["text.mask"].numpy()
    keep = sees[None] & kept[:, None, :] & kept[:, :, None]
    q, k = rotate(q, cos, sin, to), rotate(k, cos, sin, to)
    return _output(attend(q, k, v, to, config.scale, config.attn_softcap, keep), s, to)


def _attended(q: Array, k: Array, v: Array, s: Site, to: Round) -> Array:
    config = s.model.config.decoder
    keep = s["text.mask"].numpy()[:, :, None] & s["{path}.mask"].numpy()[:, None, :]
    return attend(q, k, v, to, config.scale, config.attn_softcap, keep)


def attended(s: Site, to: Round) -> Array:
    """Cross-attention from its queries, keys and values."""
    q, k, v = (as_numpy(s[f"xattn.{{i}}.{{m}}.{part}"]).transpose(0, 2, 1, 3) for part in "qkv")
    return _attended(q, k, v, s, to)


def text_to_stream(s: Site, to: Round) -> Array:
    q = _heads("q", "layer.{i}.input", s, to)
    k, v = (_heads(part, "{stream}", s, to) for part in "kv")
    return _output(_attended(q, k, v, s, to), s, to)


def stream(s: Site, to: Round) -> Array:
    """A token of a stream attends to itself alone: what it gets is its own value."""
    return _merged(as_numpy(s["{stream}"]), [_output(_heads("v", "{stream}", s, to), s, to)], s, to)


def layer_output(s: Site, to: Round) -> Array:
    branches = [s["layer.{i}.t2t"]]
    branches += [s.bench.golden(x) for m in "va" if s.bench.holds(x := s.id(f"layer.{{i}}.t2{m}"))]
    return _merged(as_numpy(s["layer.{i}.input"]), [as_numpy(x) for x in branches], s, to)


def _merged(x: Array, branches: list[Array], s: Site, to: Round) -> Array:
    """A layer from its attentions on. Mistral adds them one by one; Gemma their norm, and every norm is rounded before it is
    added."""
    layer, gemma = s.layer, s.model.config.decoder.kind != "mistral"
    if gemma:
        mixed = branches[0]
        for branch in branches[1:]:
            mixed = to(mixed + branch)
        branches = [norm(mixed, layer.post_attn_norm, to)]
    for branch in branches:
        x = to(x + branch)
    n = norm(x, layer.pre_ffn_norm, to)
    gate = to((gelu_tanh if gemma else silu)(linear(n, layer.mlp.gate, to)))
    out = linear(to(gate * linear(n, layer.mlp.up, to)), layer.mlp.down, to)
    return to(x + (norm(out, layer.post_ffn_norm, to) if gemma else out))


# ---- head and loss ------------------------------------------------------------------------------------------------------


def final_norm(s: Site, to: Round) -> Array:
    return norm(as_numpy(s["{last}"]), s.model.decoder.norm, to)


def _head(x: Array, s: Site, to: Round) -> Array:
    decoder = s.model.decoder
    return to(x @ as_numpy(decoder.embed.weight if decoder.head is None else decoder.head.weight).T)


def raw_logits(s: Site, to: Round) -> Array:
    return _head(as_numpy(s["final.norm"]), s, to)


def logits(s: Site, to: Round) -> Array:
    held = s.bench.holds("lm_head")
    x, cap = as_numpy(s["lm_head"]) if held else raw_logits(s, to), s.model.config.decoder.final_softcap
    return x if cap is None else to(np.float32(cap) * to(np.tanh(to(x / np.float32(cap)))))


def loss_logits(s: Site, to: Round) -> Array:
    row_N, position_N = s["loss.kept"].numpy().T
    return _head(as_numpy(s["final.norm"])[row_N, position_N], s, to)


def per_token(s: Site, to: Round) -> Array:
    if s.bench.holds("loss.logits"):
        return _cross_entropy(as_numpy(s["loss.logits"]), s["loss.labels"].numpy())
    labels = s["text.labels"].numpy()
    shifted = np.concatenate((labels[:, 1:], np.full_like(labels[:, :1], -100)), 1).reshape(-1)
    return _cross_entropy(as_numpy(s["logits"]).reshape(len(shifted), -1), shifted)


def _cross_entropy(logits: Array, shifted: Array) -> Array:
    top = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
    picked = logits[np.arange(len(shifted)), np.where(shifted == -100, 0, shifted)]
    return np.where(shifted == -100, 0, log_sum - picked).astype(np.float32)
