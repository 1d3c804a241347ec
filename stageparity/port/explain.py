"""Which known fault makes the tensors of a port, told from stored sketches (`stageparity.port.sketches`) without running a model.

A fault is as far away as the worst stage, of those where the port or the fault differs from the golden: one that predicts a
difference which the port does not show is far, and so is the reverse. Distances are in budgets (`units`): 1 is what noise
may reach. Chained tensors are explained by one fault. Forced ones show each fault at its own stages alone, so several are named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stageparity.golden import Golden
from stageparity.port.likeness import DIFFERS, Feeds, Likeness, Tensors
from stageparity.port.sketches import PASSES, Sketches, difference, goldens, held_of, units
from stageparity.stage import Stages
from stageparity.store import Case
from stageparity.subject import reference_of
from stageparity.tolerance import Tolerances

__all__ = ["LIMIT", "Explanation", "Match", "explain", "explain_case"]

#: Budgets within which a fault fits. Measured over known faults, made again by another library in another order of summation:
#: their own distance is at most 0.65, below 0.04 for half; the next fault is at least 6 away for 99 of 100, 100,000 for half.
LIMIT = 1.5
RIVAL = 2 * LIMIT  #: budgets within which another one makes the answer doubtful
HALF = 0.5  #: of the port's difference: so much at most remains without the fault
ONCE = 0.25  #: how far from 1 the coefficient may be
SHOWN = 5  #: matches that an explanation keeps


@dataclass(frozen=True)
class Match:
    """A known fault beside the tensors that are explained.

    distance: in budgets, the worst of ``stages``, those where either differs. alike: other faults that the traced stages do not
    tell from this one. coefficient: how many times the fault's difference the port's contains (1: once). left: the part
    of the port's difference that remains without it. way: whose right way the fault, or one of those alike, is.
    """

    fault: str
    what: str
    distance: float
    stages: tuple[str, ...]
    alike: tuple[str, ...] = ()
    coefficient: float = math.nan
    left: float = math.nan
    way: str = ""


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
            kind = "fits" if best.distance > LIMIT else "stands out"
            second = f", then `{others[0].fault}`, {_far(others[0].distance)}" if kind != "fits" and others else ""
            return f"no known fault {kind}: the nearest, `{best.fault}`, is {_far(best.distance)} budgets away{second}"
        names = f"known fault `{best.fault}`"
        if best.alike:
            listed = " or ".join(f"`{name}`" for name in self.faults[:SHOWN])
            more = len(self.faults) - SHOWN
            names = (
                f"known faults {listed}{f' and {more} more' if more > 0 else ''}, which these stages do not tell apart"
            )
        names += f" ({best.way})" if best.way else ""
        names += "," * bool(best.alike)
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
    feeds: Feeds | None = None,
) -> list[Explanation]:
    """Explanations of what differs, in pipeline order of their stages; none where nothing does, or where the store knows
    nothing of the case.

    place: SET/CASE. tensors: stage -> the port's tensor in the golden's layout, of the stages that it traces. passes: chained or
    forced. judging: the golden of each stage (`sketches.goldens`). allowed: the rms that is 1 for each stage
    (`sketches.units`), for a port that is approximate on purpose what is declared for it; stages without one are passed over.
    dtype: of the port's run; faults that only another dtype shows are left out. feeds: what feeds each stage; a
    forced run that does not trace all stages needs it.
    """
    known = [s for s in stages.sort(tensors) if s in allowed and s in judging]
    tables = {p: sketches.tables[place, p] for p in PASSES if (place, p) in sketches.tables}
    if not known or len(tables) < len(PASSES):
        return []
    port = Tensors.of([difference(tensors[s], judging[s], allowed[s]) for s in known])
    sizes = np.array([(allowed[s], math.sqrt(np.square(held_of(judging[s]), dtype=np.float64).mean())) for s in known])
    like = Likeness(sketches.faults, tables, passes, known, sizes, dtype, feeds)
    return _one(like, port) if passes == "chained" else _several(like, port, stages)


def explain_case(
    sketches: Sketches,
    case: Case,
    passes: Mapping[str, Mapping[str, Any]],
    tolerances: Tolerances,
    *,
    dtype: str = "float32",
    gate: str = "",
    feeds: Feeds | None = None,
) -> list[Explanation]:
    """What explains a case: one fault, if it makes all chained tensors what they are; else those that the forced ones show.
    Nothing where the sketches are of other goldens.

    passes: chained, forced -> stage -> tensor. gate: of the budgets that are 1 (as a run in ``dtype`` is judged). Sketches are of
    float32 runs: a float64 one is allowed what those are, and what the specification's casts move.
    """
    place, stages = f"{case.set}/{case.name}", tolerances.stages
    if sketches.goldens.get(place) != case.identity:
        return []
    known, found = dtype if dtype != "float64" else "float32", []
    judging = goldens(case.variant(reference_of(case, dtype)[0]), stages)
    for name in (name for name in PASSES if passes.get(name)):
        own = units(judging, tolerances, stages, gate or reference_of(case, known)[1], place, name)
        if dtype != known:
            cast = goldens(case.variant(reference_of(case, known)[0]), stages)
            moved = {s: difference(held_of(judging[s]), cast[s], unit).rms for s, unit in own.items()}
            own = {s: unit * math.hypot(1, moved[s]) if math.isfinite(moved[s]) else unit for s, unit in own.items()}
        how: dict[str, Any] = {"judging": judging, "allowed": own, "stages": stages, "dtype": known, "feeds": feeds}
        found.append(explain(sketches, place, passes[name], name, **how))
    everything = [e for e in found[0] if e.recognised] if found and passes.get("chained") else []
    return everything or next((e for e in reversed(found) if e), [])


def _one(like: Likeness, port: Tensors) -> list[Explanation]:
    """All that differs by one fault."""
    differs = port.rms > DIFFERS
    return [_explained(like, port, differs, like.candidates)] if differs.any() else []


def _several(like: Likeness, port: Tensors, stages: Stages) -> list[Explanation]:
    """A fault for each group of stages that differ. The one that explains most comes first; what no fault fits is grouped by
    family."""
    left, taken, unknown = port.rms > DIFFERS, np.zeros(len(like.stages), bool), np.zeros(len(like.stages), bool)
    worst, found = np.where(like.own, like.distances(port), 0).max(0), []
    while True:
        free = (worst <= LIMIT) & ~(like.own & taken[:, None]).any(0)
        count = np.where(free, (like.own & left[:, None]).sum(0), 0)
        if not count.any():
            break
        best = int(np.lexsort((worst, -count))[0])
        found.append(_explained(like, port, like.own[:, best], like.candidates))
        taken |= like.own[:, best]
        unknown |= like.unknown[:, best]
        left &= ~taken
    left &= ~unknown
    families = np.array([stages.template_of(s) for s in like.stages.tolist()])
    for name in dict.fromkeys(families[left].tolist()):
        differs = left & (families == name)
        touching: np.ndarray = like.own[differs].any(0)
        found.append(_explained(like, port, differs, like.candidates[touching[like.candidates]]))
    return sorted(found, key=lambda e: stages.order(e.stages[0]))


def _explained(like: Likeness, port: Tensors, differs: np.ndarray, candidates: np.ndarray) -> Explanation:
    """differs: (S,) the stages to explain."""
    over = differs[:, None] | like.own
    worst, named = np.where(over, like.distances(port), 0).max(0), tuple(like.stages[differs].tolist())
    order = candidates[np.argsort(worst[candidates], kind="stable")]
    if not len(order):
        return Explanation(named, (), False)
    made = like.of(order[0])
    apart = np.where((made.rms > DIFFERS)[:, None] | like.own, like.distances(made), 0).max(0)
    same, others = [f for f in order[1:] if apart[f] <= LIMIT], [f for f in order[1:] if apart[f] > LIMIT]
    matches = []
    for f in (order[0], *others[: SHOWN - 1]):
        fault, stages = like.faults[f], tuple(like.stages[over[:, f]].tolist())
        coefficient, left = like.contained(port, f, over[:, f])
        matches.append(Match(fault.name, fault.what, float(worst[f]), stages, (), coefficient, left))
    best = replace(matches[0], alike=tuple(like.faults[f].name for f in same))
    fits = best.distance <= LIMIT and best.left <= HALF and not abs(best.coefficient - 1) > ONCE
    rivals = [m for m in matches[1:] if m.distance < RIVAL and m.left <= HALF]
    return Explanation(named, (best, *matches[1:]), fits and not rivals)
