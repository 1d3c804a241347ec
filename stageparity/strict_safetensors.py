"""Reading safetensors files that someone else wrote, as NumPy arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load

from stageparity import strict
from stageparity.strict import Refused

__all__ = ["read_safetensors"]

MAX_BYTES = 8 << 30


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """All tensors of a file, opened as by `strict.open_file`. Raises Missing, and Refused for what cannot be read."""
    raw = strict.read_bytes(path, limit=MAX_BYTES)
    try:
        return load(raw)
    except Exception as error:  # the library's errors share no base class
        raise Refused(f"no readable safetensors file ({strict.reason(error)})", file=path) from None
