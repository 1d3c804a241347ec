"""What an attention is asked for (spec §7): one value that `dispatch` hands to whichever backend computes it.

Dims: B samples, T queries, S keys, N query heads, G key/value heads, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vidi.attention.unpad import Rows

__all__ = ["AttentionCall"]


@dataclass(frozen=True)
class AttentionCall:
    """Softmax attention with grouped heads: query head n reads key/value head n // (N/G). A backend returns (B, T, N, H).

    scale, softcap: score = cap · tanh(q·k·scale / cap), or q·k·scale without a cap.
    q_pos_BT: positions of the queries among the keys (key s stands at position s): query i sees keys up to its own
        position, and with ``window`` at most that many before it (window + 1 keys). None = not causal.
    keep_q, keep_k: kept query and key rows, None = all. Rows of queries that are not kept, and rows that see no key, are
        exactly 0; values in keys that are not kept never matter, not even NaN.
    """

    q_BTNH: Tensor
    k_BSGH: Tensor
    v_BSGH: Tensor
    scale: float
    softcap: float | None = None
    q_pos_BT: Tensor | None = None
    window: int | None = None
    keep_q: Rows | None = None
    keep_k: Rows | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_BTNH, self.k_BSGH, self.v_BSGH

    @property
    def needs_grad(self) -> bool:
        return torch.is_grad_enabled() and any(x.requires_grad for x in self.tensors)
