"""A run's chained tensors as safetensors files, for comparing elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

__all__ = ["Dump"]


class Dump:
    """Writes DIR/CASE.safetensors, each whole or not at all. Raises ValueError where two cases share a name."""

    def __init__(self, folder: Path, cases: Sequence[str]) -> None:
        twice = sorted({name for name in cases if list(cases).count(name) > 1})
        if twice:
            raise ValueError(f"two sets hold a case named {', '.join(twice)}: choose one with --case SET/NAME")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def write(self, case: str, tensors: Mapping[str, Tensor]) -> None:
        """All stages under their ids; a decoding case as `V.nocache.logits`."""
        path = self.folder / f"{case}.safetensors"
        part = path.with_suffix(".part")
        try:
            save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, part)
            os.replace(part, path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise ValueError(f"{path} cannot be written ({error.strerror})") from None
