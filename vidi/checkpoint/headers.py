"""Strict reader of safetensors headers and of the JSON files beside them, with the standard library alone.

A safetensors file is 8 bytes (little-endian length n), n bytes of JSON, then the tensors' bytes back to back. This
reader accepts exactly that: the tensors cover the data without gap or overlap, sizes follow from dtype and shape, no
key appears twice. It never reads tensor data, and never more than MAX_JSON_BYTES.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from vidi.checkpoint.errors import CheckpointError

__all__ = ["ITEM_BYTES", "MAX_JSON_BYTES", "Entry", "Shard", "read_json", "read_shard", "safe_file"]

# The full-size model needs 0.2 MB in one header and 0.14 MB in its index; parsed JSON takes up to 40 times its bytes.
MAX_JSON_BYTES = 4 << 20
MAX_AXES = 8
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
    """One safetensors file: its tensors in file order."""

    path: Path
    tensors: Mapping[str, Entry]
    file_bytes: int


def safe_file(folder: Path, name: str) -> Path | None:
    """``folder/name``, None where no such file exists, refused unless it is a regular file inside the folder.

    A name may not be absolute, climb, or be a link that resolves elsewhere. One layout of links is known and allowed:
    the Hugging Face cache, where ``snapshots/REVISION/FILE`` points into the ``blobs`` folder beside ``snapshots``.
    """
    label = ascii(name) if not name.isprintable() else name
    if not name or "\x00" in name or "\\" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(f"names {label[:200]!r}, a path that leaves the folder; refused", file=folder)
    path = folder / name
    try:
        real, root = path.resolve(strict=True), folder.resolve(strict=True)
        allowed = [root]
        if root.parent.name == "snapshots":
            allowed.append(root.parent.parent / "blobs")
        if not any(real.is_relative_to(place) for place in allowed):
            raise CheckpointError("is a link to a place outside the folder; refused. Copy the file here", file=path)
        if not stat.S_ISREG(real.stat().st_mode):
            raise CheckpointError("is no regular file", file=path)
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long, no permission
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot be opened ({_reason(error)})", file=path) from None
    return path


def read_json(path: Path, *, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file of at most ``limit`` bytes; duplicate keys, NaN and deep nesting are refused."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(
                f"{size:,} bytes of JSON; at most {limit:,} are read (the full-size model needs 0.2 MB)", file=path
            )
        with path.open("rb") as file:
            return _parse(file.read(limit + 1), path)
    except OSError as error:
        raise CheckpointError(f"cannot be read ({_reason(error)})", file=path) from None


def read_shard(path: Path) -> Shard:
    """Read and validate the header of one safetensors file. Raises CheckpointError naming file and tensor."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
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
        raise CheckpointError(f"cannot be read ({_reason(error)})", file=path) from None
    if len(header) != length or header[:1] != b"{":
        raise CheckpointError("the header is no JSON object; damaged, or no safetensors file", file=path)
    fields = _parse(header, path)
    _check_metadata(fields.pop("__metadata__", {}), path)
    data_start = 8 + length
    entries = [_entry(name, field, path, data_start) for name, field in fields.items()]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    _check_coverage(entries, path, data_start, file_bytes)
    return Shard(path, {entry.name: entry for entry in entries}, file_bytes)


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


def _check_metadata(metadata: Any, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("__metadata__ is no map of strings", file=path)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError("appears twice", file=path, tensor=twice)
        return found

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except CheckpointError:
        raise
    except RecursionError:
        raise CheckpointError("JSON nested too deeply", file=path) from None
    except ValueError as error:  # also UnicodeDecodeError, JSONDecodeError, integers of thousands of digits
        raise CheckpointError(f"damaged JSON ({_reason(error)})", file=path) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"a JSON object is expected, found {type(value).__name__}", file=path)
    return value


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0][:200]
