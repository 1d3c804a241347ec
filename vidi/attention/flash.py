"""flash-attn 2: half precision on a GPU, with softcap, windows and grouped heads (spec §7, §9).

Three of its entries, each where the others cannot go:

    kv-cache   no gradient, kept keys first in each sample. Few queries over long keys: it splits the keys over the whole
               GPU, which varlen does not (8 times slower at 30 queries over 60,000 keys). Lengths come from device
               memory, so that nothing waits for the host and a CUDA graph can hold a decoding step.
    varlen     kept rows gathered on one axis by `unpad._unpad_xattn_input`: holes, and padding under a gradient. Rows
               that are not kept never reach the kernel.
    dense      a gradient and no padding.

Causal masks of flash-attn stand at the bottom right: the last query sees the last key. Positions among the keys that rise
by one in each row say the same with a key length of (last position + 1).

Gradients are repeatable where `torch.use_deterministic_algorithms` is on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vidi.attention import mask, unpad
from vidi.attention.call import AttentionCall
from vidi.attention.unpad import Rows

__all__ = ["attend"]


def attend(call: AttentionCall) -> Tensor:
    """(B, T, N, H); see `limits` for dtypes, devices and head dims.

    Raises ValueError for positions that do not rise by one, for padded keys of causal attention whose mask is not the
    queries' own, for a window over holes, and for a gradient through cached keys; ImportError without flash-attn.
    """
    queries, keys = call.q_BTNH.shape[1], call.k_BSGH.shape[1]
    keep_q, keep_k, q_pos_BT, needs_grad = call.keep_q, call.keep_k, call.q_pos_BT, call.needs_grad
    causal = q_pos_BT is not None
    padded_k = keep_k is not None and not (keep_k.full if causal or needs_grad else keep_k.prefix)
    padded_q = needs_grad and queries > 1 and keep_q is not None and not keep_q.full
    options: dict[str, Any] = {
        "softmax_scale": call.scale,
        "softcap": call.softcap or 0.0,
        "causal": causal,
        # (left, right); with an open left side flash-attn closes the right one itself, and may then pack grouped heads.
        "window_size": (-1, -1) if call.window is None else (call.window, 0),
    }

    if q_pos_BT is not None:
        rising, whole = _order(q_pos_BT, keys)
        if not rising:
            raise _refusal("attend from positions that do not rise by one within a row")
        if padded_k or padded_q or needs_grad:
            if not whole:
                raise _refusal("mask padded keys, or return gradients, where the queries are only a part of the keys")
            if (padded_k or padded_q) and not _same(keep_q, keep_k):
                raise _refusal("give queries and keys of causal attention different masks")
            if padded_k and call.window is not None and keep_k is not None and not keep_k.prefix:
                raise _refusal("apply a window across holes in the keys")

    if padded_k or padded_q:
        return _varlen(call, options)
    flash_attn = _library()
    if needs_grad:
        out = flash_attn.flash_attn_func(*call.tensors, deterministic=_deterministic(), **options)
    else:
        lengths_B = None
        if q_pos_BT is not None:
            lengths_B = (q_pos_BT[:, -1] + 1).to(torch.int32)
        elif keep_k is not None:
            lengths_B = keep_k.lengths_B
        out = flash_attn.flash_attn_with_kvcache(*call.tensors, cache_seqlens=lengths_B, **options)
    return mask.zero_rows(out, keep_q)


def _varlen(call: AttentionCall, options: dict[str, Any]) -> Tensor:
    q, k, v = call.tensors
    samples, queries = q.shape[:2]
    keep_k = Rows.all_kept(samples, k.shape[1], k.device) if call.keep_k is None else call.keep_k
    rows = unpad._unpad_xattn_input(q, k, v, call.keep_q, keep_k)
    if 0 in rows.max_seqlen:  # no kernel for an empty axis: every row is 0
        return q.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0)
    out = _library().flash_attn_varlen_func(
        rows.q,
        rows.k,
        rows.v,
        rows.cu_seqlens_q,
        rows.cu_seqlens_k,
        *rows.max_seqlen,
        deterministic=_deterministic(),
        **options,
    )
    return unpad.pad(out, rows.indices_q, samples, queries)


# Positions are one tensor per forward, read by every layer: the host asks the device once, not once a layer.
_orders: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _order(q_pos_BT: Tensor, keys: int) -> tuple[bool, bool]:
    """Do positions rise by one within each row? Are they those of all keys, 0 … keys - 1?"""
    queries = q_pos_BT.shape[1]
    if queries == 1:
        return True, keys == 1
    if q_pos_BT not in _orders:
        rising = (q_pos_BT.diff(dim=1) == 1).all()
        _orders[q_pos_BT] = tuple(torch.stack([rising, (q_pos_BT[:, 0] == 0).all()]).tolist())
    rising, from_zero = _orders[q_pos_BT]
    return rising, rising and from_zero and queries == keys


def _same(a: Rows | None, b: Rows | None) -> bool:
    return a is b or (a is not None and b is not None and a.keep_BL is b.keep_BL)


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def _refusal(what: str) -> ValueError:
    return ValueError(f"backend 'flash' cannot {what}; 'eager' and 'flex' can")


def _library() -> Any:
    # find_spec("flash_attn") is also true for flash-attn 4, which has other functions: only an import tells.
    try:
        from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"backend 'flash' needs flash-attn 2 (2.8.3 or later): pip install 'vidi-parity[flash]'. Import failed: {error}"
        ) from error
    import flash_attn

    return flash_attn
