"""Attention on unpadded rows in plain arithmetic: what a varlen kernel is given and does (spec §9).

The eager backend never unpads, so on a CPU a wrong index would stay unseen. Inside `route` cross-attention gathers kept
rows, cuts them at the cumulative lengths, attends sample by sample, looks at no more rows than the stated maximum, and
scatters back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vidi.attention import eager, unpad

__all__ = ["route"]


@contextlib.contextmanager
def route(unpadded: bool) -> Iterator[None]:
    """Inside, eager cross-attention over a mask runs on unpadded rows (if asked)."""
    plain = eager.attend
    if not unpadded:
        yield
        return

    def attend(q_BTNH: Tensor, k_BSGH: Tensor, v_BSGH: Tensor, *, scale: float, **options: Any) -> Tensor:
        keep_k = options.get("keep_k")
        if options.get("q_pos_BT") is not None or keep_k is None:
            return plain(q_BTNH, k_BSGH, v_BSGH, scale=scale, **options)
        samples, queries = q_BTNH.shape[:2]
        flat = unpad._unpad_xattn_input(q_BTNH, k_BSGH, v_BSGH, options.get("keep_q"), keep_k)
        cuts_q, cuts_k = flat.cu_seqlens_q.tolist(), flat.cu_seqlens_k.tolist()
        out = torch.zeros_like(flat.q)
        for b in range(samples):
            rows = slice(cuts_q[b], min(cuts_q[b + 1], cuts_q[b] + flat.max_seqlen[0]))
            keys = slice(cuts_k[b], min(cuts_k[b + 1], cuts_k[b] + flat.max_seqlen[1]))
            part = (flat.q[None, rows], flat.k[None, keys], flat.v[None, keys])
            if part[0].shape[1]:
                out[rows] = plain(*part, scale=scale, softcap=options.get("softcap"))[0]
        return unpad.pad(out, flat.indices_q, samples, queries)

    eager.attend = attend
    try:
        yield
    finally:
        eager.attend = plain
