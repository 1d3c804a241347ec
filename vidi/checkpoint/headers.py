"""Strict reader of safetensors headers and of the JSON files beside them, through the opener of foreign files.

A safetensors file is 8 bytes (little-endian length n), n bytes of JSON, then the tensors' bytes back to back. This
reader accepts exactly that: the tensors cover the data without gap or overlap, sizes follow from dtype and shape, no
key appears twice. It never reads tensor data, and never more than MAX_JSON_BYTES.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from stageparity import strict
from vidi.checkpoint.errors import CheckpointError, refusals

__all__ = ["ITEM_BYTES", "MAX_JSON_BYTES", "SYNTHETIC", "Entry", "Shard", "read_json", "read_shard", "safe_file"]

MAX_JSON_BYTES = strict.MAX_JSON_BYTES  # the full-size model needs 0.2 MB in one header and 0.14 MB in its index
MAX_AXES = 8
SYNTHETIC = "vidi_synthetic"  # the key in __metadata__ under which made-up weights say so
_PICKLE_STARTS = {b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"}

ITEM_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E5M2FNUZ": 1, "F8_E4M3FNUZ": 1},
    **{"U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8},
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored tensor: its bytes are ``[start, stop)`` of the file ``path``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its tensors in file order; ``synthetic`` says of made-up weights how they were made."""

    path: Path
    tensors: Mapping[str, Entry]
    file_bytes: int
    synthetic: str | None = None


def safe_file(folder: Path, name: str) -> Path | None:
    """``folder/name``, None where no such file exists, refused unless it is a regular file inside the folder or, as
    the Hugging Face cache lays them out, in the ``blobs`` folder beside ``snapshots``."""
    with refusals():
        return None if strict.locate(folder, name, hub_cache=True) is None else folder / name


def read_json(path: Path, *, of_tensors: bool = False) -> dict[str, Any]:
    """A JSON object of at most MAX_JSON_BYTES, see `strict.parse_json`. of_tensors: its keys are tensors' names."""
    with refusals(of_tensors=of_tensors):
        return strict.read_json(path, limit=MAX_JSON_BYTES, hub_cache=True)


def read_shard(path: Path) -> Shard:
    """Read and validate the header of one safetensors file. Raises CheckpointError naming file and tensor."""
    with refusals(), strict.open_file(path, hub_cache=True) as file:
        file_bytes = os.fstat(file.fileno()).st_size
        header = _read_header(file, path, file_bytes)
    with refusals(of_tensors=True):
        fields = strict.parse_json(header, file=path)
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("__metadata__ is no map of strings", file=path)
    data_start = 8 + len(header)
    entries = [_entry(name, field, path, data_start) for name, field in fields.items()]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    _check_coverage(entries, path, data_start, file_bytes)
    return Shard(path, {entry.name: entry for entry in entries}, file_bytes, metadata.get(SYNTHETIC))


def _read_header(file: BinaryIO, path: Path, file_bytes: int) -> bytes:
    try:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{file_bytes} bytes are no safetensors file; truncated?", file=path)
        length = int.from_bytes(prefix, "little")
        if length > file_bytes - 8 and (prefix[:4] == b"PK\x03\x04" or prefix[:2] in _PICKLE_STARTS):
            raise CheckpointError("is a pickle under a safetensors name; never unpickled, refused", file=path)
        if length > file_bytes - 8:
            text = f"header of {length:,} bytes in a file of {file_bytes:,}: truncated or no safetensors file"
            raise CheckpointError(text, file=path)
        if length > MAX_JSON_BYTES:
            raise CheckpointError(f"header of {length:,} bytes; at most {MAX_JSON_BYTES:,} are read", file=path)
        header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot be read ({strict.reason(error)})", file=path) from None
    if len(header) != length or header[:1] != b"{":
        raise CheckpointError("the header is no JSON object; damaged, or no safetensors file", file=path)
    return header


def _entry(name: str, field: Any, path: Path, data_start: int) -> Entry:
    def refuse(problem: str) -> NoReturn:
        raise CheckpointError(problem, file=path, tensor=name)

    if not isinstance(field, dict) or field.keys() != {"dtype", "shape", "data_offsets"}:
        refuse("a header entry has exactly dtype, shape and data_offsets")
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        refuse(f"unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(_is_count(size) for size in shape):
        refuse(f"shape {str(shape)[:80]} is no list of at most {MAX_AXES} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        refuse(f"data_offsets {str(offsets)[:80]} are no two byte positions")
    begin, end = offsets
    if begin > end:
        refuse(f"data_offsets [{begin}, {end}] run backwards")
    need = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != need:
        refuse(f"{dtype} {shape} takes {need:,} bytes, data_offsets give {end - begin:,}")
    return Entry(name, dtype, tuple(shape), path, data_start + begin, data_start + end)


def _check_coverage(entries: list[Entry], path: Path, data_start: int, file_bytes: int) -> None:
    """The tensors, in file order, must fill the data exactly."""
    position, before = data_start, "the header"
    for entry in entries:
        if entry.stop > file_bytes:
            missing = entry.stop - file_bytes
            raise CheckpointError(
                f"ends {missing:,} bytes past the end of the file; truncated download?", file=path, tensor=entry.name
            )
        if entry.start != position:
            what = "overlaps" if entry.start < position else f"leaves {entry.start - position:,} unused bytes after"
            raise CheckpointError(f"{what} {before[:200]}", file=path, tensor=entry.name)
        position, before = entry.stop, entry.name
    if position != file_bytes:
        raise CheckpointError(f"{file_bytes - position:,} bytes after the last tensor belong to none", file=path)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62
