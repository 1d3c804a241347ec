"""Which packed tokens count (spec §3.8, §4.5): a Boolean keep mask, True = attend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["has_signal", "keep_tokens"]


def has_signal(raw: Sequence[Tensor]) -> Tensor:
    """(B,) bool: is any value of a sample's raw input (frames, or log-mel) non-zero?

    uint8 pixels stand for floats none of which is 0 (`inputs.pixels`), so any frame of them is a signal.
    """
    return torch.stack([torch.tensor(len(x) > 0) if x.dtype == torch.uint8 else (x != 0).any().cpu() for x in raw])


def keep_tokens(packed_BLD: Tensor, signal_B: Tensor) -> Tensor:
    """(B, L) bool: the sum of |x| over D is not 0 and the sample's raw input is not silent.

    A sum of absolute values is 0 exactly where every value is, so no sum is taken.
    """
    return (packed_BLD != 0).any(-1) & signal_B[:, None]
