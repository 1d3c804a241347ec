"""A modality's tokens on their way through the decoder, and the counts that say which rows are real."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Stream"]


@dataclass(frozen=True)
class Stream:
    """Right-padded tokens of one modality.

    x_BLD: float (B, L, D), rows that are not kept exactly 0.
    keep_BL: bool (B, L), True = attend.
    """

    x_BLD: Tensor
    keep_BL: Tensor
