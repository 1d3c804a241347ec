"""What is kept of every known fault's tensors, so that a port can be held against them without running the reference.

For a case, a fault and a pass (chained, forced) each stage that the fault changes is kept as its *difference* to the golden: its
rms, and a CountSketch of it (`project`), whose distance to another sketch estimates the rms of the difference of the two. Both
are in units of the stage's budget (`units`). Exact stages are kept as a hash of their content. A tensor of another shape than
the golden's has no difference: the sketch is of the tensor itself, the hash of its shape.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from stageparity import strict
from stageparity.arrays import to_numpy
from stageparity.compare import compare
from stageparity.golden import Golden, GoldenError, Sampled, Sketched, whole
from stageparity.result import EXACT
from stageparity.run import ids
from stageparity.sketch import words
from stageparity.stage import Stages
from stageparity.store import Targets
from stageparity.strict_hdf5 import H5File, open_h5
from stageparity.tolerance import KINDS, NoBudget, Tolerances

__all__ = ["BUCKETS", "COLUMNS", "NUMBERS", "PASSES", "QUANTUM", "STORE", "Difference", "Known", "Sketches", "Table"]
__all__ += ["difference", "goldens", "held_of", "project", "units"]

STORE = Path("measured") / "sketches.json"  #: in a golden folder: what is known of which fault in which case
NUMBERS = STORE.with_name("fault_sketches.h5")  #: the numbers of it
PASSES = dict(zip(("chained", "forced"), KINDS, strict=True))  #: pass -> the kind of budget that judges it
BUCKETS = 24
QUANTUM = 1 / 32  #: of a budget: what stored numbers are multiples of
_STREAM = 0x5EE7
_OF_ZEROS = 1e-6  # unit of a golden that is zero throughout, whose budget is nothing
_MAX_BYTES = 16 << 20
_LARGEST = 2**31 - 1


# ---- one tensor ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """How a tensor differs from its golden. rms, numbers (BUCKETS,): in units of the budget; rms is inf where the difference has
    no size (exact values, another shape, NaN). content: hash of exact values, or of the shape that is not the golden's."""

    rms: float
    numbers: np.ndarray | None = None
    content: int = 0


def difference(tensor: Any, golden: Golden, unit: float) -> Difference:
    """tensor: the whole one, in the golden's layout; of one that is held in part only that part is compared. unit: what is 1
    (`units`). Raises GoldenError for a golden that is itself a sketch."""
    array, target = to_numpy(tensor)[0], held_of(golden)
    exact = target.dtype.kind in "bui"
    if tuple(array.shape) != tuple(golden.shape):
        content = _hash(repr(tuple(array.shape)).encode() + (_values(array) if exact else b""))
        usable = not exact and array.size and np.isfinite(array).all()
        return Difference(math.inf, project(array, unit) if usable else None, content)
    if isinstance(golden, Sampled):
        array = np.take(array, golden.index, axis=golden.axis)
    if exact:
        same = np.array_equal(array, target)
        return Difference(0.0 if same else math.inf, None, 0 if same else _hash(_values(array)))
    d = array.astype(np.float64) - target
    if not np.isfinite(d).all():
        return Difference(math.inf)
    return Difference(math.sqrt(np.square(d).mean()) / unit, project(d, unit))


def held_of(golden: Golden) -> np.ndarray:
    """The values of a golden that are there. Raises GoldenError for one that is itself a sketch."""
    if isinstance(golden, Sketched):
        raise GoldenError("a golden known by its sketch alone has no difference to sketch")
    return golden.sample if isinstance(golden, Sampled) else golden.array


def project(x: np.ndarray, unit: float = 1.0) -> np.ndarray:
    """(BUCKETS,) float64: every element goes with a sign into one bucket, both drawn by its flat place alone. The rms over the
    buckets estimates that of ``x / unit``, within 14 % (one standard deviation) for a dense one."""
    bucket, sign = _places(1 << max(x.size - 1, 1).bit_length())
    sums = np.bincount(bucket[: x.size], sign[: x.size] * x.reshape(-1), minlength=BUCKETS)
    return sums / (unit * math.sqrt(x.size / BUCKETS))


@cache
def _places(size: int) -> tuple[np.ndarray, np.ndarray]:
    drawn = words(0, _STREAM, np.arange(size))
    bucket = ((drawn >> np.uint64(32)) * np.uint64(BUCKETS)) >> np.uint64(32)
    return bucket.astype(np.int64), 1.0 - 2.0 * (drawn & np.uint64(1)).astype(np.float64)


def _values(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array, np.int64).tobytes()


def _hash(data: bytes) -> int:
    """Never 0, which stands for the golden's."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little") | 1


def units(
    targets: Mapping[str, Golden], tolerances: Tolerances, stages: Stages, gate: str, place: str, passes: str
) -> dict[str, float]:
    """Stage -> the rms of a difference that its budget allows; of those that have a budget and a golden with values.

    Where a gate bounds single values alone: the rms of as many normal numbers whose largest is as large as that. Where values
    are compared bit for bit: one float32 rounding of real ones (a machine's own constants differ by so much), 1 of others.
    place: SET/CASE.
    """
    found = {}
    for stage, golden in targets.items():
        if isinstance(golden, Sketched):
            continue
        values = held_of(golden)
        try:
            rule = tolerances.rule(gate, stages.judged_as(stage), place, kind=PASSES[passes])
        except NoBudget:
            continue
        if values.dtype.kind != "f":
            found[stage] = 1.0
            continue
        scale = float(np.sqrt(np.square(values, dtype=np.float64).mean()))
        allowed = float(np.finfo(np.float32).eps)
        if rule is not EXACT:
            budgets = compare(stage, values, whole(values), rule, stages.axes(stage)).budgets
            allowed = budgets.get("rms", budgets.get("max", math.inf) / math.sqrt(2 * math.log(max(values.size, 2))))
        if math.isfinite(allowed):
            found[stage] = allowed * scale if scale else _OF_ZEROS
    return found


def goldens(targets: Targets, stages: Stages) -> dict[str, Golden]:
    """What judges each stage of a case, those without a golden of their own included."""
    return {stage: targets[stages.judged_as(stage)] for stage in ids(targets, stages)}


# ---- the store ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """A fault of the store. dtype: of the run that it was planted in."""

    name: str
    what: str
    dtype: str


@dataclass(frozen=True)
class Table:
    """All differences of one case and pass, a row each: the fault (a number), the stage (a number), rms, content, and the
    row of ``numbers`` that holds its sketch (-1: the rms alone is kept)."""

    stages: tuple[str, ...]
    units: np.ndarray
    fault: np.ndarray
    stage: np.ndarray
    rms: np.ndarray
    content: np.ndarray
    at: np.ndarray
    numbers: np.ndarray  #: (rows, BUCKETS) int32, in QUANTUM

    @classmethod
    def of(cls, found: Mapping[tuple[int, str], Difference], units: Mapping[str, float], most: int) -> Table:
        """found: (number of the fault, stage) -> its difference. most: so many stages of a fault are kept with their
        sketch, the first in the order of ``units``, and its last one; of the others the rms."""
        place = {stage: n for n, stage in enumerate(units)}
        keys = sorted(found, key=lambda key: (key[0], place[key[1]]))
        sketched: dict[int, list[str]] = {}
        for fault, stage in keys:
            if found[fault, stage].numbers is not None:
                sketched.setdefault(fault, []).append(stage)
        at = np.full(len(keys), -1, np.int32)
        numbers: list[np.ndarray] = []
        for row, (fault, stage) in enumerate(keys):
            own = sketched.get(fault, [])
            if stage in (*own[:most], *own[-1:]):
                at[row] = len(numbers)
                scaled = np.rint(np.asarray(found[fault, stage].numbers) / QUANTUM)
                numbers.append(np.minimum(np.maximum(scaled, -_LARGEST), _LARGEST).astype(np.int32))
        return cls(
            tuple(units),
            np.array(list(units.values())),
            np.array([f for f, _ in keys], np.uint16),
            np.array([place[stage] for _, stage in keys], np.uint16),
            np.array([found[key].rms for key in keys], np.float32),
            np.array([found[key].content for key in keys], np.uint64),
            at,
            np.array(numbers, np.int32).reshape(-1, BUCKETS),
        )


COLUMNS = {
    "fault": "uint16",
    "stage": "uint16",
    "rms": "float32",
    "content": "uint64",
    "at": "int32",
    "numbers": "int32",
}


@dataclass(frozen=True)
class Sketches:
    """The store. tables: (SET/CASE, pass) -> its table. goldens: SET/CASE -> identity of the case that it was made of."""

    faults: tuple[Known, ...]
    tables: Mapping[tuple[str, str], Table]
    goldens: Mapping[str, str]

    @classmethod
    def load(cls, goldens: Path) -> Sketches | None:
        """From a golden folder; None where it has none. Raises GoldenError, or Refused, for what cannot be trusted."""
        try:
            document = strict.read_json(goldens / STORE, inside=goldens)
        except strict.Missing:
            return None
        data = strict.read_bytes(goldens / NUMBERS, limit=_MAX_BYTES, inside=goldens)
        if hashlib.sha256(data).hexdigest() != document.get("numbers"):
            raise GoldenError(f"{goldens / NUMBERS} is not the file that {STORE.name} tells of: restore both")
        try:
            faults = tuple(Known(name, what, dtype) for name, (what, dtype) in document["faults"].items())
            with open_h5(goldens / NUMBERS) as file:
                tables = {
                    (place, passes): _table(file, f"{place}/{passes}", table, len(faults))
                    for place, case in document["cases"].items()
                    for passes, table in case["passes"].items()
                }
            return cls(faults, tables, {place: case["golden"] for place, case in document["cases"].items()})
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise GoldenError(f"{goldens / STORE} is not of the form of this version ({error!r}): restore it") from None


def _table(file: H5File, place: str, entry: Mapping[str, Any], num_faults: int) -> Table:
    rows, sketched, units = entry["rows"], entry["sketches"], entry["units"]
    shapes: dict[str, tuple[int, ...]] = {name: (rows,) for name in COLUMNS} | {"numbers": (sketched, BUCKETS)}
    read = {name: file.read(f"{place}/{name}", dtype=COLUMNS[name], shape=shapes[name]) for name in COLUMNS}
    found = Table(tuple(units), np.array(list(units.values()), np.float64), **read)
    bounds = ((found.fault, num_faults), (found.stage, len(units)), (found.at, sketched))
    if any((column >= bound).any() for column, bound in bounds):
        raise IndexError(f"{place}: a row of no fault, stage or sketch")
    return found
