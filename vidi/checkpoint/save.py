"""Write the official layout: shards of bounded size, their index, config.json; whole or not at all.

Everything goes into a draft folder beside the target, is flushed to disk, and takes the target's place in one step. A reader
never sees half a checkpoint, and a run that ends early, however it ends, leaves the target as it was.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from stageparity import atomic
from vidi.checkpoint import names
from vidi.checkpoint.errors import CheckpointError
from vidi.checkpoint.folder import CONFIG_NAME, INDEX_NAME, read_folder
from vidi.checkpoint.load import CHUNK_BYTES, STORED, Progress
from vidi.config import VidiConfig

if TYPE_CHECKING:
    from vidi.model import VidiModel

__all__ = ["MAX_SHARD_BYTES", "Item", "limit_for", "plan", "save", "write"]

MAX_SHARD_BYTES = 5_000_000_000
_SAVED_NAMES = (CONFIG_NAME, INDEX_NAME, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors", re.ASCII)
_DTYPE_NAMES = {dtype: name for name, dtype in STORED.items()}


@dataclass(frozen=True)
class Item:
    """One tensor to write. ``pieces`` yields its values in order, flat, in pieces of bounded size."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def save(
    model: VidiModel,
    folder: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write ``model`` so that ``load`` gives the same bits; every parameter in its own dtype, no lm_head (tied).

    An existing folder that is not empty is refused; with ``force`` it is replaced if it is a checkpoint folder itself.
    Raises CheckpointError, also for a model that is only partly loaded (its meta parameters are named).
    """
    parameters = dict(model.named_parameters())
    if left := [name for name, parameter in parameters.items() if parameter.is_meta]:
        text = f"{len(left)} parameters were never loaded ({', '.join(left[:5])}); nothing saved"
        raise CheckpointError(text, file=folder)
    items = [_item(name, parameters[want.ours].detach()) for name, want in names.expected(model.config).items()]
    write(folder, model.config.to_official(), items, max_shard_bytes=max_shard_bytes, force=force, progress=progress)


def write(
    folder: str | Path,
    config: Mapping[str, object],
    items: Sequence[Item],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write ``items`` in order as shards with an index, ``config`` as config.json, and ``extra`` text files.

    metadata: strings for each shard's header, which readers of safetensors pass over.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes {max_shard_bytes}: at least 1")
    shards = plan([item.nbytes for item in items], max_shard_bytes)
    total, done = sum(item.nbytes for item in items), 0
    weight_map: dict[str, str] = {}
    with _replacing(Path(folder), force, total) as draft:
        for number, members in enumerate(shards, start=1):
            file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            chosen = [items[i] for i in members]
            weight_map |= dict.fromkeys((item.name for item in chosen), file_name)
            with (draft / file_name).open("xb") as file:
                for name, nbytes in _write_shard(file, chosen, metadata or {}):
                    done += nbytes
                    if progress is not None:
                        progress(done, total, name)
                _flush(file)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        texts = {INDEX_NAME: json.dumps(index, indent=2) + "\n", CONFIG_NAME: json.dumps(config, indent=2) + "\n"}
        for file_name, text in (texts | dict(extra or {})).items():
            with (draft / file_name).open("x", encoding="utf-8") as text_file:
                text_file.write(text)
                _flush(text_file)


def plan(sizes: Sequence[int], max_bytes: int) -> list[list[int]]:
    """Consecutive tensors, as many as fit; a tensor above the limit stands alone."""
    shards: list[list[int]] = []
    room = -1
    for i, size in enumerate(sizes):
        if size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(i)
        room -= size
    return shards


def limit_for(sizes: Sequence[int], num_shards: int) -> int:
    """The smallest limit under which ``plan`` needs no more than ``num_shards``."""
    low, high = 1, max(sum(sizes), 1)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(plan(sizes, middle)) <= num_shards else (middle + 1, high)
    return low


def _item(name: str, value: Tensor) -> Item:
    def pieces() -> Iterator[Tensor]:
        flat, step = value.reshape(-1), CHUNK_BYTES // value.dtype.itemsize
        for first in range(0, flat.numel(), step):
            yield flat[first : first + step]

    return Item(name, value.dtype, tuple(value.shape), pieces)


def _write_shard(file: BinaryIO, items: Sequence[Item], metadata: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    """Header, then the tensors' bytes; wider dtypes first, so that every tensor is aligned to its item."""
    ordered = sorted(items, key=lambda item: -item.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for item in ordered:
        offsets = [position, position + item.nbytes]
        header[item.name] = {"dtype": _DTYPE_NAMES[item.dtype], "shape": list(item.shape), "data_offsets": offsets}
        position += item.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for item in ordered:
        written = 0
        for piece in item.pieces():
            data = memoryview(piece.to("cpu").contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
            file.write(data)
            written += len(data)
            yield item.name, len(data)
        assert written == item.nbytes, f"{item.name}: {written} bytes written, {item.nbytes} announced"


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _replacing(folder: Path, force: bool, nbytes: int) -> Iterator[Path]:
    """A draft folder that becomes ``folder`` if the block ends well and vanishes if not, see `atomic.replacing`."""
    folder = folder.absolute()
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CheckpointError("is there and is no folder; choose another place", file=folder)
    try:
        with atomic.replacing(folder, _check_replaceable if force else _refuse) as draft:
            free = shutil.disk_usage(draft).free
            if free < nbytes:
                text = f"{nbytes:,} bytes to write, {free:,} bytes free; make room or choose another place"
                raise CheckpointError(text, file=folder)
            yield draft
    except OSError as error:
        raise CheckpointError(f"cannot be written ({atomic.said(error)})", file=folder) from None


def _refuse(folder: Path) -> None:
    text = "is there and not empty; choose another place, or --force to replace a checkpoint"
    raise CheckpointError(text, file=folder)


def _check_replaceable(folder: Path) -> None:
    """Raises CheckpointError unless the folder holds a checkpoint as `write` leaves it and nothing else.

    Names prove nothing: config.json must describe this model, shards must hold tensors of its names, the index must list the
    shards that are there. Folders and links are never ours, whatever they are called.
    """

    def keep(odd: str) -> NoReturn:
        raise CheckpointError(f"holds more than a checkpoint ({odd}); not replaced, remove it yourself", file=folder)

    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    for entry in entries:
        if not entry.is_file(follow_symlinks=False):
            keep(f"{entry.name} is no regular file")
        if entry.name not in _SAVED_NAMES and not _SHARD_NAME.fullmatch(entry.name):
            keep(entry.name)
    if absent := {CONFIG_NAME, INDEX_NAME} - {entry.name for entry in entries}:
        keep(f"no {min(absent)}")
    shards = {entry.name for entry in entries if entry.name.endswith(".safetensors")}
    try:
        found = read_folder(folder)
        VidiConfig.from_official(found.config)
    except ValueError as error:
        keep(str(error))
    if found.problems or {shard.path.name for shard in found.shards} != shards:
        keep("its index does not list its shards")
    if foreign := [name for name in found.tensors if names.our_name(name) is None and name != names.HEAD]:
        keep(f"{foreign[0][:200]}, no tensor of this model")
