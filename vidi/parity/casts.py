"""Where a half-precision run must round, bit for bit (spec §5-§8).

An error budget cannot see most misplaced casts: doing a step in float32 that the model does in bf16 even shrinks the error.
So the stages whose arithmetic the specification fixes are computed once more here, in NumPy float32 with a rounding wherever
the model stores a tensor, from the same rounded goldens; their values must have the same bits. Sums may round apart in another
order, so a small share of values (`SHARE`) may differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidi.parity import ids, stages
from vidi.parity.result import Result, Rule
from vidi.parity.stages import NotHeld, Site

__all__ = ["DTYPES", "SHARE", "WHY", "compare"]

DTYPES = ("bfloat16", "float16")
SHARE = 0.02  #: of the values may have other bits, one value always; see `WHY`
SPREADS = 0.3  #: fp16 self-attention: one bit of a value that rounds apart moves every row that sees it (22 % seen)
WHY = (
    "bits of a twin that rounds where the specification says: over all small cases sums in another order move 0.1 % of a"
    " stage's values (1 of 72, where few), the weakest misplaced cast 6 %"
)

Array = np.ndarray
Round = Callable[[Array], Array]


def compare(bench: stages.Bench, alone: Mapping[str, Tensor]) -> Iterator[tuple[str, Result]]:
    """(id, result) of every stage of ``alone`` (as `stages.isolated` makes them) whose casts are known. ``bench``: a model in
    half precision, with plain arithmetic on a CPU; other kernels round elsewhere."""
    for stage_id, value in alone.items():
        found = stages.find(stage_id)
        twin = _TWINS.get(found[0].template) if found else None
        if found is None or twin is None:
            continue
        try:
            theirs = twin(Site(bench, *found), _rounding(bench.model.dtype))
        except NotHeld:
            continue
        spreads = found[0].template == "layer.{i}.t2t" and bench.model.dtype == torch.float16
        yield stage_id, _result(stage_id, _np(value), theirs, max(SPREADS if spreads else SHARE, 1 / theirs.size))


def _result(stage_id: str, mine: Array, theirs: Array, allowed: float) -> Result:
    # What is float32 in a half-precision run (the loss) may differ by an ulp of another logarithm.
    if mine.shape != theirs.shape or not np.isfinite(mine).all():
        return Result(
            stage_id, False, Rule("casts", WHY, max=allowed), problems=("another shape, or values that are not finite",)
        )
    differs = ~np.isclose(mine, theirs, rtol=5e-7, atol=0)
    share, axes = float(differs.mean()), ids.axes(stage_id, mine.ndim)
    content = tuple(axis for axis in range(mine.ndim) if axis not in axes.rows)
    rows = np.argwhere(differs.any(axis=content))
    at = tuple(int(i) for i in np.unravel_index(int(differs.argmax()), mine.shape))
    return Result(
        stage_id,
        ok=share <= allowed,
        rule=Rule("casts", WHY, max=allowed),
        count=int(mine.size),
        max_abs=float(np.abs(mine - theirs).max()),
        errors={"max": share},
        budgets={"max": allowed},
        worst_index=at,
        worst_values=(float(mine[at]), float(theirs[at])),
        first_rows=tuple(tuple(int(i) for i in row) for row in rows[:3]),
        rows_over=len(rows),
        rows=int(np.prod([mine.shape[axis] for axis in axes.rows])),
        elements_over=int(differs.sum()),
        problems=()
        if share <= allowed
        else (f"{share:.1%} of the values have other bits than the specified casts give",),
        ratio=share / allowed,
    )


def _np(x: Tensor) -> Array:
    return x.detach().cpu().float().numpy()


def _rounding(dtype: torch.dtype) -> Round:
    """float32 or float64 -> the nearest value of ``dtype``, as float32."""
    return lambda x: torch.from_numpy(np.ascontiguousarray(x)).to(dtype).float().numpy()


# ---- steps ----------------------------------------------------------------------------------------------------------------


def _rms(x: Array, eps: float) -> Array:
    """float32, not rounded."""
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float32) + np.float32(eps))


def _bridge_norm(x: Array, weight: Array, to: Round) -> Array:
    return to(weight * to(_rms(x, 1e-5)))


def _gemma_norm(x: Array, norm: Any, to: Round) -> Array:
    return to(_rms(x, norm.eps) * (1 + _np(norm.weight)))


def _linear(x: Array, layer: Any, to: Round) -> Array:
    return to(x @ _np(layer.weight).T)


def _attend(q: Array, k: Array, v: Array, keep: Array, config: Any, to: Round) -> Array:
    """(B, T, N, H) each, heads repeated; keep (B, T, S): scores, softcap, softmax in float32, one rounding at the end."""
    scores = np.einsum("btnh,bsnh->bnts", q, k) * np.float32(config.scale)
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


def _scaled(template: str) -> Callable[[Site, Round], Array]:
    def twin(s: Site, to: Round) -> Array:
        root = to(np.sqrt(np.array(s.model.config.decoder.hidden_size, np.float64)))
        return to(_np(s[template]) * root)

    return twin


def _normed(template: str, name: str) -> Callable[[Site, Round], Array]:
    return lambda s, to: _bridge_norm(_np(s[template]), _np(getattr(s.model.bridge, name).weight), to)


def _added(template: str, embed: str) -> Callable[[Site, Round], Array]:
    return lambda s, to: to(_np(s[template]) + to(_rms(_np(s[embed]), 1e-5)))


def _embedded(axis: str) -> Callable[[Site, Round], Array]:
    def twin(s: Site, to: Round) -> Array:
        if s.bench.noise is not None:
            raise NotHeld("noisy positions are float64 in the golden")
        module = getattr(s.model.bridge, "pos_" + axis[0])
        pool = s.model.config.image_pool_size
        if axis in "hw":
            length = s.group.side // pool
        else:
            length = (s.bench.num_frames if axis == "t_v" else s.bench.audio_tokens)[int(s.places["b"])]
        p = np.arange(length, dtype=np.float32) / np.float32(max(length - 1, 1)) * np.float32(module.extent - 1)
        angle = p[:, None] * s.bench.targets["pos.freq"].array[None]  # type: ignore[union-attr]
        table = np.stack((np.sin(angle), np.cos(angle)), -1).reshape(length, -1)
        inner = _gelu(table @ _np(module.fc1.weight).T + _np(module.fc1.bias))
        out = to(inner @ _np(module.fc2.weight).T + _np(module.fc2.bias))
        shape = {"h": (1, length, 1, -1), "w": (1, 1, length, -1), "t_v": (length, 1, 1, -1), "t_a": (length, -1)}
        return out.reshape(shape[axis])

    return twin


def _t2t(s: Site, to: Round) -> Array:
    config, attention = s.model.config.decoder, s.layer.attention
    n = _gemma_norm(_np(s["layer.{i}.input"]), s.layer.input_norm, to)
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


def _xattn_out(s: Site, to: Round) -> Array:
    q, k, v = (_np(s[f"xattn.{{i}}.{{m}}.{part}"]).transpose(0, 2, 1, 3) for part in "qkv")
    keep = s["text.mask"].numpy()[:, :, None] & s["{path}.mask"].numpy()[:, None, :]
    return _attend(q, k, v, keep, s.model.config.decoder, to)


def _logits(s: Site, to: Round) -> Array:
    cap = np.float32(s.model.config.decoder.final_softcap)
    x = to(_np(s["final.norm"]) @ _np(s.model.decoder.embed.weight).T)
    return to(cap * to(np.tanh(to(x / cap))))


def _per_token(s: Site, to: Round) -> Array:
    labels = s["text.labels"].numpy()
    shifted = np.concatenate((labels[:, 1:], np.full_like(labels[:, :1], -100)), 1).reshape(-1)
    logits = _np(s["logits"]).reshape(len(shifted), -1)
    top = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
    picked = logits[np.arange(len(shifted)), np.where(shifted == -100, 0, shifted)]
    return np.where(shifted == -100, 0, log_sum - picked).astype(np.float32)


_TWINS: dict[str, Callable[[Site, Round], Array]] = {
    "vision.norm{g}": _normed("vision.projector{g}", "image_norm"),
    "vision.pos_h.embed{g}": _embedded("h"),
    "vision.pos_h{g}": _added("vision.norm{g}", "vision.pos_h.embed{g}"),
    "vision.pos_w.embed{g}": _embedded("w"),
    "vision.pos_w{g}": _added("vision.pos_h{g}", "vision.pos_w.embed{g}"),
    "vision.pos_t.embed.{b}": _embedded("t_v"),
    "audio.norm": _normed("audio.projector", "audio_norm"),
    "audio.pos_t.embed.{b}": _embedded("t_a"),
    "rope.cos": lambda s, to: to(np.cos(_angles(s))),
    "rope.sin": lambda s, to: to(np.sin(_angles(s))),
    "layer.0.input": _scaled("text.embeds"),
    "layer.0.image_input": _scaled("vision.llm_norm"),
    "layer.0.audio_input": _scaled("audio.llm_norm"),
    "layer.{i}.t2t": _t2t,
    "xattn.{i}.{m}.out": _xattn_out,
    "final.norm": lambda s, to: _gemma_norm(_np(s["{last}"]), s.model.decoder.norm, to),
    "logits": _logits,
    "loss.per_token": _per_token,
}
