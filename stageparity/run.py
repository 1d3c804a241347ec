"""A parity run: golden cases through a model, every stage judged up to three times.

*Chained*: the case runs from its raw inputs, so a stage's error holds all errors before it. *Forced*: the same run, but each
recorded tensor is judged and then replaced by its golden, so a stage works on golden inputs through the model's own wiring.
*Alone*: the stage's own code on golden inputs, through the table's wiring. So: alone wrong, the stage is wrong; forced wrong
and alone right, its caller is; chained wrong and forced right, the error is inherited.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from stageparity import manifest, rounding, store, tolerance
from stageparity.arrays import like, to_numpy
from stageparity.compare import Result, compare, nothing_compared
from stageparity.golden import Golden, Whole
from stageparity.result import EXACT
from stageparity.stage import NotHeld, Stage, Stages, Ties, fill
from stageparity.store import Case, CaseRef, Targets
from stageparity.subject import Bench, Subject, fed, reference_of, unfit
from stageparity.tolerance import Tolerances

__all__ = ["CaseRun", "Row", "Run", "Trace", "forced_tensors", "ids", "promised", "run", "run_case"]


@dataclass(frozen=True)
class Row:
    """One stage of one case. A pass is None where it could not judge the stage."""

    stage: str
    chained: Result | None = None
    forced: Result | None = None
    alone: Result | None = None
    wiring: str = ""  #: the file that feeds the stage
    tracing: str = ""  #: the mapping under which a foreign tensor is the golden, where that is what differs
    said: str = ""  #: whose error it is, in words, where more is known than the passes tell

    @property
    def results(self) -> list[Result]:
        """What judged the stage, the pass that convicts first."""
        return [r for r in (self.alone, self.forced, self.chained) if r is not None]

    @property
    def ok(self) -> bool:
        return all(r.ok for r in self.results)

    @property
    def shown(self) -> Result:
        """The result that a table shows: what a user of the model gets."""
        return self.chained or self.results[0]

    @property
    def failed(self) -> Result | None:
        """The result that convicts: the stage's own if that is wrong."""
        return next((r for r in self.results if not r.ok), None)

    @property
    def kind(self) -> str:
        """Whose error it is: `stage`, `wiring` (its caller's), `inherited`; nothing where all is equal. A stage that could not
        be fed alone shares `wiring` with its caller, one that could not be fed at all is `chained`; `tracing` is no error of
        the model."""
        if self.ok:
            return ""
        if self.tracing:
            return "tracing"
        if self.alone is not None and not self.alone.ok:
            return "stage"
        if self.forced is not None and not self.forced.ok:
            return "wiring"
        return "chained" if self.alone is None and self.forced is None else "inherited"


@dataclass(frozen=True)
class CaseRun:
    """All rows of one case, in pipeline order, and what could not be judged, with the reason."""

    case: str
    set: str
    reference: str  #: which goldens judged: none, cast or recorded
    rows: tuple[Row, ...]
    not_run: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0
    notes: tuple[str, ...] = ()  #: what is the machine's doing, not the model's
    golden: str = ""  #: hash of what judged it

    @property
    def name(self) -> str:
        return f"{self.set}/{self.case}"

    @property
    def first_divergence(self) -> Row | None:
        return next((row for row in self.rows if not row.ok), None)


@dataclass(frozen=True)
class Run:
    """about: dtype and what else the subject says of its runs."""

    cases: tuple[CaseRun, ...]
    dtype: str
    about: Mapping[str, str] = field(default_factory=dict)
    fingerprint: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nothing(self) -> bool:
        return nothing_compared([r for case in self.cases for row in case.rows for r in row.results])

    @property
    def exit_code(self) -> int:
        """0 every compared stage is equal, 1 some differ, 2 only because of how they were traced, 3 nothing was compared."""
        kinds = {row.kind for case in self.cases for row in case.rows} - {""}
        return 2 if kinds == {"tracing"} else 3 if self.nothing else int(bool(kinds))


class Trace:
    """A tap that keeps tensors by stage id; parts of one id are joined along axis 0.

    wanted: which to keep (None: all). golden: what to go on with in the place of a tensor, None for the tensor itself.
    """

    def __init__(
        self, wanted: Callable[[str], bool] | None = None, golden: Callable[[str], np.ndarray | None] | None = None
    ) -> None:
        self._wanted, self._golden = wanted, golden
        self._parts: dict[str, list[Any]] = {}

    def wants(self, stage_id: str) -> bool:
        return self._wanted is None or self._wanted(stage_id)

    def __call__(self, stage_id: str, x: Any) -> Any:
        if not self.wants(stage_id):
            return x
        parts = self._parts.setdefault(stage_id, [])
        before = sum(part.shape[0] for part in parts)
        parts.append(x)
        golden = self._golden(stage_id) if self._golden is not None else None
        if golden is None:
            return x
        shape = tuple(x.shape)
        part = golden[before : before + shape[0]] if shape and tuple(golden.shape) != shape else golden
        return like(part, x) if tuple(part.shape) == shape else x  # another shape: that is judged, and goes on as it is

    def tensors(self) -> dict[str, Any]:
        return {stage: parts[0] if len(parts) == 1 else _joined(parts) for stage, parts in self._parts.items()}


def _joined(parts: list[Any]) -> Any:
    if hasattr(parts[0], "new_tensor"):
        import torch

        return torch.cat(parts)
    return np.concatenate(parts)


def run(
    subject: Subject,
    refs: Sequence[CaseRef],
    tolerances: Tolerances,
    *,
    globs: str | None = None,
    alone: bool = True,
    on_case: Callable[[CaseRun, Mapping[str, Any]], None] | None = None,
) -> Run:
    """Run cases one after another. ``on_case`` sees each finished case and its chained tensors.

    alone: also forced and alone, not only chained. Raises GoldenError for goldens that cannot be trusted, ValueError where
    the model refuses the case.
    """
    finished = []
    with subject.scope():
        for ref in refs:
            case = store.open_case(ref.folder, ref.name)
            done, tensors = run_case(subject, case, None, tolerances, globs=globs, alone=alone)
            finished.append(done)
            if on_case is not None:
                on_case(done, tensors)
        return Run(tuple(finished), subject.dtype, subject.about, subject.fingerprint())


def run_case(
    subject: Subject,
    case: Case,
    model: Any,
    tolerances: Tolerances,
    *,
    globs: str | None = None,
    alone: bool = True,
) -> tuple[CaseRun, dict[str, Any]]:
    """One case through one model (None: the subject builds it): its rows, and the chained tensors under their stage ids."""
    start = time.perf_counter()
    variant, gate = reference_of(case, subject.dtype)
    targets, stages = case.variant(variant), subject.stages
    alone = alone and subject.forces
    wanted = ids(targets, stages, globs, alone=alone)
    judge = _Judge(stages, tolerances, gate, f"{case.set}/{case.name}", targets)
    result = CaseRun(case.name, case.set, variant, (), golden=case.identity)
    try:
        if reason := unfit(case, variant, subject.dtype):
            raise NotHeld(reason)
        model = subject.build(case) if model is None else model
    except NotHeld as reason:
        return replace(result, not_run=tuple((stage, str(reason)) for stage in wanted)), {}
    bench = subject.bench(case, model, targets)
    chosen = set(wanted)
    chained = Trace(None if globs is None else chosen.__contains__)
    bench.run(chained)
    found = chained.tensors()
    own: dict[str, Any] = {}
    forced: dict[str, Any] = {}
    if alone:
        own = dict(_alone(bench, stages, wanted))
        forced = forced_tensors(bench, case, stages, chosen)
    rows, not_run, notes = [], [], []
    for stage in wanted:
        try:
            row, note = judge.row(bench, stage, found, forced, own)
        except tolerance.NoBudget as error:
            not_run.append((stage, str(error)))
            continue
        rows.append(row)
        notes += [note] * bool(note)
    done = replace(result, rows=tuple(rows), not_run=tuple(not_run), notes=tuple(notes))
    return replace(done, seconds=time.perf_counter() - start), found


def promised(ref: CaseRef, stages: Stages, dtype: str) -> list[str]:
    """The rows that a run of a case in ``dtype`` has, in pipeline order, from its manifest alone."""
    case = Case(ref.folder, ref.name, manifest.parse(ref.folder / f"{ref.name}.json"))
    return ids(case.variant(reference_of(case, dtype)[0]), stages, None, alone=True)


def ids(targets: Targets, stages: Stages, globs: str | None = None, *, alone: bool = False) -> list[str]:
    """What targets judge, in pipeline order. alone: with what can only be judged alone."""
    return stages.matching([*targets, *_judged_by_others(stages, targets, alone)], globs)


def _judged_by_others(stages: Stages, targets: Targets, alone: bool) -> Iterator[str]:
    """Ids without a golden of their own, judged by that of another."""
    borrowers = [e for e in stages if e.golden and (e.alone_only is None or (alone and e.alone_only(targets)))]
    for stage_id in targets:
        found = stages.find(stage_id)
        for entry in borrowers:
            if found is None or found[0].template != entry.golden:
                continue
            if entry.alone_only is None or targets.is_whole(stage_id):
                yield fill(entry.template, found[1])


def _alone(bench: Bench, stages: Stages, stage_ids: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(id, tensor) of every stage that the case can feed from its goldens. One that reads raw inputs alone is left out: fed
    alone or chained, it is the same run."""
    for stage_id in stage_ids:
        found = stages.find(stage_id)
        if found is None or found[0].reads_raw:
            continue
        try:
            yield stage_id, bench.alone(stage_id)
        except NotHeld:
            continue


def forced_tensors(bench: Bench, case: Case, stages: Stages, chosen: Collection[str]) -> dict[str, Any]:
    """The tensors of a forced run, of those ids that it feeds nothing but goldens."""

    def golden(stage_id: str) -> np.ndarray | None:
        found = bench.targets.get(stage_id)
        return found.array if isinstance(found, Whole) else None

    def wanted(stage_id: str) -> bool:
        found = stages.find(stage_id)
        return found is not None and not found[0].own_chain and stage_id in bench.targets

    tap = Trace(wanted, golden)
    bench.run(tap)
    return {s: x for s, x in tap.tensors().items() if s in chosen and fed(bench, case, stages, s)}


@dataclass(frozen=True)
class _Judge:
    """Rows of one case: which golden and which budget judge a stage, and what excuses it."""

    stages: Stages
    tolerances: Tolerances
    gate: str
    case: str
    targets: Targets

    def row(
        self, bench: Bench, stage: str, chained: Mapping[str, Any], forced: Mapping[str, Any], own: Mapping[str, Any]
    ) -> tuple[Row, str]:
        """The row of a stage, and a note where the machine explains what differs. Raises NoBudget."""
        found = self.stages.find(stage)
        entry, places = found or (Stage(stage, ""), {})
        judged_as = self.stages.judged_as(stage)
        golden = self.targets[judged_as]

        def result(tensors: Mapping[str, Any], kind: str) -> Result:
            rule = self.tolerances.rule(self.gate, judged_as, self.case, kind=kind)
            return compare(stage, tensors.get(stage), golden, rule, entry.axes)

        chain, isolated = tolerance.KINDS
        alone = result(own, isolated) if stage in own else None
        row = Row(
            stage,
            None if entry.alone_only else result(chained, chain),
            result(forced, isolated) if stage in forced else None,
            alone if alone is not None or not entry.reads_raw else result(chained, chain),
            next((c.file for c in entry.wiring if c.file), ""),
        )
        bits = self._bits(bench, stage, own.get(stage, chained.get(stage)), entry) if row.alone is not None else None
        if row.alone is not None and bits is not None and bits.ratio > max(row.alone.ratio, 1):
            row = replace(row, alone=bits)  # within its error budget, and rounded in the wrong place
        if entry.machine is not None and not row.ok and (note := _machine(entry, golden, chained.get(stage))):
            excused = replace(row.shown, ok=True, problems=())
            return Row(stage, excused), note
        if entry.ties is not None and not row.ok and (tie := self._tie(row, places, entry.ties, chained)) is not None:
            return Row(stage, tie), ""
        return row, ""

    def _bits(self, bench: Bench, stage: str, found: Any, entry: Stage) -> Result | None:
        if entry.rounded is None or found is None:
            return None
        try:
            theirs = bench.rounded(stage)
        except NotHeld:
            return None
        return rounding.judge(stage, found, theirs, entry.axes, entry.spreads)

    def _tie(self, row: Row, places: Mapping[str, str], ties: Ties, chained: Mapping[str, Any]) -> Result | None:
        """Free-running tokens may part from the golden's where the golden's token and the other tie within the noise: the run's
        own logit error (at that step, where its logits follow the golden's text), and never more than logits may err by. What
        follows the parting is another text and judges nothing. None where that is no excuse."""
        logits_id, tokens_id, lengths_id = (fill(each, places) for each in (ties.logits, ties.tokens, ties.lengths))
        logits, tokens = self.targets.get(logits_id), self.targets.get(tokens_id)
        own, mine = chained.get(logits_id), chained.get(tokens_id)
        if not (isinstance(tokens, Whole) and isinstance(logits, Whole)) or mine is None or own is None:
            return None
        rule = self.tolerances.rule(self.gate, logits_id, self.case)
        found = compare(logits_id, own, logits, rule)
        if not found.errors:  # logits of another shape, or NaN: there is no noise to speak of
            return None
        error = np.abs(to_numpy(own)[0].astype(np.float64) - logits.array) / _rms(logits.array)
        parted = set[int]()
        for b, golden_row in enumerate(tokens.array):
            said = to_numpy(mine)[0][b]
            same = said[: len(golden_row)] == golden_row[: len(said)]
            if not same.all():
                parting = int(np.argmin(same))
                parted.add(b)
                margin = self._margin(tokens_id, golden_row, logits.array[b], parting, int(said[parting]), b)
                own_text = _follows(logits.array[b], golden_row, parting)
                noise = float(error[b, parting].max()) if own_text else found.errors["max"]
                if not margin <= 2 * min(noise, found.budgets.get("max", np.inf)):
                    return None
        lengths, ends, other = self.targets.get(lengths_id), chained.get(lengths_id), set[int]()
        if isinstance(lengths, Whole) and ends is not None:
            other = set(np.flatnonzero(to_numpy(ends)[0] != lengths.array).tolist())
        if not parted or other - parted:  # the same tokens, and another end: no tie says why
            return None
        why = "parts only where two logits tie within the noise"
        return replace(row.shown, ok=True, problems=(), rule=replace(EXACT, why=why))

    def _margin(self, stage: str, golden_S: Any, logits_SU: Any, step: int, token: int, row: int) -> float:
        """How far ``token`` lies below the golden's at a step, as a multiple of the logits' rms: as the margins of the case say,
        else as the golden's logits do, so long as they speak of the golden's own text. Infinite where nothing tells."""
        if (held := self.tolerances.margins.get(self.case, {}).get(stage)) is not None:
            return held[row][step].get(token, np.inf) if row < len(held) and step < len(held[row]) else np.inf
        if not _follows(logits_SU, golden_S, step) or not 0 <= token < logits_SU.shape[-1]:
            return float(np.inf)
        best, other = logits_SU[step, [golden_S[step], token]].astype(np.float64)
        return float((best - other) / _rms(logits_SU))


def _follows(logits_SU: np.ndarray, golden_S: np.ndarray, step: int) -> bool:
    """Are the tokens up to a step those that the logits say?"""
    return np.array_equal(logits_SU[: step + 1].argmax(-1), golden_S[: step + 1])


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x, dtype=np.float64).mean()))


def _machine(entry: Stage, golden: Golden, found: Any) -> str:
    """Why a constant that is not the stored one is no fault of the model: it is what this machine's libraries give."""
    assert entry.machine is not None
    if not isinstance(golden, Whole) or found is None:
        return ""
    mine = to_numpy(found)[0]
    if mine.shape != golden.array.shape or not np.array_equal(mine, entry.machine(golden.array)):
        return ""
    differ = int((mine != golden.array).sum())
    return (
        f"{entry.template}: this machine's libraries differ in {differ} of {mine.size} entries; the stored one was used"
    )
