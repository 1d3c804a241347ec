"""Which known fault makes the tensors of a port, told from stored sketches (`stageparity.port.sketches`) without running a model.

A fault is as far away as the worst stage, of those where the port or the fault differs from the golden: one that predicts a
difference which the port does not show is far, and so is the reverse. Distances are in budgets (`units`): 1 is what noise
may reach. Chained tensors are explained by one fault. Forced ones show each fault at its own stages alone, so several are named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from stageparity.golden import Golden
from stageparity.port.sketches import (
    BUCKETS,
    PASSES,
    QUANTUM,
    Difference,
    Known,
    Sketches,
    Table,
    difference,
    goldens,
    held_of,
    units,
)
from stageparity.stage import Stages
from stageparity.store import Case
from stageparity.subject import reference_of
from stageparity.tolerance import Tolerances

__all__ = ["LIMIT", "Explanation", "Match", "explain", "explain_case"]

DIFFERS = 1.0  #: budgets from which on a difference wants an explanation
#: budgets within which a fault fits. Measured over all faults, made again by other libraries in other orders of summation: their
#: own distance is at most 1.1, that of the nearest other fault at least 6.
LIMIT = 1.5
RIVAL = 2 * LIMIT  #: budgets within which another one makes the answer doubtful
HALF = 0.5  #: of the port's difference: so much at most remains without the fault
ONCE = 0.25  #: how far from 1 the coefficient may be
GAIN = 3.0  #: noise of what a fault adds to a tensor, beside that of the tensor
SHOWN = 5  #: matches that an explanation keeps


@dataclass(frozen=True)
class Match:
    """A known fault beside the tensors that are explained.

    distance: in budgets, the worst of ``stages``, those where either differs. alike: other faults that the traced stages do not
    tell from this one. coefficient: how many times the fault's difference the port's contains (1: once). left: the part
    of the port's difference that remains without it.
    """

    fault: str
    what: str
    distance: float
    stages: tuple[str, ...]
    alike: tuple[str, ...] = ()
    coefficient: float = math.nan
    left: float = math.nan


@dataclass(frozen=True)
class Explanation:
    """What explains some stages that differ: faults by likeness, those that cannot be told from the first left out."""

    stages: tuple[str, ...]
    matches: tuple[Match, ...]
    recognised: bool

    @property
    def faults(self) -> tuple[str, ...]:
        """The fault that is recognised, and those that cannot be told from it; none where none fits."""
        return (self.matches[0].fault, *self.matches[0].alike) if self.recognised else ()

    def text(self) -> str:
        """In a sentence."""
        if not self.matches:
            return "no known fault changes these stages"
        best, *others = self.matches
        if not self.recognised:
            return f"no known fault fits: the nearest, `{best.fault}`, is {_far(best.distance)} budgets away"
        names = f"known fault `{best.fault}`"
        if best.alike:
            listed = " or ".join(f"`{name}`" for name in self.faults[:SHOWN])
            more = len(self.faults) - SHOWN
            names = (
                f"known faults {listed}{f' and {more} more' if more > 0 else ''}, which these stages do not tell apart,"
            )
        after = f"; the next, `{others[0].fault}`, is {_far(others[0].distance)} away" if others else ""
        return f"the same tensors as {names} within {_far(best.distance)} of a budget{after}"


def _far(distance: float) -> str:
    if not math.isfinite(distance):
        return "infinitely far" if math.isinf(distance) else "?"
    return f"{distance:,.0f}" if distance >= 100 else f"{distance:.1f}" if distance >= 10 else f"{distance:.2g}"


def explain(
    sketches: Sketches,
    place: str,
    tensors: Mapping[str, Any],
    passes: str,
    *,
    judging: Mapping[str, Golden],
    allowed: Mapping[str, float],
    stages: Stages,
    dtype: str = "float32",
) -> list[Explanation]:
    """Explanations of what differs, in pipeline order of their stages; none where nothing does, or where the store knows
    nothing of the case and pass.

    place: SET/CASE. tensors: stage -> the port's tensor in the golden's layout, of the stages that it traces. passes: chained or
    forced. judging: the golden of each stage (`sketches.goldens`). allowed: the rms that is 1 for each stage
    (`sketches.units`); stages without one are passed over. for a port that is approximate on purpose what
    is declared for it. dtype: of the port's run; faults that only another dtype shows are left out.
    """
    known = [s for s in stages.sort(tensors) if s in allowed and s in judging]
    if not known or any((place, p) not in sketches.tables for p in (passes, "chained")):
        return []
    tables = [sketches.tables[place, p] for p in (passes, "chained")]
    port = _port([difference(tensors[s], judging[s], allowed[s]) for s in known])
    sizes = [(allowed[s], _rms(judging[s])) for s in known]
    held = _Held(sketches.faults, tables, known, np.array(sizes), dtype)
    return held.one_fault(port) if passes == "chained" else held.several(port, stages)


def explain_case(
    sketches: Sketches,
    case: Case,
    passes: Mapping[str, Mapping[str, Any]],
    tolerances: Tolerances,
    *,
    dtype: str = "float32",
    gate: str = "",
) -> list[Explanation]:
    """What explains a case: one fault, if it makes all chained tensors what they are; else those that the forced ones show.
    Nothing where the sketches are of other goldens.

    passes: chained, forced -> stage -> tensor. gate: of the budgets that are 1 (as a run in ``dtype`` is judged; a float64
    run as in float32, for so the sketches were made).
    """
    place = f"{case.set}/{case.name}"
    if sketches.goldens.get(place) != case.identity:
        return []
    known = dtype if dtype != "float64" else "float32"
    variant, usual = reference_of(case, known)
    stages = tolerances.stages
    judging, found = goldens(case.variant(variant), stages), []
    for name in (name for name in PASSES if passes.get(name)):
        own = units(judging, tolerances, stages, gate or usual, place, name)
        how: dict[str, Any] = {"judging": judging, "allowed": own, "stages": stages, "dtype": known}
        found.append(explain(sketches, place, passes[name], name, **how))
    everything = [e for e in found[0] if e.recognised] if found and passes.get("chained") else []
    return everything or next((e for e in reversed(found) if e), [])


def _rms(golden: Golden) -> float:
    return math.sqrt(np.square(held_of(golden), dtype=np.float64).mean())


@dataclass(frozen=True)
class _Tensors:
    """Differences of all traced stages: rms (S,), numbers (S, BUCKETS), NaN where there are none, content (S,)."""

    rms: np.ndarray
    numbers: np.ndarray
    content: np.ndarray


def _port(found: Sequence[Difference]) -> _Tensors:
    none = np.full(BUCKETS, np.nan)
    numbers = [none if d.numbers is None else d.numbers for d in found]
    return _Tensors(
        np.array([d.rms for d in found]), np.array(numbers), np.array([d.content for d in found], np.uint64)
    )


@dataclass(frozen=True)
class _Rows:
    """Rows of a table that are of traced stages, in the units of the port."""

    s: np.ndarray
    f: np.ndarray
    rms: np.ndarray
    content: np.ndarray
    numbers: np.ndarray  #: NaN where the rms alone is kept

    @classmethod
    def of(cls, table: Table, place: Mapping[str, int], shown: np.ndarray, units: np.ndarray) -> _Rows:
        traced = np.array([place.get(stage, -1) for stage in table.stages])
        rows = np.flatnonzero((traced[table.stage] >= 0) & shown[table.fault])
        s, at = traced[table.stage[rows]], table.at[rows]
        times = table.units[table.stage[rows]] / units[s]
        numbers = np.full((len(rows), BUCKETS), np.nan)
        numbers[at >= 0] = table.numbers[at[at >= 0]] * (QUANTUM * times[at >= 0, None])
        return cls(s, table.fault[rows].astype(np.int64), table.rms[rows] * times, table.content[rows], numbers)

    def where(self, chosen: np.ndarray) -> _Rows:
        return _Rows(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def joined(self, other: _Rows) -> _Rows:
        parts = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return _Rows(*(np.concatenate(part) for part in parts))

    def spread(self, stages: int, faults: int) -> np.ndarray:
        """(S, F) rms, 0 where there is no row."""
        out = np.zeros((stages, faults))
        out[self.s, self.f] = self.rms
        return out


class _Held:
    """Faults (F) held against tensors, over the traced stages (S). Rows of a table are by (stage, fault)."""

    def __init__(
        self,
        faults: Sequence[Known],
        tables: Sequence[Table],
        stages: Sequence[str],
        sizes: np.ndarray,
        dtype: str,
    ) -> None:
        """tables: of the pass, then the chained one. sizes: (S, 2) unit and rms of each stage's golden."""
        self.faults, self.stages, units = faults, stages, sizes[:, 0]
        place, shown = {stage: s for s, stage in enumerate(stages)}, [f.dtype in ("float32", dtype) for f in faults]
        rows = [_Rows.of(table, place, np.array(shown), units) for table in tables]
        self.reach: np.ndarray = rows[-1].spread(len(stages), len(faults)) > DIFFERS
        own: np.ndarray = rows[0].spread(len(stages), len(faults)) > DIFFERS
        # A forced run that traces none of a fault's own stages shows it first where a chained one does.
        unseen = np.asarray(~own.any(0) & self.reach.any(0))
        first = (self.reach.argmax(0)[rows[-1].f] == rows[-1].s) & unseen[rows[-1].f]
        self.rows = rows[0].joined(rows[-1].where(first))
        self.size = self.rows.spread(len(stages), len(faults))
        self.by_first, self.candidates = unseen, np.unique(self.rows.f)
        # A fault that changes a tensor by its own size, or more, changes what comes of rounding in it as well.
        grown = np.where(np.isfinite(self.size), self.size, 0) * units[:, None] / np.maximum(sizes[:, 1:], 1e-30)
        self.noise = np.hypot(1, GAIN * grown)

    # ---- distances ----------------------------------------------------------------------------------------------------

    def distances(self, port: _Tensors) -> np.ndarray:
        """(S, F): how far each stage is from what each fault makes of it; where a fault changes nothing, from the golden."""
        rows, out = self.rows, np.repeat(port.rms[:, None], len(self.faults), axis=1)
        with np.errstate(invalid="ignore"):
            apart = np.sqrt(np.square(port.numbers[rows.s] - rows.numbers).mean(1))
            by_size = np.abs(port.rms[rows.s] - rows.rms)  # no sketch: at least so far
        apart = np.where(np.isfinite(apart), apart, np.where(np.isnan(by_size), 0.0, by_size))
        out[rows.s, rows.f] = np.where(port.content[rows.s] == rows.content, apart, np.inf)
        return out / self.noise

    def worst(self, differs: np.ndarray, apart: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(F,) the largest of each fault's distances, and (S, F) over which stages. differs: (S,) those to explain."""
        over = differs[:, None] | (self.size > DIFFERS)
        return np.where(over, apart, 0).max(0), over

    def of(self, fault: int) -> _Tensors:
        """What a fault of the table makes, as if a port had made it."""
        own, shape = self.rows.where(self.rows.f == fault), len(self.stages)
        made = _Tensors(np.zeros(shape), np.zeros((shape, BUCKETS)), np.zeros(shape, np.uint64))
        made.rms[own.s], made.numbers[own.s], made.content[own.s] = own.rms, own.numbers, own.content
        return made

    # ---- explanations -------------------------------------------------------------------------------------------------

    def one_fault(self, port: _Tensors) -> list[Explanation]:
        """All that differs by one fault."""
        differs = port.rms > DIFFERS
        return [self.explained(port, differs, self.candidates)] if differs.any() else []

    def explained(self, port: _Tensors, differs: np.ndarray, candidates: np.ndarray) -> Explanation:
        """differs: (S,) the stages to explain."""
        worst, over = self.worst(differs, self.distances(port))
        named = tuple(np.array(self.stages)[differs].tolist())
        order = candidates[np.argsort(worst[candidates], kind="stable")]
        if not len(order):
            return Explanation(named, (), False)
        made = self.of(order[0])
        alike, _ = self.worst(made.rms > DIFFERS, self.distances(made))
        same = [f for f in order[1:] if alike[f] <= LIMIT]
        others = [f for f in order[1:] if alike[f] > LIMIT]
        matches = [self.match(port, f, worst[f], over[:, f]) for f in (order[0], *others[: SHOWN - 1])]
        best = replace(matches[0], alike=tuple(self.faults[f].name for f in same))
        fits = best.distance <= LIMIT and best.left <= HALF and not abs(best.coefficient - 1) > ONCE
        rivals = [m for m in matches[1:] if m.distance < RIVAL and m.left <= HALF]
        return Explanation(named, (best, *matches[1:]), fits and not rivals)

    def match(self, port: _Tensors, f: int, worst: float, over: np.ndarray) -> Match:
        mine, theirs = port.numbers, self.of(f).numbers
        held = over & np.isfinite(mine).all(1) & np.isfinite(theirs).all(1)
        mine, theirs = mine[held], theirs[held]
        power, before = float(np.square(theirs).sum()), float(np.square(mine).sum())
        left = math.sqrt(np.square(mine - theirs).sum() / before) if before else 0.0
        fault, stages = self.faults[f], tuple(np.array(self.stages)[over].tolist())
        coefficient = float((mine * theirs).sum()) / power if power else math.nan
        return Match(fault.name, fault.what, float(worst), stages, (), coefficient, left)

    def several(self, port: _Tensors, stages: Stages) -> list[Explanation]:
        """A fault for each group of stages that differ. The one that explains most comes first; what no fault fits is grouped by
        family."""
        left, own, taken = port.rms > DIFFERS, self.size > DIFFERS, np.zeros(len(self.stages), bool)
        family, found = np.array([stages.template_of(s) for s in self.stages]), []
        worst = np.where(own, self.distances(port), 0).max(0)
        while True:
            free = (worst <= LIMIT) & ~(own & taken[:, None]).any(0)
            count = np.where(free, (own & left[:, None]).sum(0), 0)
            if not count.any():
                break
            best = int(np.lexsort((worst, -count))[0])
            found.append(self.explained(port, own[:, best], self.candidates))
            taken |= own[:, best]
            if self.by_first[best]:  # the same code at other places, whose differences no chained sketch tells
                taken |= self.reach[:, best] & np.isin(family, family[own[:, best]])
            left &= ~taken
        for name in dict.fromkeys(family[left].tolist()):
            differs = left & (family == name)
            touching: np.ndarray = own[differs].any(0)
            found.append(self.explained(port, differs, self.candidates[touching[self.candidates]]))
        return sorted(found, key=lambda e: stages.order(e.stages[0]))
