"""What only Vidi 7B has (spec of the 7B): a learned pool of the patch grid (§3.2-3.3), Mistral's norms and feed-forward
(§7), a head of its own in float32 and the loss over labelled places alone (§8).

Dims: F frames, C encoder width, y x grid, B batch, T text tokens, N labelled places, D decoder width, K vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .case import Parts, Sizes, Trace, Weights
from .casts import Arithmetic
from .decoder import Layer
from .head import cross_entropy, mean_above
from .pointwise import interpolation, normed, silu
from .text import IGNORED_LABEL

__all__ = ["PARTS", "corner_matrix", "numbers"]

# What config.json must say because no public text does (§1).
REQUIRED = (
    *("sliding_window", "rms_norm_eps", "rope_theta", "eos_token_id"),
    *("mm_image_pool_size", "mm_audio_pool_size", "mm_time_interval"),
)


def numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Sizes` that only this model's config.json has, or has otherwise. Raises ValueError for absent ones."""
    if missing := [name for name in REQUIRED if name not in config]:
        raise ValueError(f"the configuration lacks {', '.join(missing)}; none of them has a default (§1)")
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {
        "head_dim": head_dim,
        "window": config["sliding_window"],
        "windowed_every": 1,
        "score_scale": float(head_dim) ** -0.5,
        "attn_softcap": None,
        "embed_factor": 1.0,
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_theta"],
        "image_pool": config["mm_image_pool_size"],
        "audio_pool": config["mm_audio_pool_size"],
        "time_interval": config["mm_time_interval"],
        "rounded_positions": True,
        "stop_id": config["eos_token_id"],
    }


# ---- vision


def grid(
    ar: Arithmetic, sizes: Sizes, w: Weights, x_FCyx: np.ndarray, total: int, trace: Trace, suffix: str
) -> np.ndarray:
    """Patch grid -> (F, C, P, P): convolved with stride 1, sampled at P positions an axis from corner to corner.
    The number of frames, `total`, has no effect."""
    x_FCyx = trace.put("vision.conv", _conv(ar, w("model.mm_rand_img_pool.conv.weight"), x_FCyx))
    matrix = corner_matrix(x_FCyx.shape[-1], sizes.image_pool, ar.work).astype(ar.work)
    return trace.put("vision.pool", ar.store(matrix @ x_FCyx @ matrix.T))


def _conv(ar: Arithmetic, weight_OCkk: np.ndarray, x_FCyx: np.ndarray) -> np.ndarray:
    """Square kernel, no padding, no bias: (F, C, y, x) -> (F, O, y-k+1, x-k+1)."""
    windows = np.lib.stride_tricks.sliding_window_view(x_FCyx, weight_OCkk.shape[2:], axis=(2, 3))
    windows_FyxK = windows.transpose(0, 2, 3, 1, 4, 5).reshape(len(windows), *windows.shape[2:4], -1)
    return ar.linear(windows_FyxK, weight_OCkk.reshape(len(weight_OCkk), -1)).transpose(0, 3, 1, 2)


def corner_matrix(before: int, after: int, dtype: type[np.floating] = np.float64) -> np.ndarray:
    """Bilinear sampling of one axis as a matrix (after, before): output i stands at i·(before-1)/(after-1), so that the
    corners meet; a single output stands at the first. dtype holds the positions."""
    step = dtype(before - 1) / dtype(max(after - 1, 1))
    return interpolation(np.arange(after).astype(dtype) * step, before)


# ---- decoder


def plain_norm(ar: Arithmetic, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """weight · cast(x32·rsqrt(mean(x32²)+eps)): the product is in the model's dtype."""
    return ar.store(weight * ar.store(normed(ar, x, eps).astype(ar.work)))


def join(layer: Layer, x: np.ndarray, outputs: Sequence[np.ndarray]) -> np.ndarray:
    """((x + self) + vis) + aud, each stored, none normed."""
    for output in outputs:
        x = layer.ar.store(x + output)
    return x


def feed_forward(layer: Layer, x: np.ndarray) -> np.ndarray:
    """`post_attention_layernorm` is the norm in front of the MLP; none follows."""
    return layer.ar.store(x + layer.mlp(layer.norm("post_attention_layernorm", x)))


# ---- head


def logits(ar: Arithmetic, sizes: Sizes, w: Weights, n_BTD: np.ndarray, trace: Trace) -> np.ndarray:
    """(B, T, K), float32 whatever the model's dtype."""
    return trace.put("logits", ar.widen(trace.put("lm_head", ar.linear(n_BTD, w("lm_head.weight")))))


def losses(
    ar: Arithmetic,
    sizes: Sizes,
    w: Weights,
    n_BTD: np.ndarray,
    labels_BT: np.ndarray,
    thresholds: Mapping[str, float | None],
    trace: Trace,
) -> None:
    """Only places whose next token is labelled reach the head: `loss.kept` are their (row, position)."""
    kept_N2 = trace.put("loss.kept", np.argwhere(labels_BT[:, 1:] != IGNORED_LABEL))
    rows_N, places_N = kept_N2.T
    targets_N = trace.put("loss.labels", labels_BT[rows_N, places_N + 1])
    scores_NK = trace.put("loss.logits", ar.linear(n_BTD[rows_N, places_N], w("lm_head.weight")))
    per_token_N = trace.put("loss.per_token", cross_entropy(ar.widen(scores_NK), targets_N)).astype(ar.wide)
    for name, threshold in thresholds.items():
        trace.put(f"loss.{name}", mean_above(per_token_N, np.ones(len(targets_N), bool), threshold))


PARTS = Parts(grid, plain_norm, silu, join, feed_forward, logits, losses)
