"""Reading goldens: cases of recorded or computed tensors, verified before use. No torch, no model.

A golden folder holds sets (`official`, `small`, ...), or is a set itself. A set holds per case `CASE.json` (manifest)
and `CASE.h5` (inputs and targets), and safetensors files with weights. Whatever is missing, extra, orphaned, altered,
truncated or not finite raises GoldenError, which names it and says what to do.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from stageparity import strict
from stageparity.golden import Golden, GoldenError, Sampled, Sketched, Whole
from stageparity.manifest import PARTS, content_sha256, parse, restore_hint, weights_sha256
from stageparity.sketch import Sketch, SketchSpec
from stageparity.strict import Missing, Refused
from stageparity.strict_hdf5 import H5File, open_h5
from stageparity.strict_safetensors import read_safetensors

__all__ = [
    "Case", "CaseRef", "GoldenError", "Targets", "goldens_dir", "list_cases", "list_sets", "open_case", "select", "verify",
]  # fmt: skip

ORIGINS = ("official", "oracle", "self")
MEASURED = "measured"  # the folder of a golden folder that holds what was measured, no goldens
PROVENANCE = ("origin", "dtype", "libraries", "device", "seed", "commit")


@dataclass(frozen=True)
class CaseRef:
    """Where a case lies: `name` in the set `folder`."""

    folder: Path
    name: str

    @property
    def set(self) -> str:
        return self.folder.name


def goldens_dir(*places: str | Path) -> Path:
    """The first of these folders that holds goldens. Raises GoldenError naming them all."""
    for place in map(Path, places):
        if place.is_dir() and list_cases(place):
            return place
    raise GoldenError(
        f"no goldens in {' or '.join(map(str, places))}: give --goldens DIR with CASE.json files or sets of them"
    )


def list_cases(folder: Path) -> list[CaseRef]:
    """All cases of a golden folder, sorted by set and name; none where there is no such folder.

    Raises GoldenError for a set that is a link out of the folder.
    """
    if not folder.is_dir():
        return []
    sets = [folder, *sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))]
    for path in sets[1:]:
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise GoldenError(f"{path} is a link to a place outside {folder}; refused: give that folder itself")
    return [
        CaseRef(at, path.stem) for at in sets for path in sorted(at.glob("*.json")) if path.with_suffix(".h5").exists()
    ]


def list_sets(goldens: Path) -> list[Path]:
    """All sets of a golden folder, those of large cases two folders down too, broken ones included."""
    folders = [
        path for path in (*goldens.glob("*/"), *goldens.glob("*/*/")) if path.name[0] != "." and path.name != MEASURED
    ]
    return sorted(path for path in folders if any(path.glob("*.json")) or any(path.glob("*.h5")))


def select(goldens: Path, globs: Iterable[str] = ()) -> list[CaseRef]:
    """Cases of a golden folder whose name, set or SET/NAME is or matches one of the shell patterns; without any, all.

    Raises GoldenError naming the choices where one of them matches nothing.
    """
    refs = list_cases(goldens)
    chosen: dict[CaseRef, None] = {}
    for glob in globs:
        names = {ref: (ref.name, ref.set, f"{ref.set}/{ref.name}") for ref in refs}
        found = [r for r in refs if glob in names[r] or any(fnmatch.fnmatchcase(name, glob) for name in names[r])]
        if not found:
            raise GoldenError(
                f"no case {glob!r} in {goldens}: there are {', '.join(f'{r.set}/{r.name}' for r in refs)}"
            )
        chosen |= dict.fromkeys(found)
    return [ref for ref in refs if ref in chosen] if chosen else refs


class Targets(Mapping[str, Golden]):
    """The golden tensors of one variant of a case by stage id, read and verified on first access."""

    def __init__(self, case: Case, variant: str) -> None:
        self._case, self.variant = case, variant
        self._entries: dict[str, Any] = case.manifest["targets"][variant]

    def __getitem__(self, stage: str) -> Golden:
        if stage not in self._entries:
            raise KeyError(f"{self._case.name} has no target {stage} in {self.variant}")
        place, held = f"{self.variant}/{stage}", self._case._held
        if place not in held:
            held[place] = self._case._golden(place, self._entries[stage])
        return held[place]

    def is_whole(self, stage: str) -> bool:
        """Is a tensor held in full? Told by the manifest; nothing is read."""
        return stage in self._entries and self._entries[stage]["form"] == "whole"

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(frozen=True)
class Case:
    """One golden case. Opened by `open_case`; arrays are read lazily."""

    folder: Path
    name: str
    manifest: dict[str, Any]

    @property
    def set(self) -> str:
        return self.folder.name

    @property
    def config(self) -> dict[str, Any]:
        """The model's configuration, as the manifest holds it."""
        return self.manifest["config"]

    @property
    def info(self) -> dict[str, Any]:
        """What a case needs besides tensors."""
        return self.manifest["info"]

    @property
    def provenance(self) -> dict[str, Any]:
        return self.manifest["provenance"]

    @property
    def identity(self) -> str:
        """Hash of the manifest, which holds the hash of every tensor."""
        return self.manifest["sha256"]

    @property
    def left_out(self) -> dict[str, str]:
        """Ids of the source that are no target here, with the reason."""
        return self.manifest["left_out"]

    @property
    def variants(self) -> tuple[str, ...]:
        """`recorded`, or the oracle's: `none` (pure float64) first, then `cast` (with the casts of the specification)."""
        return tuple(sorted(self.manifest["targets"], key=lambda v: (v != "none", v)))

    @cached_property
    def inputs(self) -> dict[str, np.ndarray]:
        """Input arrays by id, sorted."""
        return {name: self._array(f"inputs/{name}", entry) for name, entry in sorted(self.manifest["inputs"].items())}

    @property
    def targets(self) -> Targets:
        """Targets of the first variant."""
        return Targets(self, self.variants[0])

    def variant(self, name: str) -> Targets:
        """Targets of one variant (`recorded`, `none`, `cast`)."""
        if name not in self.manifest["targets"]:
            raise GoldenError(f"{self.name}: no variant {name}; there are {', '.join(self.variants)}")
        return Targets(self, name)

    def one(self, variant: str, stage: str) -> Golden | None:
        """One target, if the variant has it, without reading the others."""
        place, entry = f"{variant}/{stage}", self.manifest["targets"][variant].get(stage)
        if entry is None or place in self._held:
            return self._held.get(place)
        if place not in self._opened and entry["form"] == "whole":
            path = self.folder / f"{self.name}.h5"
            with _opened(self.name, path) as file:
                self._opened[place] = self._take(file, path, place, entry)
        self._held[place] = self._golden(place, entry)
        return self._held[place]

    def weights(self) -> dict[str, np.ndarray]:
        """The weights by official name, verified."""
        named = self.manifest["weights"]
        if not named:
            raise GoldenError(f"{self.name}: its manifest names no weights file")
        path = self.folder / named["file"]
        if path.parent != self.folder or not path.name:
            raise GoldenError(f"{self.name}: weights file {named.get('file')} is missing: {restore_hint(path)}")
        try:
            tensors = read_safetensors(path)
        except Missing:
            raise GoldenError(f"{self.name}: weights file {path.name} is missing: {restore_hint(path)}") from None
        except Refused as error:
            raise GoldenError(
                f"{self.name}: weights file {path.name} is unreadable ({error.problem}): {restore_hint(path)}"
            ) from None
        if weights_sha256(tensors) != named.get("sha256"):
            raise GoldenError(f"{self.name}: weights file {path.name} is altered: {restore_hint(path)}")
        return tensors

    @cached_property
    def _held(self) -> dict[str, Golden]:
        """Goldens read and verified so far: a run asks for each several times."""
        return {}

    @cached_property
    def _opened(self) -> dict[str, np.ndarray | GoldenError]:
        """Arrays of the variants read so far, not yet verified; opening the file costs more than reading from it."""
        return {}

    def _golden(self, place: str, entry: Mapping[str, Any]) -> Golden:
        dtype, shape = entry.get("as", entry["dtype"]), tuple(entry["shape"])
        if entry["form"] == "whole":
            return Whole(self._array(place, entry), dtype)
        parts: dict[str, Any] = {
            part: self._array(f"{place}/{part}", entry["parts"][part]) for part in PARTS[entry["form"]]
        }
        if entry["form"] == "rows":
            return self._fitting(place, Sampled(shape, dtype, entry["axis"], **parts))
        spec = SketchSpec(**{field.name: entry["spec"][field.name] for field in fields(SketchSpec)})
        whole: dict[str, Any] = {
            "rows": entry["rows"],
            "columns": entry["columns"],
            "sum_squares": entry["sum_squares"],
        }
        return self._fitting(place, Sketched(shape, dtype, Sketch(spec=spec, **whole, **parts)))

    def _fitting(self, place: str, golden: Sampled | Sketched) -> Golden:
        """The golden, if its parts are of one tensor of its shape. What compares it trusts that."""
        if problem := golden.problem():
            raise GoldenError(f"{self.name}: {place}: {problem}: {restore_hint(self.folder / f'{self.name}.h5')}")
        return golden

    def _array(self, place: str, entry: Mapping[str, Any]) -> np.ndarray:
        path = self.folder / f"{self.name}.h5"
        if place not in self._opened:
            self._read(path, place.split("/")[0])
        array = self._opened.pop(place)
        if isinstance(array, GoldenError):
            raise array
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            first = [int(i) for i in np.argwhere(~np.isfinite(array))[0]]
            raise GoldenError(f"{self.name}: {place} holds NaN or Inf, first at {first}: {restore_hint(path)}")
        if content_sha256(array) != entry["sha256"]:
            raise GoldenError(f"{self.name}: {place} is altered, its content hash does not match: {restore_hint(path)}")
        return array

    def _read(self, path: Path, group: str) -> None:
        """Every array of `inputs` or of a variant, with one opening of the file; what cannot be read as its error."""
        tables = self.manifest["inputs"] if group == "inputs" else self.manifest["targets"][group]
        with _opened(self.name, path) as file:
            for stage, entry in tables.items():
                parts = PARTS.get(entry.get("form", "whole"))
                for part in parts or ("",):
                    place = f"{group}/{stage}/{part}".rstrip("/")
                    self._opened[place] = self._take(file, path, place, entry["parts"][part] if parts else entry)

    def _take(self, file: H5File, path: Path, place: str, entry: Mapping[str, Any]) -> np.ndarray | GoldenError:
        try:
            return file.read(place, dtype=entry["dtype"], shape=entry["shape"])
        except Missing:
            return GoldenError(f"{self.name}: {place} is missing from {path.name}: {restore_hint(path)}")
        except Refused as error:
            return GoldenError(f"{self.name}: {place} {error.problem}: {restore_hint(path)}")


@contextmanager
def _opened(case: str, path: Path) -> Iterator[H5File]:
    try:
        with open_h5(path) as file:
            yield file
    except Refused as error:
        raise GoldenError(f"{case}: data file {path.name} {error.problem}: {restore_hint(path)}") from None


def open_case(folder: Path | str, name: str) -> Case:
    """Open a case of a set and verify its manifest, its data file's bytes and the set of keys in it."""
    folder = Path(folder)
    case = Case(folder, name, parse(folder / f"{name}.json"))
    if case.manifest["case"] != name:
        raise GoldenError(f"{folder / name}.json: manifest of another case ({case.manifest['case']}): rename it back")
    path, container = folder / f"{name}.h5", case.manifest["container"]
    try:
        with strict.open_file(path) as file:
            size, sha256 = os.fstat(file.fileno()).st_size, None
            if size == container["bytes"]:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    except Missing:
        raise GoldenError(f"{name}: data file {path.name} is missing: {restore_hint(path)}") from None
    except Refused as error:
        raise GoldenError(f"{name}: data file {path.name} {error.problem}: {restore_hint(path)}") from None
    if size != container["bytes"]:
        state = "truncated" if size < container["bytes"] else "longer than it was"
        raise GoldenError(
            f"{name}: data file {path.name} is {state} ({size} of {container['bytes']} bytes): {restore_hint(path)}"
        )
    if sha256 != container["sha256"]:
        raise GoldenError(f"{name}: data file {path.name} is altered: {restore_hint(path)}")
    _check_keys(case, path)
    return case


def verify(folder: Path | str) -> int:
    """Verify a whole set: every tensor, every weights file, nothing missing, nothing orphaned. Returns tensors read."""
    folder = Path(folder)
    names = {path.stem for path in folder.glob("*.json")}
    if not names:
        raise GoldenError(f"{folder}: holds no CASE.json: give a folder made by the import or regeneration tool")
    for path in sorted(folder.glob("*.h5")):
        if path.stem not in names:
            raise GoldenError(f"{path.name}: orphaned, no manifest {path.stem}.json: delete it or restore the manifest")
    count, used = 0, set()
    for name in sorted(names):
        case = open_case(folder, name)
        _check_provenance(case)
        used.add(case.manifest["weights"].get("file"))
        count += len(case.inputs)
        # A case of generated weights has none; that it has none is in the set's hash, which the ledger holds.
        count += len(case.weights()) if case.manifest["weights"] else 0
        count += sum(len(list(case.variant(v).items())) for v in case.variants)
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in used:
            raise GoldenError(f"{path.name}: orphaned, no case uses these weights: delete it or restore its case")
    return count


def _check_provenance(case: Case) -> None:
    lacking = [key for key in PROVENANCE if key not in case.provenance]
    if lacking or case.provenance["origin"] not in ORIGINS:
        said = f"lacks {', '.join(lacking)}" if lacking else f"has origin {case.provenance['origin']!r}"
        raise GoldenError(f"{case.name}: provenance {said}; origins are {', '.join(ORIGINS)}: write it with its tool")


def _check_keys(case: Case, path: Path) -> None:
    wanted = {f"inputs/{stage}" for stage in case.manifest["inputs"]}
    for variant, entries in case.manifest["targets"].items():
        for stage, entry in entries.items():
            parts = PARTS.get(entry["form"])
            wanted |= {f"{variant}/{stage}/{part}" for part in parts} if parts else {f"{variant}/{stage}"}
    with _opened(case.name, path) as file:
        found = file.places()
    for kind, places in (("missing from", wanted - found), ("not in the manifest of", found - wanted)):
        if places:
            some = ", ".join(sorted(places)[:3]) + (", ..." if len(places) > 3 else "")
            raise GoldenError(f"{case.name}: {some} {kind} {path.name}: {restore_hint(path)}")
