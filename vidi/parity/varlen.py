"""Attention on unpadded rows in plain arithmetic: what a varlen kernel is given and does (spec §9).

The eager backend never unpads, so on a CPU a wrong index would stay unseen. Inside `route` cross-attention gathers kept
rows, cuts them at the cumulative lengths, attends sample by sample, looks at no more rows than the stated maximum, and
scatters back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from vidi.attention import eager, unpad
from vidi.attention.call import AttentionCall

__all__ = ["route"]


@contextlib.contextmanager
def route(unpadded: bool) -> Iterator[None]:
    """Inside, eager cross-attention over a mask runs on unpadded rows (if asked)."""
    plain = eager.attend
    if not unpadded:
        yield
        return

    def attend(call: AttentionCall) -> Tensor:
        if call.q_pos_BT is not None or call.keep_k is None:
            return plain(call)
        samples, queries = call.q_BTNH.shape[:2]
        flat = unpad._unpad_xattn_input(*call.tensors, call.keep_q, call.keep_k)
        cuts_q, cuts_k = flat.cu_seqlens_q.tolist(), flat.cu_seqlens_k.tolist()
        out = torch.zeros_like(flat.q)
        for b in range(samples):
            rows = slice(cuts_q[b], min(cuts_q[b + 1], cuts_q[b] + flat.max_seqlen[0]))
            keys = slice(cuts_k[b], min(cuts_k[b + 1], cuts_k[b] + flat.max_seqlen[1]))
            part = (flat.q[None, rows], flat.k[None, keys], flat.v[None, keys])
            if part[0].shape[1]:
                out[rows] = plain(AttentionCall(*part, call.scale, call.softcap))[0]
        return unpad.pad(out, flat.indices_q, samples, queries)

    eager.attend = attend
    try:
        yield
    finally:
        eager.attend = plain
