"""Which keys a query of self-attention sees (spec §7), as a Boolean mask, True = attend."""

from __future__ import annotations

from torch import Tensor

from vidi.attention.unpad import Rows

__all__ = ["sees", "zero_rows"]


def sees(q_pos_BT: Tensor, k_pos_S: Tensor, window: int | None = None) -> Tensor:
    """(B, T), (S,) positions -> (B, T, S) bool: causal, and at most ``window`` keys before the query itself.

    A window w keeps w + 1 keys. Six positions, w = 2:

        1 . . . . .
        1 1 . . . .
        1 1 1 . . .
        . 1 1 1 . .
        . . 1 1 1 .
        . . . 1 1 1
    """
    behind = q_pos_BT[:, :, None] - k_pos_S
    keep = behind >= 0
    return keep if window is None else keep & (behind <= window)


def zero_rows(out_BTNH: Tensor, keep_q: Rows | None) -> Tensor:
    """Rows of queries that are not kept, exactly 0. A single query row (decoding) is always kept (§9)."""
    if keep_q is None or out_BTNH.shape[1] == 1 or keep_q.full:
        return out_BTNH
    return out_BTNH.masked_fill(~keep_q.keep_BL[:, :, None, None], 0)
