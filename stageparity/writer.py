"""Writing golden cases, for the tools: bytes that depend on content alone, and sets replaced in one step.

HDF5 without times and with a fixed format version gives the same bytes twice. Whatever kills the process, either the old set
or the new one is there, whole (`stageparity.atomic`).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from safetensors.numpy import save

from stageparity import atomic
from stageparity.golden import Golden, GoldenError, Sampled, Whole
from stageparity.manifest import FORMAT, PARTS, content_sha256, describe, render, weights_sha256

__all__ = ["NewCase", "locked", "replaced", "write_case", "write_weights"]

_ONE_CHUNK = 1 << 22  # bytes up to which a tensor is one HDF5 chunk


@dataclass(frozen=True)
class NewCase:
    """A case to be written. targets: variant -> stage id -> golden. weights: file name and content hash."""

    name: str
    provenance: Mapping[str, Any]
    config: Mapping[str, Any]
    inputs: Mapping[str, np.ndarray]
    targets: Mapping[str, Mapping[str, Golden]]
    weights: Mapping[str, str]
    info: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


def write_weights(folder: Path, name: str, tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Write a safetensors file (sorted names, no metadata) and return what a manifest says about it."""
    atomic.write_bytes(folder / name, save({key: np.ascontiguousarray(tensors[key]) for key in sorted(tensors)}))
    return {"file": name, "sha256": weights_sha256(tensors)}


def write_case(folder: Path, case: NewCase, *, compress: bool = True) -> None:
    """Write CASE.h5 and CASE.json. compress: shuffle + gzip 4 (for what goes into git).

    Raises GoldenError for a tensor that is empty or not finite.
    """
    path = folder / f"{case.name}.h5"
    written: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:  # HDF5 in memory would be laid out in other bytes
        with h5py.File(Path(scratch, path.name), "w", libver=("v110", "v110"), track_order=False) as file:

            def put(place: str, array: np.ndarray) -> dict[str, Any]:
                return _dataset(file, place, array, written, compress, f"{case.name}: {place}")

            inputs = {stage: put(f"inputs/{stage}", case.inputs[stage]) for stage in sorted(case.inputs)}
            targets = {
                variant: {stage: _entry(put, f"{variant}/{stage}", stages[stage]) for stage in sorted(stages)}
                for variant, stages in sorted(case.targets.items())
            }
        raw = Path(scratch, path.name).read_bytes()
    body = {
        "format": FORMAT,
        "case": case.name,
        "provenance": dict(case.provenance),
        "config": dict(case.config),
        "info": dict(case.info),
        "weights": dict(case.weights),
        "container": {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()},
        "inputs": inputs,
        "targets": targets,
        "left_out": dict(case.left_out),
    }
    atomic.write_bytes(path, raw)
    atomic.write_bytes(path.with_suffix(".json"), render(body))


def _entry(put: Callable[[str, np.ndarray], dict[str, Any]], place: str, golden: Golden) -> dict[str, Any]:
    if isinstance(golden, Whole):
        stored = put(place, golden.array)
        return {"form": "whole", **stored, **({"as": golden.dtype} if golden.dtype != stored["dtype"] else {})}
    common = {"shape": list(golden.shape), "dtype": golden.dtype}
    if isinstance(golden, Sampled):
        arrays = (golden.sample, golden.index, golden.row_sum, golden.row_sum_index, golden.stats)
        parts = {part: put(f"{place}/{part}", array) for part, array in zip(PARTS["rows"], arrays, strict=True)}
        return {"form": "rows", **common, "axis": golden.axis, "parts": parts}
    sketch = golden.sketch
    parts = {part: put(f"{place}/{part}", getattr(sketch, part)) for part in PARTS["sketch"]}
    sums = {"rows": sketch.rows, "columns": sketch.columns, "sum_squares": sketch.sum_squares}
    return {"form": "sketch", **common, **sums, "spec": asdict(sketch.spec), "parts": parts}


def _dataset(
    file: h5py.File, place: str, array: np.ndarray, written: dict[str, str], compress: bool, what: str
) -> dict[str, Any]:
    array = np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise GoldenError(f"{what} holds NaN or Inf: a golden must be finite; see how the source was made")
    if array.size == 0 and not place.endswith(("/row_sum", "/row_sum_index")):
        raise GoldenError(f"{what} is empty: leave it out, an empty golden compares nothing")
    entry, key = describe(array), content_sha256(array)
    if key in written:
        file[place] = file[written[key]]
        return entry
    written[key] = place
    filters: dict[str, Any] = {}
    if array.ndim and array.size:
        chunks = array.shape if array.nbytes <= _ONE_CHUNK else True
        filters = {"chunks": chunks, "fletcher32": True}
        if compress:
            filters |= {"shuffle": True, "compression": "gzip", "compression_opts": 4}
    file.create_dataset(place, data=array, track_times=False, **filters)
    return entry


@contextmanager
def replaced(
    target: Path,
    at: Callable[[str], None] = lambda point: None,
    *,
    goldens: Path | None = None,
    record: Callable[[], None] | None = None,
) -> Iterator[Path]:
    """Replace a golden set as a whole: yields a copy of it to change, and exchanges the two folders at the end.

    Holds the lock of the golden folder (default: the set's parent) for the whole time; a second writer gets GoldenError.
    An exception leaves the set as it was; so does OSError where the file system cannot exchange folders. record: called with
    the new set in place and the lock still held, for the ledger. at: called with the name of each point passed (tests kill
    the process there).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(goldens or target.parent):
        with atomic.replacing(target, lambda old: None if old == target.absolute() else at("exchanged")) as draft:
            if target.exists():
                shutil.copytree(target, draft, dirs_exist_ok=True)
            at("copied")
            yield draft
            at("written")
            for path in draft.iterdir():
                atomic.sync(path)
            at("synced")
        at("cleaned")
        if record is not None:
            record()
            at("ledger")


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock that every writer of a golden folder takes, its ledger's included. Not re-entrant.

    wait: until another writer is done, in place of GoldenError (for what took long to measure).
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GoldenError(
                f"{folder}: another process is writing goldens here: wait for it, then run again"
            ) from None
        yield
    finally:
        os.close(handle)
