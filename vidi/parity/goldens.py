"""Where the goldens lie, and the table of position frequencies that is one of them. No torch, no model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from stageparity import store

__all__ = ["goldens_dir", "position_table"]


def goldens_dir(given: str | Path | None = None) -> Path:
    """The golden folder: the given one, the packaged `vidi/goldens`, or `goldens/` beside the package. Raises GoldenError."""
    package = Path(__file__).resolve().parents[1]
    return store.goldens_dir(*([given] if given is not None else [package / "goldens", package.parent / "goldens"]))


def position_table(width: int, goldens: Path | None = None) -> np.ndarray | None:
    """The stored table of position frequencies for decoder width ``width``, (width / 2,) float32; None where none is.

    One ulp of it is 6e-4 rad at the far end of time, and torch's exp differs between processors, so every run computes
    with the stored one (spec §5).
    """
    path = (goldens or goldens_dir()) / "pos_freq.safetensors"
    return load_file(path).get(str(width)) if path.is_file() else None
