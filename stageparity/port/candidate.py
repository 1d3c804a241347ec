"""Tensors that something else wrote: a dump of the tracer, or files of any language with a short declaration beside them.

A folder is one case, or holds one folder a case. It says what it is, in `trace.json` (the tracer's) or `candidate.toml`:

    case = "official/single"        # SET/NAME of the golden case
    golden = "3f2a…"                # the golden's hash, as a run's JSON tells it
    dtype = "float32"               # what was computed in
    [layout]                        # where the axes are not the golden's: "here -> there", as einops writes it
    "layer.{i}.keys" = "B L G H -> B (G r) L H"

and holds tensors under their stage ids: safetensors files, HDF5 files, or one .npy file a stage (`layer.0.output.npy`). Files and
folders called `forced` are of a run in which each recorded tensor was replaced by its golden. The tracer's dump of a
case that is known by sketches holds sketches (`sketched.py`); any other dump may hold whole tensors there too.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

from stageparity import strict, strict_safetensors
from stageparity.golden import Golden
from stageparity.port.sketched import Shown, assembled
from stageparity.port.stagetrace import VERSION, arrange
from stageparity.stage import Stages
from stageparity.strict import Missing
from stageparity.strict_hdf5 import open_h5

__all__ = ["Candidate", "Unusable", "folders", "read"]

MAX_BYTES = 8 << 30  # of one file
_KEYS = {"case", "golden", "dtype", "layout"}
_SHORTEST = 12  # characters of a hash that may stand for it
_AXES = 64  # of an array, as NumPy bounds them


class Unusable(ValueError):
    """A dump that cannot be judged: stale, unfinished, mislabelled, unreadable. The text says what to do."""


@dataclass(frozen=True)
class Candidate:
    """One case's tensors by stage id, in the golden's layout as far as it was declared.

    notes: what the tracer met at a stage. fed: fingerprints of what each hooked call was given in the forced run; inside: the
    stages met within it. about: what else the dump says of itself.
    """

    folder: Path
    case: str
    dtype: str
    chained: Mapping[str, np.ndarray | Shown]
    forced: Mapping[str, np.ndarray] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    fed: Mapping[str, Any] = field(default_factory=dict)
    inside: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)


def folders(place: Path) -> list[Path]:
    """The dumps of a folder: itself, or those in it. Raises Unusable where there is none, and for a link out of the folder."""
    if not place.is_dir():
        raise Unusable(f"{place}: there is no such folder")
    found = [place, *sorted(path for path in place.iterdir() if path.is_dir())]
    found = [path for path in found if (path / "trace.json").exists() or (path / "candidate.toml").exists()]
    if place in found:
        return [place]  # in it lie runs of the same case under other circumstances
    for path in found:
        if not path.resolve().is_relative_to(place.resolve()):
            raise Unusable(f"{path} is a link to a place outside {place}; refused: give that folder itself")
    if not found:
        raise Unusable(
            f"{place}: neither candidate.toml nor trace.json says what this is: write one with case, golden and dtype "
            "(`port init CASE OUT` begins one)"
        )
    return found


def header(folder: Path) -> dict[str, Any]:
    """What a dump says of itself. Raises Unusable, also for one that is unfinished."""
    try:
        if (folder / "trace.json").exists():
            said = strict.read_json(folder / "trace.json", inside=folder)
            if said.get("version") != VERSION:
                raise Unusable(
                    f"{folder}: written by a tracer of version {said.get('version')}, this one reads {VERSION}: trace again"
                )
            if said.get("finished") is not True:
                raise Unusable(f"{folder}: unfinished: {_failure(said)}")
        else:
            said = strict.read_toml(folder / "candidate.toml")
            if unknown := sorted(set(said) - _KEYS):
                raise Unusable(
                    f"{folder}/candidate.toml: unknown key {unknown[0]}; known are {', '.join(sorted(_KEYS))}"
                )
    except strict.Refused as error:
        raise Unusable(str(error)) from None
    for key in ("case", "golden", "dtype"):
        if not isinstance(said.get(key), str):
            raise Unusable(f'{folder}: it does not say its {key}; {key} = "…" is needed in candidate.toml')
    if not _are_texts(said.get("layout", {})):
        raise Unusable(f'{folder}: layout must be a table of stage = "here -> there"')
    for key, fits in _TRACED.items():
        if key in said and not fits(said[key]):
            raise Unusable(f"{folder}/trace.json: {key} is not of the form that the tracer writes: trace again")
    return said


def _are_texts(value: Any) -> bool:
    """A list of texts, or a table of them."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else (None,)
    return all(isinstance(item, str) for item in items)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) in (int, float) for x in value)


def _is_print(value: Any) -> bool:
    """`stagetrace.fingerprint`: shape, five moments and two sums, neither of an empty array."""
    if not isinstance(value, list) or len(value) != 3 or not all(map(_are_numbers, value)):
        return False
    return len(value[0]) <= _AXES and [len(x) for x in value[1:]] in ([5, 2], [0, 0])


#: What a trace says beside its tensors -> is a value of that form.
_TRACED: dict[str, Callable[[Any], bool]] = {
    "notes": lambda value: isinstance(value, dict) and _are_texts(value),
    "unused": lambda value: isinstance(value, list) and _are_texts(value),
    "inside": lambda value: (
        isinstance(value, dict) and all(isinstance(x, list) and _are_texts(x) for x in value.values())
    ),
    "fed": lambda value: (
        isinstance(value, dict) and all(isinstance(x, list) and all(map(_is_print, x)) for x in value.values())
    ),
}


def _failure(said: Mapping[str, Any]) -> str:
    failed = said.get("failed")
    if not isinstance(failed, dict):
        return "the run that wrote it did not end, or still goes on: trace again"
    last = f", after stage {failed.get('last')}" if failed.get("last") else ""
    return strict.one_line(f"the port failed in its {failed.get('step')}{last}: {failed.get('error')}")


def read(folder: Path, golden: str, targets: Mapping[str, Golden], stages: Stages) -> Candidate:
    """A dump, for the golden case of hash ``golden`` with these tensors. Raises Unusable."""
    said, shapes = header(folder), {stage: tuple(g.shape) for stage, g in targets.items()}
    if len(said["golden"]) < _SHORTEST or not golden.startswith(said["golden"]):
        raise Unusable(
            f"{folder}: made for another golden of {said['case']} ({said['golden'][:12]}…, today's is {golden[:12]}…): "
            "trace again"
        )
    passes: dict[str, dict[str, np.ndarray]] = {"chained": {}, "forced": {}}
    for path in sorted([*folder.glob("*"), *folder.glob("chained/*"), *folder.glob("forced/*")]):
        kind = "forced" if "forced" in (path.stem, path.parent.name) else "chained"
        for stage, array in _tensors(path, folder).items():
            if stage in passes[kind]:
                raise Unusable(f"{folder}: {stage} stands in two files, one is {path.name}: keep one")
            passes[kind][stage] = array
    if not passes["chained"] and not said.get("notes") and not said.get("shapes"):  # a trace may have met nothing whole
        raise Unusable(f"{folder}: no tensors: *.safetensors, *.h5 or STAGE.npy are looked for")
    notes = dict(said.get("notes", {}))
    for tensors in passes.values():
        notes |= _arrange(tensors, said.get("layout", {}), shapes, stages)
    chained: Mapping[str, np.ndarray | Shown] = passes["chained"]
    if "sketch" in said:
        try:
            chained = assembled(said, passes["chained"], targets)
        except ValueError as error:
            raise Unusable(f"{folder}: {strict.reason(error)}: trace again") from None
    unknown = sorted(set(chained) - set(shapes))
    if unknown and len(unknown) == len(chained):
        raise Unusable(
            f"{folder}: none of its {len(unknown)} keys is a stage of {said['case']}: {unknown[0]}, …; keys are stage ids"
        )
    about: dict[str, Any] = {key: said[key] for key in ("run", "adapter", "python", "unused") if key in said}
    return Candidate(
        folder, said["case"], said["dtype"], chained, passes["forced"], notes, said.get("fed", {}),
        said.get("inside", {}), {**about, "unknown": unknown},
    )  # fmt: skip


def _tensors(path: Path, folder: Path) -> dict[str, np.ndarray]:
    if path.suffix not in _READERS:
        return {}
    try:
        found = _READERS[path.suffix](path, folder)
        for stage, array in found.items():
            if array.dtype.kind not in "biuf":
                raise ValueError(f"{stage} holds {array.dtype}; read are booleans, whole numbers and floats")
        return found
    except Missing:
        raise Unusable(f"{path}: gone while it was read") from None
    except Exception as error:  # readers of three formats; their errors share no base class
        raise Unusable(f"{path}: unreadable ({strict.reason(error)})") from None


def _hdf5(path: Path, folder: Path) -> dict[str, np.ndarray]:
    with open_h5(path, limit=MAX_BYTES, inside=folder) as file:
        named = {place: place.replace("/", ".") for place in sorted(file.places())}
        if len(set(named.values())) < len(named):
            raise ValueError("one stage in two places; keep one")
        return {stage: file.read_any(place) for place, stage in named.items()}


def _npy(path: Path, folder: Path) -> dict[str, np.ndarray]:
    """What the header claims is held against the file before the rest is read."""
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with strict.open_file(path, limit=MAX_BYTES, inside=folder) as file:
        shape, _, dtype = headers[np.lib.format.read_magic(file)](file)
        told, size = file.tell() + math.prod(shape) * dtype.itemsize, os.fstat(file.fileno()).st_size
    if told != size:
        raise ValueError(f"{size:,} bytes, its header tells of {told:,}")
    data = strict.read_bytes(path, limit=MAX_BYTES, inside=folder)
    return {path.name.removesuffix(".npy"): np.load(io.BytesIO(data), allow_pickle=False)}


def _safetensors(path: Path, folder: Path) -> dict[str, np.ndarray]:
    """bfloat16 as float32: NumPy has no such dtype."""
    header = strict_safetensors.read_header(path, inside=folder)
    data = strict.read_bytes(path, limit=MAX_BYTES, inside=folder)
    halves = [entry for entry in header.values() if entry.get("dtype") == "BF16"]
    return load(_half_as_float(header, data) if halves else data)


def _half_as_float(header: dict[str, Any], data: bytes) -> bytes:
    start, parts, at, behind = 8 + int.from_bytes(data[:8], "little"), [], 0, 0
    tensors = [entry for entry in header.values() if "dtype" in entry]
    for entry in sorted(tensors, key=lambda entry: entry["data_offsets"]):
        first, last = entry["data_offsets"]
        if first != behind or last < first:  # the library would say so, of offsets that are written anew below
            raise ValueError(f"a tensor's bytes begin at {first!r}, those before it end at {behind}")
        part, behind = data[start + first : start + last], last
        if entry["dtype"] == "BF16":
            part = (np.frombuffer(part, "<u2").astype("<u4") << 16).tobytes()
            entry["dtype"] = "F32"
        entry["data_offsets"] = [at, at + len(part)]
        parts.append(part)
        at += len(part)
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + b"".join(parts)


_READERS = {".safetensors": _safetensors, ".h5": _hdf5, ".hdf5": _hdf5, ".npy": _npy}


def _arrange(
    tensors: dict[str, np.ndarray], layouts: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], stages: Stages
) -> dict[str, str]:
    """Turns tensors into the golden's layout in place; returns a note for each that does not turn."""
    notes = {}
    for stage in tensors:
        pattern = layouts.get(stage) or layouts.get(stages.template_of(stage))
        if pattern:
            try:
                tensors[stage] = arrange(tensors[stage], pattern, shapes.get(stage))
            except (ValueError, TypeError) as error:
                notes[stage] = strict.reason(error)
    return notes
