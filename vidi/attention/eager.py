"""Attention as the formula says it: the readable truth for every other backend (spec §7).

Scores, softcap and softmax in at least float32. Keys pass in chunks with a running maximum, so that 60,000 keys need no
(T, S) matrix; with one chunk this is the plain softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidi import precision
from vidi.attention import mask
from vidi.attention.call import AttentionCall

__all__ = ["KEY_CHUNK", "attend", "softcapped"]

KEY_CHUNK = 8192


def softcapped(scores: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(scores / cap); the scores themselves where there is no cap."""
    return scores if cap is None else cap * torch.tanh(scores / cap)


def attend(call: AttentionCall) -> Tensor:
    """(B, T, N, H); serves every call."""
    samples, queries, heads, head_dim = call.q_BTNH.shape
    keys, groups = call.k_BSGH.shape[1:3]
    keep_k, work = call.keep_k, precision.promoted(call.q_BTNH.dtype)
    # Query head n reads key/value head n // (N/G): split N into (G, N/G).
    q = call.q_BTNH.to(work).unflatten(2, (groups, heads // groups))
    top = q.new_full((samples, groups, heads // groups, queries, 1), -torch.inf)
    total = torch.zeros_like(top)
    out = q.new_zeros(samples, groups, heads // groups, queries, head_dim)
    for start in range(0, keys, KEY_CHUNK):
        part = slice(start, min(start + KEY_CHUNK, keys))
        k, v = call.k_BSGH[:, part].to(work), call.v_BSGH[:, part].to(work)
        keep = None  # (B, T or 1, S')
        if keep_k is not None and not keep_k.full:
            keep = keep_k.keep_BL[:, None, part]
            # A masked key has weight 0, and 0 · NaN is NaN: what stands in padding must not matter.
            v = v.masked_fill(~keep_k.keep_BL[:, part, None, None], 0)
        if call.q_pos_BT is not None:
            sees = mask.sees(call.q_pos_BT, torch.arange(part.start, part.stop, device=q.device), call.window)
            keep = sees if keep is None else keep & sees
        scores = softcapped(torch.einsum("btgrh,bsgh->bgrts", q, k) * call.scale, call.softcap)
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None, None], -torch.inf)
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        # A row that has seen no key yet has maximum -inf; shifting by 0 keeps exp(-inf) = 0 instead of NaN.
        shift = new_top.masked_fill(new_top.isneginf(), 0)
        weights = torch.exp(scores - shift)
        fade = torch.exp(top - shift)
        total = total * fade + weights.sum(-1, keepdim=True)
        out = out * fade + torch.einsum("bgrts,bsgh->bgrth", weights, v)
        top = new_top
    out = out / total.masked_fill(total == 0, 1)  # no key at all: 0 / 1, exactly 0
    out_BTNH = out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(call.q_BTNH.dtype)
    return mask.zero_rows(out_BTNH, call.keep_q)
