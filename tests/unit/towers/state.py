"""transformers' names of the towers' tensors -> ours, through the checkpoint's own table."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vidi.checkpoint import names

__all__ = ["audio_state", "vision_state"]


def vision_state(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a SiglipVisionModel, with or without its wrapper's name."""
    return _state(theirs, "model.mm_vis.vision_model.", "vision_model.", "vision_tower.")


def audio_state(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a WhisperEncoder."""
    return _state(theirs, "model.mm_aud.encoder.", "encoder.", "audio_tower.")


def _state(theirs: Mapping[str, Tensor], official: str, wrapper: str, ours: str) -> dict[str, Tensor]:
    found = {}
    for name, value in theirs.items():
        mine = names.our_name(official + name.removeprefix(wrapper))
        assert mine is not None, f"no place for {name}"
        assert mine.startswith(ours)
        found[mine.removeprefix(ours)] = value
    return found
