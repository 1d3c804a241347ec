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
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

from stageparity import strict
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
    """The dumps of a folder: itself, or those in it. Raises Unusable where there is none."""
    if not place.is_dir():
        raise Unusable(f"{place}: there is no such folder")
    found = [place, *sorted(path for path in place.iterdir() if path.is_dir())]
    found = [path for path in found if (path / "trace.json").exists() or (path / "candidate.toml").exists()]
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
    if not isinstance(said.get("layout", {}), dict):
        raise Unusable(f'{folder}: layout must be a table of stage = "here -> there"')
    return said


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
    if not passes["chained"]:
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
    if len(unknown) == len(chained):
        raise Unusable(
            f"{folder}: none of its {len(unknown)} keys is a stage of {said['case']}: {unknown[0]}, …; keys are stage ids"
        )
    about: dict[str, Any] = {key: said[key] for key in ("run", "adapter", "python", "unused") if key in said}
    return Candidate(
        folder, said["case"], said["dtype"], chained, passes["forced"], notes, said.get("fed", {}),
        said.get("inside", {}), {**about, "unknown": unknown},
    )  # fmt: skip


def _tensors(path: Path, folder: Path) -> dict[str, np.ndarray]:
    if path.suffix not in (".safetensors", ".h5", ".hdf5", ".npy"):
        return {}
    try:
        if path.suffix in (".h5", ".hdf5"):
            with open_h5(path) as file:
                return {place.replace("/", "."): file.read_any(place) for place in sorted(file.places())}
        data = strict.read_bytes(path, limit=MAX_BYTES, inside=folder)
        if path.suffix == ".npy":
            return {path.name.removesuffix(".npy"): np.load(io.BytesIO(data), allow_pickle=False)}
        return load(_half_as_float(data))
    except Missing:
        raise Unusable(f"{path}: gone while it was read") from None
    except Exception as error:  # readers of three formats; their errors share no base class
        raise Unusable(f"{path}: unreadable ({strict.reason(error)})") from None


def _half_as_float(data: bytes) -> bytes:
    """bfloat16 as float32: NumPy has no such dtype. Other files as they are."""
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data) or b'"BF16"' not in data[8:start]:
        return data
    header, parts, at = json.loads(data[8:start]), [], 0
    for entry in header.values():
        if "dtype" not in entry:
            continue
        first, last = entry["data_offsets"]
        part = data[start + first : start + last]
        if entry["dtype"] == "BF16":
            part = (np.frombuffer(part, "<u2").astype("<u4") << 16).tobytes()
            entry["dtype"] = "F32"
        entry["data_offsets"] = [at, at + len(part)]
        parts.append(part)
        at += len(part)
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + b"".join(parts)


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
