"""torch's flex_attention: softcap, masks and grouped heads in one compiled kernel, also in float32 on a GPU (spec §7).

On a CPU it runs uncompiled, with a (T, S) matrix, forward only: for tests.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as nnf
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from vidi.attention import mask
from vidi.attention.unpad import Rows

__all__ = ["COMPILATIONS", "SMALLEST_HEAD", "attend"]

COMPILATIONS = 64  # in one process, before torch refuses another
SMALLEST_HEAD = 16  # of the compiled kernel; columns of zeros change no score

Mod = Callable[..., Tensor]


def attend(
    q_BTNH: Tensor,
    k_BSGH: Tensor,
    v_BSGH: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    keep_q: Rows | None = None,
    keep_k: Rows | None = None,
    q_pos_BT: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """See `dispatch.attend`, and `limits` for dtypes and devices. Raises ValueError for a gradient on a CPU."""
    tensors = (q_BTNH, k_BSGH, v_BSGH)
    on_cpu = q_BTNH.device.type == "cpu"
    if on_cpu and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError("backend 'flex' cannot return gradients on a CPU; 'eager' can, and 'sdpa' without a softcap")
    if keep_k is not None and keep_k.full:
        keep_k = None
    if keep_k is not None:
        # A masked key has weight 0, and 0 · NaN is NaN: what stands in padding must not matter.
        hidden = ~keep_k.keep_BL[:, :, None, None]
        k_BSGH, v_BSGH = k_BSGH.masked_fill(hidden, 0), v_BSGH.masked_fill(hidden, 0)
    blocks = None
    if keep_k is not None or q_pos_BT is not None:
        blocks = flex.create_block_mask(
            _sees(keep_k, q_pos_BT, window),
            q_BTNH.shape[0],
            None,
            q_BTNH.shape[1],
            k_BSGH.shape[1],
            device=q_BTNH.device,
        )
    head_dim = q_BTNH.shape[-1]
    missing = 0 if on_cpu else max(SMALLEST_HEAD - head_dim, 0)
    run: Any = _uncompiled if on_cpu else _compiled()
    # Sizes become symbols after their second value, but a cap or a window must stay a number: a kernel cannot read one from
    # the host. So each dtype, head dim, cap, window and kind of mask is a compilation of its own.
    with torch._dynamo.config.patch(recompile_limit=COMPILATIONS, specialize_int=True, specialize_float=True):
        out = run(
            *(nnf.pad(x, (0, missing)).transpose(1, 2) for x in (q_BTNH, k_BSGH, v_BSGH)),
            score_mod=_capped(softcap),
            block_mask=blocks,
            scale=scale,
            enable_gqa=q_BTNH.shape[2] != k_BSGH.shape[2],
        )
    return mask.zero_rows(out[..., :head_dim].transpose(1, 2), keep_q)


def _sees(keep_k: Rows | None, q_pos_BT: Tensor | None, window: int | None) -> Mod:
    """`mask.sees` and the key mask, for one (sample, head, query, key): what flex_attention compiles."""

    def sees(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        keep = s >= 0 if keep_k is None else keep_k.keep_BL[b, s]
        if q_pos_BT is not None:
            behind = q_pos_BT[b, t] - s
            keep = keep & (behind >= 0)
            if window is not None:
                keep = keep & (behind <= window)
        return keep

    return sees


@functools.cache
def _capped(cap: float | None) -> Mod | None:
    """cap · tanh(score / cap); one function per cap, since another function is another compilation."""
    if cap is None:
        return None

    def capped(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


@functools.cache
def _compiled() -> Any:
    # fullgraph: a graph break would run uncompiled, with a (T, S) matrix, in silence.
    return torch.compile(flex.flex_attention, fullgraph=True)


def _uncompiled(*tensors: Tensor, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")  # here on purpose
        run: Any = flex.flex_attention
        return run(*tensors, **options)
