"""What only Vidi 1.5 9B has: patches folded into channels under a token budget (spec §3.2-3.4), Gemma 2's norms and
feed-forward (§7), the tied and capped head and the loss over it (§8).

Dims: F frames, C encoder width, y x grid, B batch, T text tokens, D decoder width, K vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .case import Parts, Sizes, Trace, Weights
from .casts import Arithmetic
from .decoder import Layer
from .head import cross_entropy, mean_above
from .pointwise import gelu_tanh, interpolation, normed
from .text import IGNORED_LABEL

__all__ = ["PARTS", "grid", "grid_side", "loss", "numbers", "resize_matrix", "space_to_depth"]


def numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Sizes` that only this model's config.json has, or has otherwise."""
    scope = config.get("budget_scope", "batch")
    if scope not in ("batch", "video"):
        raise ValueError(f"budget_scope is {scope!r}; it must be 'batch' or 'video'")
    if config.get("mm_image_pool_size", 2) != 2:
        raise ValueError(f"mm_image_pool_size is {config['mm_image_pool_size']}; only 2 is specified (§3)")
    return {
        "head_dim": config["head_dim"],
        "window": config["sliding_window"],
        "windowed_every": 2,
        "score_scale": float(config["query_pre_attn_scalar"]) ** -0.5,
        "attn_softcap": config["attn_logit_softcapping"],
        "final_softcap": config["final_logit_softcapping"],
        "embed_factor": float(config["hidden_size"]) ** 0.5,
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": config.get("rope_theta", 10000.0),
        "image_pool": 2,
        "audio_pool": config.get("mm_audio_pool_size", 5),
        "time_interval": config.get("mm_time_interval", 10000),
        "token_budget": config.get("visual_token_budget", 60000),
        "budget_scope": scope,
        "stop_id": config.get("end_of_turn_id", 107),
    }


# ---- vision


def grid(
    ar: Arithmetic, sizes: Sizes, w: Weights, x_FCyx: np.ndarray, total: int, trace: Trace, suffix: str
) -> np.ndarray:
    """Patch grid -> (F, C·pool², y, x): padded to even, resized where `total` frames pass the budget, folded."""
    patches = x_FCyx.shape[-1]
    short = -patches % sizes.image_pool
    x_FCyx = trace.put("vision.pad", np.pad(x_FCyx, ((0, 0), (0, 0), (0, short), (0, short))))
    side = grid_side(sizes, total, patches + short)
    if side is not None:
        matrix = resize_matrix(patches + short, side, ar.work).astype(ar.work)
        x_FCyx = trace.put(f"vision.resize{suffix}", ar.store(matrix @ x_FCyx @ matrix.T))
    return trace.put(f"vision.space_to_depth{suffix}", space_to_depth(x_FCyx, sizes.image_pool))


def grid_side(sizes: Sizes, total_frames: int, side: int) -> int | None:
    """The side of the resized grid, None where `total_frames` grids of `side`² fit the budget as they are (§3.3)."""
    assert sizes.token_budget is not None
    budget = sizes.token_budget * sizes.image_pool**2
    if total_frames * side * side <= budget:
        return None
    smaller = int(side * math.sqrt(budget / (total_frames * side * side)))
    return max(smaller - smaller % 2, 10)


def resize_matrix(before: int, after: int, dtype: type[np.floating] = np.float64) -> np.ndarray:
    """Bilinear resampling of one axis as a matrix (after, before), half-pixel centres, no antialias, edges clamped.

    dtype holds the source positions: a low-precision model computes them in float32, an error of up to a position's ulp.
    """
    ratio = dtype(before) / dtype(after)
    source = np.maximum((np.arange(after).astype(dtype) + dtype(0.5)) * ratio - dtype(0.5), dtype(0.0))
    return interpolation(source, before)


def space_to_depth(x_FCyx: np.ndarray, pool: int) -> np.ndarray:
    """(F, C, y, x) -> (F, C·pool², y/pool, x/pool), channel c·pool² + dy·pool + dx (§3.4)."""
    count, width, rows, cols = x_FCyx.shape
    blocks = x_FCyx.reshape(count, width, rows // pool, pool, cols // pool, pool)
    return blocks.transpose(0, 1, 3, 5, 2, 4).reshape(count, width * pool * pool, rows // pool, cols // pool)


# ---- decoder


def gemma_norm(ar: Arithmetic, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x32·rsqrt(mean(x32²)+eps)·(1+weight32), all in float32, stored."""
    return ar.store((normed(ar, x, eps) * (ar.wide(1) + ar.widen(weight))).astype(ar.work))


def join(layer: Layer, x: np.ndarray, outputs: Sequence[np.ndarray]) -> np.ndarray:
    """x + norm((self + vis) + aud), in this order."""
    added = outputs[0]
    for output in outputs[1:]:
        added = layer.ar.store(added + output)
    return layer.ar.store(x + layer.norm("post_attention_layernorm", added))


def feed_forward(layer: Layer, x: np.ndarray) -> np.ndarray:
    """Normed on both sides of the MLP."""
    down = layer.mlp(layer.norm("pre_feedforward_layernorm", x))
    return layer.ar.store(x + layer.norm("post_feedforward_layernorm", down))


# ---- head


def logits(ar: Arithmetic, sizes: Sizes, w: Weights, n_BTD: np.ndarray, trace: Trace) -> np.ndarray:
    """(B, T, K): the embedding as head, cap·tanh(x/cap) in the model's dtype, a store after each."""
    raw_BTK = ar.linear(n_BTD, w("model.embed_tokens.weight"))
    cap = ar.work(sizes.final_softcap)
    capped_BTK = ar.store(ar.store(np.tanh(ar.store(raw_BTK / cap))) * cap)
    return trace.put("logits", capped_BTK)


def losses(
    ar: Arithmetic,
    sizes: Sizes,
    w: Weights,
    n_BTD: np.ndarray,
    labels_BT: np.ndarray,
    thresholds: Mapping[str, float | None],
    trace: Trace,
) -> None:
    """Logits of every place, and the losses over them."""
    logits_BTK = logits(ar, sizes, w, n_BTD, trace)
    for name, value in _losses(ar.wide, logits_BTK, labels_BT, thresholds, trace).items():
        if name != "loss.per_token":
            trace.put(name, value)


def loss(
    logits_BTK: np.ndarray,
    labels_BT: np.ndarray,
    thresholds: Mapping[str, float | None] | None = None,
    *,
    casts: str = "none",
) -> dict[str, np.ndarray]:
    """Cross-entropy of packed text: {"loss.per_token": (B·T,), "loss.NAME": () for each threshold}.

    labels_BT are `text.labels`: not shifted, -100 ignored. They move left by one within each row; ignored tokens count
    0 per token. thresholds: see `mean_above`. float32, but float64 with casts="none".
    """
    return _losses(Arithmetic(casts).wide, logits_BTK, labels_BT, thresholds or {"none": None}, Trace([]))


def _losses(
    wide: type[np.floating],
    logits_BTK: np.ndarray,
    labels_BT: np.ndarray,
    thresholds: Mapping[str, float | None],
    trace: Trace,
) -> dict[str, np.ndarray]:
    targets = np.concatenate([labels_BT[:, 1:], np.full_like(labels_BT[:, :1], IGNORED_LABEL)], axis=1).reshape(-1)
    counted = targets != IGNORED_LABEL
    scores = np.asarray(logits_BTK, dtype=wide).reshape(len(targets), -1)
    per_token = np.where(counted, cross_entropy(scores, np.where(counted, targets, 0)), wide(0)).astype(wide)
    result = {"loss.per_token": per_token}
    per_token = trace.put("loss.per_token", per_token).astype(wide)
    for name, threshold in thresholds.items():
        result[f"loss.{name}"] = mean_above(per_token, counted, threshold)
    return result


PARTS = Parts(grid, gemma_norm, gelu_tanh, join, feed_forward, logits, losses)
