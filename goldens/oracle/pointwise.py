"""The few element-wise functions and norms that several parts share. Each takes and returns arrays of one shape."""

import math

import numpy as np

from .casts import Arithmetic

__all__ = [
    "fused", "gelu_erf", "gelu_erf_float32", "gelu_tanh", "interpolation", "layer_norm", "normed", "rsqrt", "silu",
    "softcap", "softmax_average",
]  # fmt: skip

_erf_objects = np.frompyfunc(math.erf, 1, 1)


def _erf(x: np.ndarray) -> np.ndarray:
    """erf in float64, one libm call per element (NumPy has none); in slices, because each passes through objects."""
    flat = np.asarray(x, dtype=np.float64).reshape(-1)
    out = np.empty_like(flat)
    for start in range(0, flat.size, 1 << 18):
        out[start : start + (1 << 18)] = _erf_objects(flat[start : start + (1 << 18)])
    return out.reshape(np.shape(x))


def gelu_erf(x: np.ndarray) -> np.ndarray:
    """x/2·(1+erf(x/√2)), in x's dtype: Whisper, projectors, position MLPs."""
    exact = np.asarray(x, dtype=np.float64)
    return (0.5 * exact * (1.0 + _erf(exact * math.sqrt(0.5)))).astype(x.dtype)


def gelu_erf_float32(x: np.ndarray) -> np.ndarray:
    """The same as float32 CPU kernels have it: erf by Abramowitz & Stegun 7.1.26 with fused multiply-adds, off by up to
    1.5e-7. For the float32-forced position MLP, whose recorded bits hold this very error; nothing else uses it."""
    x = np.asarray(x, dtype=np.float32)
    z = x * np.float32(math.sqrt(0.5))
    t = np.float32(1) / fused(np.float32(0.3275911), np.abs(z), np.float32(1))
    poly = np.full_like(t, 1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        poly = fused(poly, t, np.float32(coefficient))
    tail = -np.exp(-(z * z).astype(np.float64)).astype(np.float32) * t
    return x * np.float32(0.5) * (np.float32(1) + np.copysign(fused(tail, poly, np.float32(1)), z))


def fused(a: np.ndarray | np.float32, b: np.ndarray, c: np.ndarray | np.float32) -> np.ndarray:
    """a·b + c of float32 values, rounded to float32 once (through float64, where a·b is exact)."""
    return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """x/2·(1+tanh(√(2/π)(x+0.044715x³))), in x's dtype: SigLIP and Gemma."""
    return (0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))).astype(x.dtype)


def silu(x: np.ndarray) -> np.ndarray:
    """x/(1+exp(-x)), in x's dtype: Mistral."""
    return (x / (1.0 + np.exp(-x))).astype(x.dtype)


def rsqrt(x: np.ndarray) -> np.ndarray:
    """1/√x in x's dtype."""
    return (1.0 / np.sqrt(x)).astype(x.dtype)


def softcap(x: np.ndarray, cap: float | None) -> np.ndarray:
    """cap·tanh(x/cap) in x's dtype; x itself without a cap."""
    return x if cap is None else (cap * np.tanh(x / cap)).astype(x.dtype)


def normed(ar: Arithmetic, x: np.ndarray, eps: float) -> np.ndarray:
    """x·rsqrt(mean(x²)+eps) over the last axis in the wide dtype, not yet stored: what every RMS norm begins with."""
    wide = ar.widen(x)
    return wide * rsqrt(ar.mean(wide * wide) + ar.wide(eps))


def interpolation(source: np.ndarray, before: int) -> np.ndarray:
    """Linear interpolation of an axis of `before` entries at the positions `source`, as a matrix (len(source), before);
    the edges are clamped."""
    low = np.minimum(source.astype(np.int64), before - 1)
    high = np.minimum(low + 1, before - 1)
    part, rows = source - low, np.arange(len(source))
    matrix = np.zeros((len(source), before))
    np.add.at(matrix, (rows, low), 1.0 - part)
    np.add.at(matrix, (rows, high), part)
    return matrix


def layer_norm(ar: Arithmetic, x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    """LayerNorm over the last axis, biased variance, stored once."""
    centred = x - ar.mean(x)
    return ar.store(centred * rsqrt(ar.mean(centred * centred) + x.dtype.type(eps)) * weight + bias)


def softmax_average(ar: Arithmetic, scores: np.ndarray, keep: np.ndarray | None, values: np.ndarray) -> np.ndarray:
    """Softmax of scores (..., Q, K) over the kept keys, times values (..., K, H), stored -> (..., Q, H).

    keep broadcasts to scores, True = attend. A query that keeps nothing gives exactly 0 (spec §7). Scores and weights
    are float32 in a half-precision run; the weights are stored before they meet the values, as a model must.
    """
    if keep is not None:
        scores = np.where(keep, scores, scores.dtype.type(-np.inf))
    peak = np.max(scores, axis=-1, keepdims=True)
    weights = scores - np.where(np.isfinite(peak), peak, scores.dtype.type(0))
    np.exp(weights, out=weights)  # in place: a tower's scores are the largest array of a pass
    total = np.sum(weights, axis=-1, keepdims=True)
    total = np.where(total > 0, total, scores.dtype.type(1))
    if ar.normalises_late:
        return ar.store(ar.contract(ar.store(weights), values) / total)
    return ar.store(ar.contract(ar.store(weights / total), values))
