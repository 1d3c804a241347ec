"""The one hook through which intermediate tensors leave the model, and through which others may take their place.

Stage code says ``x = tap(stage_id, x)`` where a stage's result exists, and goes on with what comes back. The default gives
back what it is given; a parity run passes its own, which keeps the tensor, or returns a golden one to force the run.
Repeated calls with one id hand over consecutive parts along axis 0 (the frames of a video in chunks).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["Tap", "no_tap"]

Tap = Callable[[str, Tensor], Tensor]  #: stage id, tensor -> the tensor to go on with: same shape, dtype and device


def no_tap(stage_id: str, value: Tensor) -> Tensor:
    """Keep nothing, change nothing."""
    return value
