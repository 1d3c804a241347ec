"""Plants faults one by one into a model and asks the harness: is it seen, where first, as what, and how clearly?

killed: some row differs. localised: the first row that differs (in pipeline order) is the expected one, in the expected pass
(its own error, its caller's, or the chain's), no stage fed alone differs but the fault's own, and other uses of the code that
it patches, fed alone, are what they were to the bit. margin: that stage's worst error over its tolerance. A fault is silent
when it keeps every shape and dtype and makes no NaN; one that crashes, or is loud, is counted apart. In low precision some
lie below the noise: invisible there, and named.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stageparity import run as runs
from stageparity import store
from stageparity.faults.plant import Fault, expected, other_uses, own_stages, planted
from stageparity.golden import GoldenError
from stageparity.result import Result
from stageparity.run import CaseRun
from stageparity.store import Case
from stageparity.subject import Subject
from stageparity.tolerance import Tolerances

__all__ = ["Bench", "Verdict", "as_json", "exit_code", "judge", "judge_all", "weakest_by_stage"]

LOCALISED = 0.95  #: share of faults that must first be reported at their own stage
CLEAR = 2.0  #: margins below this are named


@dataclass
class Bench:
    """Cases and models, opened and built on first use and shared by all faults. subject: makes the subject of a dtype."""

    subject: Callable[[str], Subject]
    goldens: Path
    tolerances: Tolerances
    device: str = "cpu"
    _cases: dict[str, Case] = field(default_factory=dict)
    _models: dict[tuple[str, str], Any] = field(default_factory=dict)
    _clean: dict[tuple[str, str, str], CaseRun] = field(default_factory=dict)

    def case(self, place: str) -> Case:
        if place not in self._cases:
            folder, _, name = place.rpartition("/")
            self._cases[place] = store.open_case(self.goldens / folder, name)
        return self._cases[place]

    def model(self, place: str, dtype: str) -> Any:
        if (place, dtype) not in self._models:
            self._models[place, dtype] = self.subject(dtype).build(self.case(place))
        return self._models[place, dtype]

    def clean(self, place: str, dtype: str, setting: str) -> CaseRun:
        """The run without a fault. Raises GoldenError where it differs: then nothing can be said of faults."""
        key = place, dtype, setting
        if key not in self._clean:
            subject = self.subject(dtype)
            with subject.setting(setting):
                run, _ = runs.run_case(subject, self.case(place), self.model(place, dtype), self.tolerances)
            if not run.rows:
                why = run.not_run[0][1] if run.not_run else "no stage has a golden"
                raise GoldenError(f"{run.name} in {dtype} compares nothing: {why}")
            if run.first_divergence is not None:
                stage = run.first_divergence.stage
                raise GoldenError(f"{run.name} in {dtype} differs at {stage} without any fault: mend the model first")
            self._clean[key] = run
        return self._clean[key]


@dataclass(frozen=True)
class Verdict:
    """What the harness said of one fault. kind: whose error it called the first row's (`run.Row.kind`). strays: stages fed
    alone that differ though the fault is not theirs."""

    fault: Fault
    dtype: str
    killed: bool
    stage: str | None
    kind: str | None
    expected_stage: str | None
    expected_kind: str | None
    margin: float
    strays: tuple[str, ...] = ()
    loud: tuple[str, ...] = ()
    crashed: str | None = None
    not_run: str | None = None
    tensor: Any = None  #: the first stage that differs, as the faulty model makes it

    @property
    def silent(self) -> bool:
        return self.crashed is None and not self.loud

    @property
    def localised(self) -> bool:
        wanted = (self.expected_stage, self.expected_kind)
        return self.killed and (self.stage, self.kind) == wanted and not self.strays


def judge(fault: Fault, bench: Bench, dtype: str | None = None) -> Verdict:
    """One fault in its case, in its own dtype unless another is given."""
    dtype = dtype or fault.dtype
    if fault.needs and fault.needs != bench.device:
        why = f"it acts on a {fault.needs.upper()} device alone"
        return Verdict(fault, dtype, False, None, None, None, None, 0.0, not_run=why)
    subject, clean = bench.subject(dtype), bench.clean(fault.place, dtype, fault.setting)
    stages, ids = subject.stages, [row.stage for row in clean.rows]
    case, (stage, kind) = bench.case(fault.place), expected(fault, stages, ids) or (None, None)
    try:
        with subject.setting(fault.setting):
            model = None if fault.rebuild else bench.model(fault.place, dtype)
            with planted(fault, model):
                model = model or subject.build(case)
                run, tensors = runs.run_case(subject, case, model, bench.tolerances)
    except Exception as error:  # a fault may break anything
        crash = f"{type(error).__name__}: {error}"[:200]
        return Verdict(fault, dtype, True, None, None, stage, kind, math.inf, crashed=crash)
    red = [row for row in run.rows if not row.ok]
    if not red:
        near = next((row for row in run.rows if row.stage == stage), None)
        margin = max((r.ratio for r in near.results), default=0.0) if near else 0.0
        return Verdict(fault, dtype, False, None, None, stage, kind, margin)
    first, own = red[0], set(own_stages(fault, stages, ids))
    strays = {r.stage for r in red if r.alone is not None and not r.alone.ok and r.stage not in own}
    strays |= _moved(clean, run, other_uses(fault, stages, ids))
    return Verdict(
        fault,
        dtype,
        True,
        first.stage,
        first.kind,
        stage,
        kind,
        max(r.ratio for r in first.results),
        strays=tuple(s for s in ids if s in strays),
        loud=tuple(row.stage for row in red if _is_loud(row) and not stages.derived(row.stage)),
        tensor=tensors.get(first.stage),
    )


def _moved(clean: CaseRun, run: CaseRun, stages: Iterable[str]) -> set[str]:
    """Those of ``stages`` that, fed alone, are not what they are without the fault, as far as their errors tell."""
    before, after = ({row.stage: _errors(row.alone) for row in r.rows} for r in (clean, run))
    return {stage for stage in stages if after[stage] != before[stage]}


def _errors(result: Result | None) -> str:
    return "" if result is None else repr((result.ok, result.ratio, result.max_abs, result.errors, result.worst_values))


def _is_loud(row: runs.Row) -> bool:
    """Did a shape, dtype or finiteness change? What is derived from a mask after the run has another shape with another
    mask, which the model itself never shows."""
    return any(not r.count for r in row.results)


def judge_all(
    faults: Sequence[Fault], bench: Bench, dtype: str | None = None, on_fault: Callable[[Verdict], None] | None = None
) -> list[Verdict]:
    """Faults one after another; ``dtype`` runs value faults there and leaves out those that belong to another dtype."""
    verdicts = []
    with bench.subject(dtype or "float64").scope():
        for fault in faults:
            if dtype is not None and fault.dtype not in ("float64", dtype):
                continue
            if dtype not in (None, "float64") and "none" not in bench.case(fault.place).variants:
                continue  # recordings judge one dtype each
            verdicts.append(judge(fault, bench, dtype))
            if on_fault is not None:
                on_fault(verdicts[-1])
    return verdicts


def exit_code(verdicts: Sequence[Verdict], invisible: Collection[str] = ()) -> int:
    """0: every silent fault that ran is killed, but for those known to be ``invisible`` in this dtype, and at least 95 % of
    the killed are first reported at their own stage. 1: not."""
    ran = [v for v in verdicts if v.not_run is None and v.silent]
    seen = [v for v in ran if v.killed]
    missed = [v for v in ran if not v.killed and v.fault.name not in invisible]
    return int(not ran or bool(missed) or sum(v.localised for v in seen) < LOCALISED * len(seen))


def weakest_by_stage(verdicts: Iterable[Verdict]) -> dict[str, tuple[str, float]]:
    """stage -> (fault, margin): the fault that each stage sees least clearly, for the tolerance report. Layer and sample
    numbers stand as they were reported; a margin of inf has no bound (padding touched, or an exact stage)."""
    weakest: dict[str, tuple[str, float]] = {}
    for v in verdicts:
        if v.killed and v.silent and v.stage is not None:
            weakest[v.stage] = min(
                weakest.get(v.stage, (v.fault.name, v.margin)), (v.fault.name, v.margin), key=_margin
            )
    return weakest


def _margin(found: tuple[str, float]) -> float:
    return found[1]


def as_json(verdicts: Sequence[Verdict], seconds: float) -> dict[str, Any]:
    """Counts over silent faults that ran; a margin of null has no bound (an exact stage differs)."""
    ran = [v for v in verdicts if v.not_run is None and v.silent]
    margins = [v.margin for v in ran if v.killed]
    return {
        "total": len(ran),
        "killed": sum(v.killed for v in ran),
        "localised": sum(v.localised for v in ran),
        "crashed": sum(v.crashed is not None for v in verdicts),
        "loud": sum(bool(v.loud) for v in verdicts),
        "not_run": sum(v.not_run is not None for v in verdicts),
        "minimum_margin": min(margins, default=None) if any(map(math.isfinite, margins)) else None,
        "median_margin": _finite(statistics.median(margins)) if margins else None,
        "margins_under_2": [v.fault.name for v in ran if v.killed and v.margin < CLEAR],
        "seconds": round(seconds, 1),
        "faults": [_fault_json(v) for v in verdicts],
    }


def _fault_json(v: Verdict) -> dict[str, Any]:
    """What a fault is and patches say its own fields (`Fault`); lists and reasons stand only where there are any."""
    margin = _finite(v.margin)
    told = {"strays": list(v.strays), "loud": list(v.loud), "crashed": v.crashed, "not_run": v.not_run}
    return {
        "name": v.fault.name,
        "killed": v.killed,
        "stage": v.stage,
        "kind": v.kind,
        "expected_stage": v.expected_stage,
        "expected_kind": v.expected_kind,
        "margin": margin and float(f"{margin:.4g}"),
        "case": v.fault.case,
        "dtype": v.dtype,
        **{key: value for key, value in told.items() if value},
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
