"""Hidden states to logits, and logits to the loss (spec §8). Dims: B batch, T text tokens, D width, K vocabulary."""

from collections.abc import Mapping

import numpy as np

from .case import Sizes, Trace, Weights
from .casts import Arithmetic
from .decoder import gemma_norm
from .text import IGNORED_LABEL

__all__ = ["logits", "loss"]


def logits(ar: Arithmetic, sizes: Sizes, w: Weights, x_BTD: np.ndarray, trace: Trace) -> np.ndarray:
    """(B, T, K): final GemmaNorm, the embedding as head, cap·tanh(x/cap) in the model's dtype, a store after each."""
    n_BTD = trace.put("final.norm", gemma_norm(ar, x_BTD, w("model.norm.weight"), sizes.norm_eps))
    raw_BTK = ar.linear(n_BTD, w("model.embed_tokens.weight"))
    cap = ar.work(sizes.final_softcap)
    capped_BTK = ar.store(ar.store(np.tanh(ar.store(raw_BTK / cap))) * cap)
    return trace.put("logits", capped_BTK)


def loss(
    logits_BTK: np.ndarray,
    labels_BT: np.ndarray,
    thresholds: Mapping[str, float | None] | None = None,
    *,
    casts: str = "none",
    trace: Trace | None = None,
) -> dict[str, np.ndarray]:
    """Cross-entropy of packed text: {"loss.per_token": (B·T,), "loss.NAME": () for each threshold}.

    labels_BT are `text.labels`: not shifted, -100 ignored. They move left by one within each row; ignored tokens count
    0 per token. thresholds maps a name to τ, or to None for the plain mean (the default, named "none"). With τ: the
    mean of the losses above cut, where cut = 0 if all are below τ, else τ; none left gives NaN. float32, but float64
    with casts="none". trace: passes loss.per_token on, for an anchored run.
    """
    wide = Arithmetic(casts).wide
    targets = np.concatenate([labels_BT[:, 1:], np.full_like(labels_BT[:, :1], IGNORED_LABEL)], axis=1).reshape(-1)
    scores = np.asarray(logits_BTK, dtype=wide).reshape(len(targets), -1)
    peak = scores.max(axis=1)
    log_total = peak + np.log(np.exp(scores - peak[:, None]).sum(axis=1, dtype=wide))
    counted = targets != IGNORED_LABEL
    chosen = scores[np.arange(len(targets)), np.where(counted, targets, 0)]
    per_token = np.where(counted, log_total - chosen, wide(0)).astype(wide)
    result = {"loss.per_token": per_token}
    if trace is not None:
        per_token = trace.put("loss.per_token", per_token).astype(wide)
    for name, threshold in ({"none": None} if thresholds is None else thresholds).items():
        if threshold is None:
            selected = per_token[counted]
        else:
            cut = 0.0 if (per_token < threshold).all() else threshold
            selected = per_token[per_token > cut]
        result[f"loss.{name}"] = np.asarray(selected.mean(dtype=wide) if selected.size else np.nan, dtype=wide)
    return result
