"""The files of a checkpoint folder: config.json, the index, the shards' headers. No tensor data is read here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stageparity import strict
from vidi.checkpoint.errors import CheckpointError
from vidi.checkpoint.headers import Entry, Shard, read_json, read_shard, safe_file

__all__ = ["CONFIG_NAME", "INDEX_NAME", "Folder", "Problem", "read_folder"]

CONFIG_NAME, INDEX_NAME = "config.json", "model.safetensors.index.json"
MAX_FILES, MAX_SHARDS, MAX_TENSORS = 10_000, 256, 100_000
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_SHARD_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors", re.ASCII)


@dataclass(frozen=True)
class Problem:
    """One reason why a folder does not fit. ``kind``: shard, index, duplicate, missing, unexpected, shape, dtype."""

    kind: str
    text: str
    tensor: str | None = None
    file: str | None = None
    part: str | None = None


@dataclass(frozen=True)
class Folder:
    """What the headers of a folder say, before it is compared with any config."""

    path: Path
    config: Mapping[str, Any]
    shards: tuple[Shard, ...]
    tensors: Mapping[str, Entry]
    absent_shards: Mapping[str, tuple[str, ...]]  # shard name -> tensors that the index places there
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    @property
    def synthetic(self) -> str | None:
        """How these weights were made up, None where nothing says that they were."""
        return next(
            (strict.one_line(shard.synthetic, 100) for shard in self.shards if shard.synthetic is not None), None
        )


def read_folder(folder: str | Path) -> Folder:
    """Read config.json, the index and every shard's header.

    Raises CheckpointError for a folder that cannot be judged: no such folder, no config, no safetensors, a damaged or
    hostile file. What can be judged and is wrong (a missing shard, an index that disagrees) comes back as problems.
    """
    path = Path(folder)
    files = _list(path)
    config_path = safe_file(path, CONFIG_NAME)
    if config_path is None:
        raise CheckpointError(f"holds no {CONFIG_NAME}; a checkpoint folder has it beside the shards", file=path)
    config = read_json(config_path)
    index_path = safe_file(path, INDEX_NAME)
    raw_index = {} if index_path is None else read_json(index_path, of_tensors=True)
    index = None if index_path is None else _index(raw_index, index_path)
    names, absent = _shard_names(path, files, index)
    shards, notes = [], _notes(files, names)
    for name in names:
        shard_path = safe_file(path, name)
        if shard_path is None:
            absent.append(name)
        else:
            shards.append(read_shard(shard_path))
            if sum(len(shard.tensors) for shard in shards) > MAX_TENSORS:
                text = f"more than {MAX_TENSORS:,} tensors; the full-size model has 1,424"
                raise CheckpointError(text, file=shard_path)
    if not shards:
        raise CheckpointError(f"none of its shards is there ({', '.join(absent[:5])})", file=path)
    placed: dict[str, list[str]] = {name: [] for name in absent}
    for tensor, name in (index or {}).items():
        if name in placed:
            placed[name].append(tensor)
    problems = [
        Problem("shard", f"missing shard; the index places {len(tensors)} tensors in it", file=name)
        if index is not None
        else Problem("shard", "missing shard, by the count in the names of the others", file=name)
        for name, tensors in placed.items()
    ]
    tensors, doubles = _merge(shards)
    problems += doubles
    if index is not None:
        problems += _disagreements(index, shards, set(absent))
        total = sum(entry.nbytes for shard in shards for entry in shard.tensors.values())
        claimed = _total_size(raw_index)
        if not absent and claimed not in (None, total):
            notes.append(f"the index claims a total_size of {claimed:,} bytes, the shards hold {total:,}")
    return Folder(
        path, config, tuple(shards), tensors, {k: tuple(v) for k, v in placed.items()}, tuple(problems), tuple(notes)
    )


def _list(path: Path) -> list[str]:
    try:
        with os.scandir(path) as entries:
            files = []
            for entry in entries:
                files.append(entry.name)
                if len(files) > MAX_FILES:
                    raise CheckpointError(f"holds more than {MAX_FILES:,} files; no checkpoint folder", file=path)
    except FileNotFoundError:
        raise CheckpointError("no such folder", file=path) from None
    except NotADirectoryError:
        raise CheckpointError("is a file; give the folder that holds config.json and the shards", file=path) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be listed ({error})", file=str(path)[:200]) from None
    return sorted(files)


def _index(raw: Mapping[str, Any], path: Path) -> dict[str, str]:
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("has no weight_map", file=path)
    if len(weight_map) > MAX_TENSORS:
        raise CheckpointError(f"lists {len(weight_map):,} tensors; at most {MAX_TENSORS:,} are read", file=path)
    for tensor, name in weight_map.items():
        if problem := _shard_name_problem(name):
            raise CheckpointError(problem, file=path, tensor=tensor)
    shards = set(weight_map.values())
    if len(shards) > MAX_SHARDS:
        raise CheckpointError(f"names {len(shards):,} shards; at most {MAX_SHARDS} are read", file=path)
    return weight_map


def _shard_name_problem(name: Any) -> str | None:
    if not isinstance(name, str):
        return "the index gives no file name for it"
    if "/" in name or "\\" in name or "\x00" in name:
        return f"is placed in {name[:100]!a}, a path that leaves the folder; refused"
    if Path(name).suffix.lower() in _PICKLES:
        return f"is placed in the pickle file {name[:100]!a}; never unpickled"
    if not name.endswith(".safetensors"):
        return f"is placed in {name[:100]!a}, no .safetensors file"
    return None


def _total_size(raw: Mapping[str, Any]) -> int | None:
    metadata = raw.get("metadata")
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return size if type(size) is int and 0 <= size < 1 << 62 else None


def _shard_names(path: Path, files: list[str], index: Mapping[str, str] | None) -> tuple[list[str], list[str]]:
    """Shards to read, and those known to be missing, for a folder with or without an index."""
    if index is not None:
        return sorted(set(index.values())), []
    found = [name for name in files if name.endswith(".safetensors")]
    if not found:
        pickles = [name for name in files if Path(name).suffix.lower() in _PICKLES]
        if pickles:
            raise CheckpointError(
                f"holds pickle files ({', '.join(pickles[:5])}) and no safetensors; a pickle can run code and is never "
                "opened here. Convert it where you trust it",
                file=path,
            )
        raise CheckpointError(f"holds no .safetensors file and no {INDEX_NAME}", file=path)
    if len(found) > MAX_SHARDS:
        raise CheckpointError(f"holds {len(found):,} safetensors files; at most {MAX_SHARDS} are read", file=path)
    missing = set()
    for stem, _, count in (match.groups() for match in map(_SHARD_NAME.fullmatch, found) if match):
        missing |= {f"{stem}-{i:05}-of-{count}.safetensors" for i in range(1, min(int(count), MAX_SHARDS) + 1)}
    return found, sorted(missing - set(found))[:MAX_SHARDS]


def _notes(files: Iterable[str], shards: Iterable[str]) -> list[str]:
    notes = []
    if pickles := [name for name in files if Path(name).suffix.lower() in _PICKLES]:
        notes.append(f"pickle files are never opened: {', '.join(pickles[:5])}")
    if others := sorted({name for name in files if name.endswith(".safetensors")} - set(shards)):
        notes.append(f"not in the index, so not read: {', '.join(others[:5])}{' …' if len(others) > 5 else ''}")
    return notes


def _merge(shards: Iterable[Shard]) -> tuple[dict[str, Entry], list[Problem]]:
    tensors: dict[str, Entry] = {}
    problems = []
    for shard in shards:
        for name, entry in shard.tensors.items():
            first = tensors.setdefault(name, entry)
            if first is not entry:
                text = f"is stored twice, in {first.path.name} and here; keep one"
                problems.append(Problem("duplicate", text, name, shard.path.name))
    return tensors, problems


def _disagreements(index: Mapping[str, str], shards: Iterable[Shard], absent: set[str]) -> list[Problem]:
    """Where the index and the shards' own headers place a tensor differently."""
    home = {name: shard.path.name for shard in shards for name in shard.tensors}
    problems = []
    for name, file in index.items():
        if file in absent or home.get(name) == file:
            continue
        where = f"it is in {home[name]}" if name in home else "no shard holds it"
        problems.append(Problem("index", f"the index places it in {file}; {where}", name, file))
    for name, file in home.items():
        if name not in index:
            problems.append(Problem("index", f"is in {file} and not in the index", name, file))
    return problems
