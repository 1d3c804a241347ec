"""A candidate's tensors against a golden case: whose error, how far over, and how much was seen.

A port's stages cannot be run alone, but its forced run says the same: there every recorded tensor was replaced by its golden,
so a stage that differs is wrong by itself, or is fed wrongly. Which of the two, its call tells: the tracer keeps fingerprints
of what each hooked call was given, and they are held against the goldens that should feed it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stageparity import tolerance
from stageparity.golden import Whole
from stageparity.port import mapping
from stageparity.port.candidate import Candidate
from stageparity.port.sketched import CHAINED_ONLY, Shown, held, is_sketched, reference
from stageparity.port.stagetrace import SHOWN, fingerprint
from stageparity.result import Result
from stageparity.run import CaseRun, Row, ids
from stageparity.stage import Stage, Stages
from stageparity.store import Case, Targets
from stageparity.subject import unfit
from stageparity.tolerance import Tolerances

__all__ = ["UNTRACED", "Coverage", "coverage", "judge"]

UNTRACED = "the dump does not hold it"
_LEAST = 9  # entries that an argument must have to be told from others


def judge(
    candidate: Candidate,
    case: Case,
    stages: Stages,
    tolerances: Tolerances,
    inputs: Callable[[str], list[str]],
    *,
    globs: str | None = None,
) -> CaseRun:
    """One case of a candidate. inputs: stage id -> ids of what feeds it. What the dump lacks is NOT RUN, by name.

    A verdict does not depend on ``globs``: stages that are not asked for are judged where whose error it is hangs on them.
    """
    variant, gate = reference(case, candidate.dtype)
    targets = case.variant(variant)
    wanted = ids(targets, stages, globs)
    result = CaseRun(case.name, case.set, variant, (), golden=case.identity)
    if reason := unfit(case, variant, candidate.dtype):
        return replace(result, not_run=tuple((stage, reason) for stage in wanted))
    bench = _Held(candidate, targets, stages, tolerances, gate, f"{case.set}/{case.name}", inputs)
    rows, not_run = [], []
    for stage in wanted:
        if stage not in candidate.chained:
            not_run.append((stage, candidate.notes.get(stage, UNTRACED)))
            continue
        try:
            rows.append(bench.row(stage))
        except tolerance.NoBudget as error:
            not_run.append((stage, str(error)))
    notes = [
        f"{stage}: {note}" for stage, note in candidate.notes.items() if stage in candidate.chained and note != SHOWN
    ]
    notes += [CHAINED_ONLY] * is_sketched(case)
    notes += [f"{name} is no stage of this case" for name in candidate.about.get("unknown", [])]
    notes += [f"STAGES: {name} is no stage of this case" for name in candidate.about.get("unused", [])]
    asked = {row.stage for row in rows}
    beside = [stage for stage in ids(targets, stages, None) if stage in candidate.chained and stage not in asked]
    for stage in beside:
        if any(stage in inputs(name) for name in asked) or any(name in asked for name in inputs(stage)):
            with contextlib.suppress(tolerance.NoBudget):
                rows.append(bench.row(stage))
    settled = (row for row in _settled(rows, inputs, targets) if row.stage in asked)
    return replace(result, rows=tuple(settled), not_run=tuple(not_run), notes=tuple(notes))


@dataclass
class _Held:
    candidate: Candidate
    targets: Targets
    stages: Stages
    tolerances: Tolerances
    gate: str
    case: str
    inputs: Callable[[str], list[str]]

    def __post_init__(self) -> None:
        self._prints: dict[str, Any] = {}

    def row(self, stage: str) -> Row:
        entry, _ = self.stages.find(stage) or (Stage(stage, ""), {})
        judged_as = self.stages.judged_as(stage)
        golden = self.targets[judged_as]

        def result(array: np.ndarray | Shown, kind: str) -> Result:
            rule = self.tolerances.rule(self.gate, judged_as, self.case, kind=kind)
            return held(stage, array, golden, rule, entry.axes)

        chain, isolated = tolerance.KINDS
        own = self.candidate.chained[stage]
        row = Row(stage, result(own, chain))
        if (forced := self._forced(stage, entry)) is not None:
            row = replace(row, forced=result(forced, isolated))
        if row.ok or (row.forced is not None and row.forced.ok):
            return row
        shown = own if forced is None else forced
        if isinstance(shown, Shown):
            if shown.shape != tuple(golden.shape) and math.prod(shown.shape) == math.prod(golden.shape):
                return replace(row, tracing="as many values in another shape: layout= in STAGES turns its axes")
        elif isinstance(golden, Whole):
            said = mapping.propose(shown, golden.array, lambda x: result(x, chain).ok)
            if said:
                return replace(row, tracing=said)
        if row.forced is None:
            return row
        kind, said = self._whose(stage)
        return replace(row, alone=row.forced if kind == "stage" else None, said=said)

    def _forced(self, stage: str, entry: Stage) -> np.ndarray | None:
        """Its tensor of the forced run, where that fed it goldens as far as anything was recorded."""
        if entry.own_chain or entry.derived:
            return None
        for name in self.inputs(stage):
            whole = isinstance(self.targets.get(name), Whole)  # of a sampled golden no run can go on
            if name in self.candidate.forced and ("not forced" in self.candidate.notes.get(name, "") or not whole):
                return None
        return self.candidate.forced.get(stage)

    def _whose(self, stage: str) -> tuple[str, str]:
        """(stage or wiring, in words) of a stage that differs in the forced run."""
        feeds = [name for name in self.inputs(stage) if not name.startswith("inputs.")]
        seen = [name for name in feeds if name in self.candidate.forced]
        unseen = [
            name for name in feeds if name in self.targets and name not in seen and not self.stages.is_exact(name)
        ]
        between = f", or that of {', '.join(unseen)}, which the adapter does not trace" if unseen else ""
        given = self.candidate.fed.get(stage)
        if not given:
            return "stage", f"its own error{between}: in the forced run it differs, and its inputs there are goldens"
        missing = []
        for name in seen:
            what, matches = self._given(stage, name)
            for outer in (outer for outer, within in self.candidate.inside.items() if stage in within and not what):
                what = self._given(outer, name)[0]
            if what:
                return "wiring", f"an error of its caller: it is given {what} where {name} belongs{between}"
            missing += [name] * (not matches)
        if seen and not missing and not between:
            return "stage", "its own error (inputs equal)"
        return "stage", f"its own error{between}: in the forced run it differs, and its inputs there are goldens"

    def _given(self, call: str, name: str) -> tuple[str, bool]:
        """(what the call that gives a stage was handed in the place of the golden ``name``, was it handed that golden)."""
        given, inside = self.candidate.fed.get(call, ()), self.candidate.inside.get(call, ())
        feeds = [n for n in self.inputs(call) if n in self.candidate.forced and n not in inside and self._print(n)]
        if name not in feeds:
            return "", name in inside or not self._print(name)
        if any(_same(x, self._print(name)) for x in given):
            return "", True
        rest = [x for x in given if not any(_same(x, self._print(n)) for n in feeds)]
        return next((what for x in rest if (what := self._what(x, name))), ""), False

    def _what(self, x: Any, wanted: str) -> str:
        """What an argument is that should be the golden of ``wanted``: another golden, that one in another order, or scaled."""
        shape, moments, order = self._print(wanted)
        if math.prod(x[0]) != math.prod(shape):
            return ""
        if list(x[0]) == list(shape) and _close(x[1], moments) and not _close(x[2], order, moments[2]):
            return f"{wanted} with its entries in another order"
        for name in self.targets:
            if name != wanted and self._print(name) is not None and _same(x, self._print(name)):
                # What was made of the wanted one may well stand beside it: queries beside the text that they are of.
                return "" if wanted in self._before(name) else name
        if moments[2] and x[1][2] and not _close(x[1], moments):
            factor = x[1][2] / moments[2]
            if _close([m / factor for m in x[1]], moments) and _close([x[2][0] / factor], order[:1], moments[2]):
                return f"{wanted} × {factor:.6g}"
        return ""

    def _before(self, name: str) -> set[str]:
        """Everything that a stage is made of."""
        found, todo = set[str](), [name]
        while todo:
            new = [feed for feed in self.inputs(todo.pop()) if feed not in found]
            found.update(new)
            todo += new
        return found

    def _print(self, name: str) -> Any:
        """Fingerprint of a golden that can be told from others; None where it cannot."""
        if name not in self._prints:
            golden = self.targets.get(name)
            whole = isinstance(golden, Whole) and golden.array.dtype.kind == "f" and golden.array.size >= _LEAST
            self._prints[name] = fingerprint(golden.array) if whole else None  # type: ignore[union-attr]
        return self._prints[name]


def _same(x: Any, golden: Any) -> bool:
    """Are these fingerprints of the same values? In another shape their order may differ: that is a layout."""
    if math.prod(x[0]) != math.prod(golden[0]) or not _close(x[1], golden[1]):
        return False
    return list(x[0]) != list(golden[0]) or _close(x[2], golden[2], golden[1][2])


def _close(mine: Iterable[float], theirs: Iterable[float], scale: float | None = None) -> bool:
    theirs = list(theirs)
    size = scale if scale is not None else max(map(abs, theirs), default=0.0)
    return all(abs(a - b) <= 1e-5 * size for a, b in zip(mine, theirs, strict=True))


def _settled(rows: list[Row], inputs: Callable[[str], list[str]], targets: Targets) -> Iterator[Row]:
    """What the rows say of each other. A tensor of the golden's shape that is the golden with its axes turned is a matter of
    tracing only if what reads it is right. A stage that no run could feed goldens (only rows or a sketch may be held) is wrong by
    itself where what feeds it is equal: raw inputs, or the nearest that is traced."""
    by_stage = {row.stage: row for row in rows}
    wrong = {row.stage for row in rows if not row.ok and not row.tracing}
    for row in rows:
        read_wrongly = any(row.stage in inputs(name) for name in wrong)
        same_shape = row.shown.errors  # a result with errors compared values: the shapes agree
        if row.tracing and same_shape and read_wrongly:
            row = replace(row, tracing="", said=row.said or row.tracing)
        if row.kind == "chained" and inputs(row.stage):
            traced, between = _origins(row.stage, inputs, by_stage, targets)
            if all(by_stage[name].ok for name in traced):
                others = f", or that of {', '.join(between)}, which the adapter does not trace" if between else ""
                row = replace(row, alone=row.chained, said=f"its own error{others}: in this run what feeds it is equal")
        yield row


def _origins(
    stage: str, inputs: Callable[[str], list[str]], by_stage: Mapping[str, Row], targets: Targets
) -> tuple[list[str], list[str]]:
    """(the nearest traced stages that a stage is made of, those of the case between that are not traced)."""
    traced: dict[str, None] = {}
    between: dict[str, None] = {}
    todo = inputs(stage)
    while todo:
        name = todo.pop(0)
        if name in by_stage:
            traced[name] = None
        elif name in targets and name not in between:
            between[name] = None
            todo += inputs(name)
    return list(traced), list(between)


# ---- how much was seen ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coverage:
    """Stages compared of all that the cases' goldens hold, and the paths that no case of them went through."""

    seen: int
    of: int
    paths: tuple[str, ...]
    never: tuple[str, ...]

    @property
    def share(self) -> float:
        return self.seen / self.of if self.of else 0.0

    def text(self) -> str:
        never = f"; never reached: {', '.join(self.never)}" if self.never else ""
        return f"{self.seen} of {self.of} stages{never}"

    def lacks(self, required: str) -> str:
        """What of a requirement is not met: shares ("0.9", "90%", "all") and names of paths. Raises ValueError."""
        for word in (part.strip() for part in required.split(",")):
            if word in self.never:
                return f"the path {word} was not reached"
            if word in self.paths:
                continue
            try:
                least = 1.0 if word == "all" else float(word.rstrip("%")) / (100 if word.endswith("%") else 1)
            except ValueError:
                least = -1.0
            if not 0 <= least <= 1:
                known = ", ".join((*self.paths, *self.never))
                raise ValueError(f"--require {word}: a share (0.9, 90%), all, or a path is needed: {known}")
            if self.share < least:
                return f"{self.share:.0%} of the stages were seen, {least:.0%} are required"
        return ""


def coverage(cases: Iterable[CaseRun], paths: Callable[[CaseRun], set[str]], every: Iterable[str]) -> Coverage:
    """paths: the paths that a case goes through, as far as its compared stages show; every: all there are."""
    cases, reached = list(cases), set()
    for case in cases:
        reached |= paths(case)
    seen, missing = sum(len(case.rows) for case in cases), sum(len(case.not_run) for case in cases)
    every = list(every)
    return Coverage(
        seen, seen + missing, tuple(p for p in every if p in reached), tuple(p for p in every if p not in reached)
    )
