"""Reading safetensors files that someone else wrote, as NumPy arrays."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

from stageparity import strict
from stageparity.strict import Refused

__all__ = ["read_header", "read_safetensors"]

MAX_BYTES = 8 << 30
_MAX_HEADER = 64 << 20


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """All tensors of a file, opened as by `strict.open_file`. Raises Missing, and Refused for what cannot be read."""
    read_header(path)
    raw = strict.read_bytes(path, limit=MAX_BYTES)
    try:
        return load(raw)
    except Exception as error:  # the library's errors share no base class
        raise Refused(f"no readable safetensors file ({strict.reason(error)})", file=path) from None


def read_header(path: str | Path, *, inside: str | Path | None = None) -> dict[str, Any]:
    """The header, bounded as `strict.parse_json` bounds JSON. Raises as `read_safetensors`, also for a file whose size is not
    what its header tells of: gigabytes of nothing are not read."""
    with strict.open_file(path, limit=MAX_BYTES, inside=inside) as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise Refused("no readable safetensors file (its header has no length)", file=path)
        text = b""
        while len(text) < length and (part := file.read(length - len(text))):
            text += part
    try:
        header: dict[str, Any] = strict.parse_json(text)
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        told = 8 + length + max((int(entry["data_offsets"][1]) for entry in entries), default=0)
    except Exception as error:  # whatever a header may hold
        raise Refused(f"no readable safetensors file ({strict.reason(error)})", file=path) from None
    if told != size:
        raise Refused(f"no readable safetensors file ({size:,} bytes, its header tells of {told:,})", file=path)
    return header
