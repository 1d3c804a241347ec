"""Attention written down twice more: one query at a time in NumPy float64, and a naive half-precision model in torch.

Neither shares a line with `vidi.attention`. Dims: B samples, T queries, S keys, N query heads, G key/value heads, H dim.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["attention", "fused", "rounded"]


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    scale: float,
    softcap: float | None = None,
    keep_q: np.ndarray | None = None,
    keep_k: np.ndarray | None = None,
    q_pos: np.ndarray | None = None,
    window: int | None = None,
) -> np.ndarray:
    """(B, T, N, H) float64, by the definition: for each query the list of keys that it sees, then a softmax over them."""
    out = np.zeros(q.shape)
    samples, queries, heads, _ = q.shape
    shared = heads // k.shape[2]
    for b in range(samples):
        for t in range(queries):
            if keep_q is not None and queries > 1 and not keep_q[b, t]:
                continue
            seen = [s for s in range(k.shape[1]) if keep_k is None or keep_k[b, s]]
            if q_pos is not None:
                at = q_pos[b, t]
                seen = [s for s in seen if s <= at and (window is None or s >= at - window)]
            if not seen:
                continue
            for n in range(heads):
                scores = k[b, seen, n // shared] @ q[b, t, n] * scale
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights @ v[b, seen, n // shared] / weights.sum()
    return out


def rounded(
    q_BTNH: Tensor,
    k_BSGH: Tensor,
    v_BSGH: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    keep_BTS: Tensor | None = None,
) -> Tensor:
    """What a naive model of the inputs' dtype computes: scores and softmax in float32, weights stored in the dtype.

    Its error against float64 is the unit that a kernel's error is measured in. ``keep_BTS`` broadcasts; a row that keeps
    no key gives 0. Differentiable.
    """
    shared = q_BTNH.shape[2] // k_BSGH.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BSGH, v_BSGH))
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = q.float() @ k.float().transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if keep_BTS is not None:
        scores = scores.masked_fill(~keep_BTS[:, None], -1e30)
    weights = scores.softmax(-1)
    if keep_BTS is not None:
        weights = weights.masked_fill(~keep_BTS[:, None], 0)
    return (weights.to(v.dtype) @ v).transpose(1, 2)


def fused(
    q_BTNH: Tensor,
    k_BSGH: Tensor,
    v_BSGH: Tensor,
    d_out_BTNH: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    keep_BTS: Tensor | None = None,
) -> list[Tensor]:
    """Output and gradients of q, k and v by the formula of fused kernels, which keep no weights: a score's gradient is
    weight · (dOut·v - dOut·out). Where a query sees one key the two are equal, and what is left is their rounding."""
    groups = k_BSGH.shape[2]
    q, d_out = (x.transpose(1, 2).unflatten(1, (groups, -1)) for x in (q_BTNH, d_out_BTNH))
    k, v = (x.transpose(1, 2)[:, :, None] for x in (k_BSGH, v_BSGH))
    scores = q @ k.mT * scale
    slope = torch.ones_like(scores)
    if softcap is not None:
        bent = torch.tanh(scores / softcap)
        scores, slope = softcap * bent, 1 - bent * bent
    if keep_BTS is not None:
        scores = scores.masked_fill(~keep_BTS[:, None, None], -1e30)
    weights = scores.softmax(-1)
    if keep_BTS is not None:
        weights = weights.masked_fill(~keep_BTS[:, None, None], 0)
    out = weights @ v
    d_scores = weights * (d_out @ v.mT - (d_out * out).sum(-1, keepdim=True)) * slope * scale
    d_k, d_v = ((x.mT @ y).sum(2).transpose(1, 2) for x, y in ((d_scores, q), (weights, d_out)))
    return [out.flatten(1, 2).transpose(1, 2), (d_scores @ k).flatten(1, 2).transpose(1, 2), d_k, d_v]
