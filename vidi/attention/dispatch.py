"""One signature for every attention backend (spec §7).

Dims: B samples, T queries, S keys, N query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from vidi.attention import limits
from vidi.attention.unpad import Rows, check_query_mask

__all__ = ["BACKENDS", "attend", "check"]

# Imported on use: a backend's library (flash-attn, triton) is needed by those who ask for it alone.
BACKENDS = ("eager", "sdpa", "flash", "flex")


def check(backend: str) -> str:
    """The name itself. Raises ValueError naming the choices."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; choose from {', '.join(BACKENDS)}")
    return backend


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
    backend: str = "eager",
) -> Tensor:
    """Softmax attention with grouped heads: query head n reads key/value head n // (N/G). Returns (B, T, N, H).

    scale, softcap: score = cap · tanh(q·k·scale / cap), or q·k·scale without a cap.
    keep_q, keep_k: kept query and key rows, None = all. Rows of queries that are not kept, and rows that see no key, are
        exactly 0; values in keys that are not kept never matter, not even NaN.
    q_pos_BT: positions of the queries among the keys (key s stands at position s): query i sees keys up to its own
        position, and with ``window`` at most that many before it (window + 1 keys). None = not causal.
    backend: one of `BACKENDS`; one that cannot do what is asked raises ValueError and names one that can.
    """
    if window is not None and q_pos_BT is None:
        raise ValueError("a window needs query positions (q_pos_BT): it limits keys behind the query")
    if keep_q is not None and q_BTNH.shape[1] != 1:
        check_query_mask(keep_q.keep_BL, q_BTNH.shape[1], window=window)
    limits.check(check(backend), dtype=q_BTNH.dtype, device=q_BTNH.device, head_dim=q_BTNH.shape[-1], softcap=softcap)
    kernel: Any = importlib.import_module(f"vidi.attention.{backend}")
    return kernel.attend(
        q_BTNH,
        k_BSGH,
        v_BSGH,
        scale=scale,
        softcap=softcap,
        keep_q=keep_q,
        keep_k=keep_k,
        q_pos_BT=q_pos_BT,
        window=window,
    )
