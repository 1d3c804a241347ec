"""The one hook through which intermediate tensors leave the model.

Stage code calls ``tap(stage_id, tensor)`` where a stage's result exists. The default does nothing; a parity run passes
its own. Repeated calls with one id hand over consecutive parts along axis 0 (the frames of a video in chunks).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["Tap", "no_tap"]

Tap = Callable[[str, Tensor], None]


def no_tap(stage_id: str, value: Tensor) -> None:
    """Keep nothing."""
