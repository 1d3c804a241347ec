"""The varlen form of a padded cross-attention's arguments (spec §9), for the record: the oracle attends with masks.

A sample without a kept key has length 0 here. The release marks all its (zero) rows kept instead and gates the result.
"""

import numpy as np

from .case import Trace

__all__ = ["cumulative", "trace_unpadded"]


def cumulative(keep_BL: np.ndarray) -> np.ndarray:
    """Kept tokens of all earlier samples: int32 (B+1), starting at 0."""
    return np.concatenate([[0], np.cumsum(keep_BL.sum(axis=1))]).astype(np.int32)


def trace_unpadded(
    stage: str,
    q_BNTH: np.ndarray,
    k_BNLH: np.ndarray,
    v_BNLH: np.ndarray,
    keep_BT: np.ndarray,
    keep_BL: np.ndarray,
    trace: Trace,
) -> None:
    """Rows of kept positions on one long axis (kept, N, H), their places (flat in B·T), lengths and maxima (q, k)."""
    for name, x_BNLH, keep in (("q", q_BNTH, keep_BT), ("k", k_BNLH, keep_BL), ("v", v_BNLH, keep_BL)):
        trace.put(f"{stage}.{name}", x_BNLH.transpose(0, 2, 1, 3)[keep])
    trace.put(f"{stage}.indices_q", np.flatnonzero(keep_BT).astype(np.int64))
    trace.put(f"{stage}.cu_seqlens_q", cumulative(keep_BT))
    trace.put(f"{stage}.cu_seqlens_k", cumulative(keep_BL))
    longest = [keep_BT.sum(axis=1).max(), keep_BL.sum(axis=1).max()]
    trace.put(f"{stage}.max_seqlen", np.array(longest, np.int64))
