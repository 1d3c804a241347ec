"""Next-token loss (spec §8), in at least float32."""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from vidi import precision

__all__ = ["IGNORED", "cross_entropy", "labelled", "mean_above", "mean_of", "per_token", "shift"]

IGNORED = -100


def shift(labels_BT: Tensor) -> Tensor:
    """Each row moved left by one, its last position ignored."""
    return nnf.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)


def labelled(labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Where the next token has a label, (N, 2) row and position, and these labels, (N,)."""
    targets_BT = shift(labels_BT)
    places_N2 = (targets_BT != IGNORED).nonzero()
    return places_N2, targets_BT[places_N2[:, 0], places_N2[:, 1]]


def per_token(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross-entropy of every position against the next token: (B·T,), 0 where ignored.

    ``labels_BT``: packed as the text is, not shifted.
    """
    return cross_entropy(logits_BTV.flatten(0, 1), shift(labels_BT).flatten())


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Of each row, (N,), 0 where the target is ignored."""
    logits_NV = precision.at_least_float32(logits_NV)
    return nnf.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="none")


def mean_above(losses_N: Tensor, labels_BT: Tensor, threshold: float | None = None) -> Tensor:
    """The mean over labelled tokens, or with a threshold τ over the losses above a cut.

    The cut is 0 where every loss is below τ (so ignored tokens fall out), else τ. None left gives NaN, as specified.
    """
    return mean_of(losses_N[shift(labels_BT).flatten() != IGNORED], threshold)


def mean_of(losses_N: Tensor, threshold: float | None = None) -> Tensor:
    """As `mean_above`, of labelled tokens alone."""
    if threshold is None:
        return losses_N.mean()
    cut = torch.where((losses_N < threshold).all(), 0.0, threshold)
    return losses_N[losses_N > cut].mean()
