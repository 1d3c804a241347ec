"""Steps of a forward pass in NumPy float32, each rounded wherever the specification rounds (§5-§8). The twins of stages are
made of them (`rounded.py`, `rounded_towers.py`).

``to`` rounds float32 or float64 to the run's dtype, as float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidi.decoder.norm import PlainNorm

__all__ = [
    "Array", "Round", "as_numpy", "attend", "bridge_norm", "gelu_erf", "gelu_tanh", "layer_norm", "linear", "norm", "rms",
    "rotate", "silu",
]  # fmt: skip

Array = np.ndarray
Round = Callable[[Array], Array]


def as_numpy(x: Tensor) -> Array:
    return x.detach().cpu().float().numpy()


def rms(x: Array, eps: float) -> Array:
    """float32, not rounded."""
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float32) + np.float32(eps))


def bridge_norm(x: Array, weight: Array, to: Round) -> Array:
    return to(weight * to(rms(x, 1e-5)))


def norm(x: Array, module: Any, to: Round) -> Array:
    """Of the decoder: Gemma's rounds once, Mistral's before the weight too."""
    if isinstance(module, PlainNorm):
        return to(as_numpy(module.weight) * to(rms(x, module.eps)))
    return to(rms(x, module.eps) * (1 + as_numpy(module.weight)))


def layer_norm(x: Array, module: Any, to: Round) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return to(rms(centred, module.eps) * as_numpy(module.weight) + as_numpy(module.bias))


def linear(x: Array, module: Any, to: Round, late: bool = False) -> Array:
    """Also a convolution, whose windows the rows of x are. The bias is added before the one rounding; late: after a first."""
    y = x @ as_numpy(module.weight.flatten(1)).T
    return to(y if module.bias is None else (to(y) if late else y) + as_numpy(module.bias))


def attend(
    q: Array, k: Array, v: Array, to: Round, scale: float, cap: float | None, keep: Array | None = None
) -> Array:
    """(B, T, N, H) each, heads repeated; keep (B, T, S): scores, softcap, softmax in float32, one rounding at the end."""
    scores = np.einsum("btnh,bsnh->bnts", q, k) * np.float32(scale)
    if cap is not None:
        scores = cap * np.tanh(scores / np.float32(cap))
    if keep is not None:
        scores = np.where(keep[:, None], scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    return to(np.einsum("bnts,bsnh->btnh", weights / np.where(total == 0, 1, total), v).astype(np.float32))


def rotate(x: Array, cos: Array, sin: Array, to: Round) -> Array:
    first, second = np.split(x, 2, -1)
    turned = np.concatenate((-second, first), -1)
    return to(to(x * cos[:, :, None]) + to(turned * sin[:, :, None]))


def gelu_tanh(x: Array) -> Array:
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (1 + np.tanh(inner))


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def gelu_erf(x: Array) -> Array:
    erf = torch.erf(torch.from_numpy(x / np.float32(math.sqrt(2)))).numpy()
    return x * np.float32(0.5) * (1 + erf)
