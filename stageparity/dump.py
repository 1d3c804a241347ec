"""A run's chained tensors as safetensors files, for comparing elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from stageparity import atomic
from stageparity.arrays import to_numpy

__all__ = ["Dump"]


class Dump:
    """Writes DIR/CASE.safetensors, each whole or not at all; bfloat16 as float32. bytes: written so far.

    Raises ValueError where two cases share a name.
    """

    def __init__(self, folder: Path, cases: Sequence[str]) -> None:
        twice = sorted({name for name in cases if list(cases).count(name) > 1})
        if twice:
            raise ValueError(f"two sets hold a case named {', '.join(twice)}: choose one with --case SET/NAME")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.bytes = folder, 0

    def write(self, case: str, tensors: Mapping[str, Any]) -> None:
        """All stages under their ids. Raises OSError."""
        path = self.folder / f"{case}.safetensors"
        data = save({name: np.ascontiguousarray(to_numpy(x)[0]) for name, x in tensors.items()})
        atomic.write_bytes(path, data)
        self.bytes += len(data)
