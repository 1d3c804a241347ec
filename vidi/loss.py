"""Next-token loss (spec §8), in at least float32."""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from vidi import precision

__all__ = ["IGNORED", "mean_above", "per_token", "shift"]

IGNORED = -100


def shift(labels_BT: Tensor) -> Tensor:
    """Each row moved left by one, its last position ignored."""
    return nnf.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)


def per_token(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross-entropy of every position against the next token: (B·T,), 0 where ignored.

    ``labels_BT``: packed as the text is, not shifted.
    """
    logits = precision.at_least_float32(logits_BTV).flatten(0, 1)
    return nnf.cross_entropy(logits, shift(labels_BT).flatten(), ignore_index=IGNORED, reduction="none")


def mean_above(losses_N: Tensor, labels_BT: Tensor, threshold: float | None = None) -> Tensor:
    """The mean over labelled tokens, or with a threshold τ over the losses above a cut.

    The cut is 0 where every loss is below τ (so ignored tokens fall out), else τ. None left gives NaN, as specified.
    """
    if threshold is None:
        return losses_N.sum() / (shift(labels_BT) != IGNORED).sum()
    cut = torch.where((losses_N < threshold).all(), 0.0, threshold)
    return losses_N[losses_N > cut].mean()
