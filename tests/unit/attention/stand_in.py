"""flash-attn's three functions in plain torch, by their documentation, so that the ways into them are tested on a CPU.

What real kernels do is tested in tests/gpu. Here: alignment of causal masks at the bottom right, windows, cached lengths,
cumulative lengths; and which entry was taken (`calls`).
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

__all__ = ["library"]


def library() -> tuple[types.ModuleType, list[str]]:
    """A module like flash_attn, and the list that its calls are noted in."""
    calls: list[str] = []
    module = types.ModuleType("flash_attn")

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, deterministic: bool, **options: Any) -> Tensor:
        calls.append("dense")
        return torch.stack([_one(q[b], k[b], v[b], **options) for b in range(len(q))])

    def flash_attn_with_kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor | None, **options: Any
    ) -> Tensor:
        calls.append("kv-cache")
        assert not (torch.is_grad_enabled() and q.requires_grad), "the kv-cache entry has no backward"
        assert cache_seqlens is None or cache_seqlens.dtype == torch.int32
        lengths = [k_cache.shape[1]] * len(q) if cache_seqlens is None else cache_seqlens.tolist()
        return torch.stack([_one(q[b], k_cache[b, :n], v_cache[b, :n], **options) for b, n in enumerate(lengths)])

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        deterministic: bool,
        **options: Any,
    ) -> Tensor:
        calls.append("varlen")
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert (max_seqlen_q, max_seqlen_k) == (max(lengths_q), max(lengths_k))
        parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
        return torch.cat([_one(*part, **options) for part in parts])

    for function in (flash_attn_func, flash_attn_with_kvcache, flash_attn_varlen_func):
        setattr(module, function.__name__, function)
    return module, calls


def _one(
    q_TNH: Tensor,
    k_SGH: Tensor,
    v_SGH: Tensor,
    *,
    softmax_scale: float,
    softcap: float,
    causal: bool,
    window_size: tuple[int, int],
) -> Tensor:
    queries, keys = len(q_TNH), len(k_SGH)
    shared = q_TNH.shape[1] // k_SGH.shape[1]
    k, v = k_SGH.repeat_interleave(shared, 1), v_SGH.repeat_interleave(shared, 1)
    scores = torch.einsum("tnh,snh->nts", q_TNH, k) * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    left, right = window_size
    at = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)
    keep = torch.ones(queries, keys, dtype=torch.bool)
    if causal or right >= 0:
        keep &= key <= at + max(right, 0)
    if left >= 0:
        keep &= key >= at - left
    weights = scores.masked_fill(~keep, -1e300).softmax(-1).masked_fill(~keep, 0)
    return torch.einsum("nts,snh->tnh", weights, v)
