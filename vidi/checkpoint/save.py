"""Write the official layout: shards of bounded size, their index, config.json; whole or not at all.

Everything goes into a temporary folder beside the target, is flushed to disk, and the folder is renamed into place. A
reader never sees half a checkpoint, and an interrupted run leaves the target as it was.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vidi.checkpoint import names
from vidi.checkpoint.errors import CheckpointError
from vidi.checkpoint.folder import CONFIG_NAME, INDEX_NAME
from vidi.checkpoint.load import CHUNK_BYTES, STORED, Progress

if TYPE_CHECKING:
    from vidi.model import VidiModel

__all__ = ["MAX_SHARD_BYTES", "Item", "limit_for", "plan", "save", "write"]

MAX_SHARD_BYTES = 5_000_000_000
_SAVED_NAMES = (CONFIG_NAME, INDEX_NAME, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
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
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write ``items`` in order as shards with an index, ``config`` as config.json, and ``extra`` text files."""
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes {max_shard_bytes}: at least 1")
    shards = plan([item.nbytes for item in items], max_shard_bytes)
    total, done = sum(item.nbytes for item in items), 0
    weight_map: dict[str, str] = {}
    with _replacing(Path(folder), force) as temporary:
        for number, members in enumerate(shards, start=1):
            file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            chosen = [items[i] for i in members]
            weight_map |= dict.fromkeys((item.name for item in chosen), file_name)
            with (temporary / file_name).open("xb") as file:
                for name, nbytes in _write_shard(file, chosen):
                    done += nbytes
                    if progress is not None:
                        progress(done, total, name)
                _flush(file)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        texts = {INDEX_NAME: json.dumps(index, indent=2) + "\n", CONFIG_NAME: json.dumps(config, indent=2) + "\n"}
        for file_name, text in (texts | dict(extra or {})).items():
            with (temporary / file_name).open("x", encoding="utf-8") as text_file:
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


def _write_shard(file, items: Sequence[Item]) -> Iterator[tuple[str, int]]:  # type: ignore[no-untyped-def]
    """Header, then the tensors' bytes; wider dtypes first, so that every tensor is aligned to its item."""
    ordered = sorted(items, key=lambda item: -item.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
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


def _flush(file) -> None:  # type: ignore[no-untyped-def]
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _replacing(folder: Path, force: bool) -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` if the block ends well and vanishes if not."""
    folder = folder.absolute()
    _check_target(folder, force)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"cannot be written ({error.strerror})", file=folder) from None
    old = temporary.with_name(temporary.name + "-old")
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        _flush_folder(temporary)
        if folder.is_dir() and any(folder.iterdir()):
            os.rename(folder, old)
        os.rename(temporary, folder)
        _flush_folder(folder.parent)
    except OSError as error:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise CheckpointError(f"cannot be written ({error.strerror})", file=folder) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)


def _check_target(folder: Path, force: bool) -> None:
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError("is there and is no folder; choose another place", file=folder)
    present = sorted(path.name for path in folder.iterdir())
    if not present:
        return
    if not force:
        text = "is there and not empty; choose another place, or --force to replace a checkpoint"
        raise CheckpointError(text, file=folder)
    foreign = [name for name in present if name not in _SAVED_NAMES and not name.endswith(".safetensors")]
    if CONFIG_NAME not in present or foreign:
        odd = foreign[0] if foreign else f"no {CONFIG_NAME}"
        raise CheckpointError(f"holds more than a checkpoint ({odd}); not replaced, remove it yourself", file=folder)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
