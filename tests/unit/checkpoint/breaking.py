"""Ways to break a checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_shard(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def shard_with(folder: Path, tensor: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][tensor]


def edit(folder: Path, tensor: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change the header of the shard that holds ``tensor`` and leave the data."""
    path = shard_with(folder, tensor)
    header, data = header_of(path)
    change(header)
    write_shard(path, header, data)
    return path


def replace_tensor(
    folder: Path, tensor: str, *, shape: list[int] | None = None, dtype: str | None = None, data: bytes | None = None
) -> Path:
    """Another shape, dtype or content for one tensor, the file staying well formed; ``data`` None = zero bytes."""
    path = shard_with(folder, tensor)
    header, old = header_of(path)
    sizes = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I8": 1, "F8_E4M3": 1, "I64": 8}
    metadata, position, parts = header.pop("__metadata__"), 0, []
    fresh: dict[str, Any] = {"__metadata__": {}}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        piece = old[begin:end]
        if name == tensor:
            entry = {"dtype": dtype or entry["dtype"], "shape": entry["shape"] if shape is None else shape}
            count = 1
            for size in entry["shape"]:
                count *= size
            piece = bytes(count * sizes[entry["dtype"]]) if data is None else data
        fresh[name] = entry | {"data_offsets": [position, position + len(piece)]}
        position += len(piece)
        parts.append(piece)
    fresh["__metadata__"] = metadata
    write_shard(path, fresh, b"".join(parts))
    return path


def add_tensor(
    folder: Path, like: str, name: str, dtype: str, shape: list[int], data: bytes, index: bool = True
) -> None:
    """A further tensor at the end of the shard that holds ``like``."""
    path = shard_with(folder, like)
    header, old = header_of(path)
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(old), len(old) + len(data)]}
    write_shard(path, header, old + data)
    if index:
        edit_index(folder, lambda weight_map: weight_map.update({name: path.name}))


def remove_tensor(folder: Path, tensor: str) -> None:
    path = shard_with(folder, tensor)
    replace_tensor(folder, tensor, data=b"", shape=[0])
    header, data = header_of(path)
    del header[tensor]
    write_shard(path, header, data)
    edit_index(folder, lambda weight_map: weight_map.pop(tensor))


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
