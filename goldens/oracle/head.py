"""What the losses of both models share (spec §8). Dims: N tokens, K vocabulary."""

import numpy as np

__all__ = ["cross_entropy", "mean_above"]


def cross_entropy(scores_NK: np.ndarray, targets_N: np.ndarray) -> np.ndarray:
    """-log softmax at the target, (N,), in the scores' dtype."""
    peak = scores_NK.max(axis=1, initial=-np.inf)
    log_total = peak + np.log(np.exp(scores_NK - peak[:, None]).sum(axis=1, dtype=scores_NK.dtype))
    return log_total - scores_NK[np.arange(len(targets_N)), targets_N]


def mean_above(per_token_N: np.ndarray, counted_N: np.ndarray, threshold: float | None) -> np.ndarray:
    """The mean of the counted losses, or with a threshold τ of those above cut, where cut = 0 if all are below τ, else τ;
    none left gives NaN. Scalar array in the losses' dtype."""
    wide = per_token_N.dtype.type
    if threshold is None:
        selected = per_token_N[counted_N]
    else:
        cut = 0.0 if (per_token_N < threshold).all() else threshold
        selected = per_token_N[per_token_N > cut]
    return np.asarray(selected.mean(dtype=wide) if selected.size else np.nan, dtype=wide)
