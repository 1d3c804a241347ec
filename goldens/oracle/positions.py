"""Where a token stands along an axis, as a vector of the decoder's width; and the norm without weight (spec §5)."""

import numpy as np

from .case import Weights
from .casts import Arithmetic
from .pointwise import fused, gelu_erf, gelu_erf_float32, normed

__all__ = ["bridge_norm", "position_embedding", "rms"]

EPS = 1e-5


def rms(ar: Arithmetic, x: np.ndarray) -> np.ndarray:
    """x·rsqrt(mean(x²)+1e-5) over the last axis, in float32, stored."""
    return ar.store(normed(ar, x, EPS).astype(ar.work))


def bridge_norm(ar: Arithmetic, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """weight · rms(x): the product is in the activations' dtype, unlike GemmaNorm's."""
    return ar.store(weight * rms(ar, x))


def position_embedding(
    ar: Arithmetic, w: Weights, module: str, length: int, span: int, freq: np.ndarray, noise: np.ndarray | None
) -> np.ndarray:
    """The MLP's output (length, D), stored, before rms(). `span` is P, so positions run over 0 … P-1 whatever the
    length; `freq` (D/2) is the stored table `pos.freq`; `noise` (length) is training's, already clamped to ±0.45.

    A length of 1 stands at position 0 (§10; the release refuses it).
    """
    steps = np.arange(length, dtype=ar.wide)
    if noise is not None:
        if noise.shape != (length,):
            raise ValueError(f"position noise for {module} has shape {noise.shape}, the axis has length {length}")
        steps = np.clip(steps + ar.widen(noise), 0, length - 1).astype(ar.wide)
    positions = steps / ar.wide(max(length - 1, 1)) * ar.wide(span - 1)
    angles = positions[:, None] * ar.widen(freq)[None, :]
    # sin and cos of the angle as it stands, correctly rounded: vendors' float32 versions stay within one ulp of this
    exact = angles.astype(np.float64)
    table = np.stack([np.sin(exact), np.cos(exact)], axis=-1).reshape(length, -1).astype(ar.wide)
    hidden = _wide_linear(ar, w, module + "mlp.0.", table)
    hidden = gelu_erf(hidden) if ar.wide is np.float64 else gelu_erf_float32(hidden)
    return ar.store(_wide_linear(ar, w, module + "mlp.2.", hidden).astype(ar.work))


def _wide_linear(ar: Arithmetic, w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    """Linear in the wide dtype. In float32 the sum runs along the inputs with fused multiply-adds and the bias comes
    last: the order of the recordings' machine, like the sum inside `Arithmetic.mean`."""
    weight, bias = w.wide(name + "weight"), w.wide(name + "bias")
    if ar.wide is np.float64 or ar.order_seed is not None:
        return ar.contract(x, weight.T) + bias
    total = np.zeros((len(x), len(weight)), np.float32)
    for k in range(x.shape[1]):
        total = fused(x[:, k, None], weight[None, :, k], total)
    return total + bias
