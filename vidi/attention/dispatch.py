"""One door to every attention backend (spec §7)."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from vidi.attention import limits
from vidi.attention.call import AttentionCall
from vidi.attention.unpad import check_query_mask

__all__ = ["BACKENDS", "attend", "check"]

# Imported on use: a backend's library (flash-attn, triton) is needed by those who ask for it alone.
BACKENDS = ("eager", "sdpa", "flash", "flex")


def check(backend: str) -> str:
    """The name itself. Raises ValueError naming the choices."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; choose from {', '.join(BACKENDS)}")
    return backend


def attend(call: AttentionCall, backend: str = "eager") -> Tensor:
    """What ``call`` asks for, (B, T, N, H). ``backend``: one of `BACKENDS`.

    Raises ValueError for a mask that does not fit the queries, for a window without positions, and for a backend that
    cannot do what is asked, naming one that can.
    """
    q = call.q_BTNH
    if call.window is not None and call.q_pos_BT is None:
        raise ValueError("a window needs query positions (q_pos_BT): it limits keys behind the query")
    if call.keep_q is not None and q.shape[1] != 1:
        check_query_mask(call.keep_q.keep_BL, q.shape[1], window=call.window)
    limits.check(check(backend), dtype=q.dtype, device=q.device, head_dim=q.shape[-1], softcap=call.softcap)
    kernel: Any = importlib.import_module(f"vidi.attention.{backend}")
    return kernel.attend(call)
