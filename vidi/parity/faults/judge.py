"""Plants faults one by one into the model and asks the harness: is it seen, where first, and how clearly?

killed: some row differs. localised: the first row that differs (in pipeline order, chained or alone) is the expected one,
no stage fed alone differs but the fault's own, and other uses of the code it patches, fed alone, are what they were to the
bit. margin: that stage's worst error over its tolerance. A fault is silent when it keeps every shape and dtype and makes no
NaN; one that crashes, or is loud, is counted apart. In low precision some lie below the noise: invisible there, and named.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vidi.parity import feed, fingerprint, store, suite, tolerance
from vidi.parity.faults import varlen
from vidi.parity.faults.plant import Fault, expected_stage, other_uses, own_stages, planted
from vidi.parity.golden import GoldenError
from vidi.parity.result import Result
from vidi.parity.store import Case
from vidi.parity.suite import CaseRun
from vidi.parity.tolerance import Tolerances

__all__ = ["Bench", "Verdict", "as_json", "exit_code", "judge", "judge_all", "weakest_by_stage"]

LOCALISED = 0.95  #: share of faults that must first be reported at their own stage
CLEAR = 2.0  #: margins below this are named


@dataclass
class Bench:
    """Cases and models, opened and built on first use and shared by all faults."""

    goldens: Path
    tolerances: Tolerances
    _cases: dict[str, Case] = field(default_factory=dict)
    _models: dict[tuple[str, str], Any] = field(default_factory=dict)
    _clean: dict[tuple[str, str, bool], CaseRun] = field(default_factory=dict)

    @classmethod
    def open(cls, goldens: Path) -> Bench:
        return cls(goldens, tolerance.load(goldens))

    def case(self, name: str) -> Case:
        if name not in self._cases:
            folder, _, last = name.rpartition("/")
            self._cases[name] = store.open_case(self.goldens / (folder or "small"), last)
        return self._cases[name]

    def model(self, name: str, dtype: str) -> Any:
        if (name, dtype) not in self._models:
            self._models[name, dtype] = feed.load_model(self.case(name), feed.DTYPES[dtype])
        return self._models[name, dtype]

    def clean(self, name: str, dtype: str, unpadded: bool) -> CaseRun:
        """The run without a fault. Raises GoldenError where it differs: then nothing can be said of faults."""
        key = name, dtype, unpadded
        if key not in self._clean:
            with varlen.route(unpadded):
                run, _ = suite.run_case(self.case(name), self.model(name, dtype), self.tolerances, dtype=dtype)
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
    """What the harness said of one fault. strays: stages fed alone that differ though the fault is not theirs."""

    fault: Fault
    dtype: str
    killed: bool
    stage: str | None
    expected_stage: str | None
    margin: float
    strays: tuple[str, ...] = ()
    loud: tuple[str, ...] = ()
    crashed: str | None = None
    not_run: str | None = None
    tensor: Tensor | None = None  #: the first stage that differs, as the faulty model makes it

    @property
    def silent(self) -> bool:
        return self.crashed is None and not self.loud

    @property
    def localised(self) -> bool:
        return self.killed and self.stage == self.expected_stage and not self.strays


def judge(fault: Fault, bench: Bench, dtype: str | None = None) -> Verdict:
    """One fault in its case, in its own dtype unless another is given."""
    dtype = dtype or fault.dtype
    if fault.cuda:
        return Verdict(fault, dtype, False, None, None, 0.0, not_run="it acts on a CUDA device alone")
    clean = bench.clean(fault.case, dtype, fault.unpadded)
    ids = [row.stage for row in clean.rows]
    expected, case = expected_stage(fault, ids), bench.case(fault.case)
    try:
        with varlen.route(fault.unpadded):
            model = None if fault.rebuild else bench.model(fault.case, dtype)
            with planted(fault, model):
                model = model or feed.load_model(case, feed.DTYPES[dtype])
                run, tensors = suite.run_case(case, model, bench.tolerances, dtype=dtype)
    except Exception as error:  # a fault may break anything
        return Verdict(fault, dtype, True, None, expected, math.inf, crashed=f"{type(error).__name__}: {error}"[:200])
    red = [row for row in run.rows if not row.ok]
    if not red:
        near = next((row for row in run.rows if row.stage == expected), None)
        margin = max((r.ratio for r in near.results), default=0.0) if near else 0.0
        return Verdict(fault, dtype, False, None, expected, margin)
    first, own = red[0], set(own_stages(fault, ids))
    strays = {r.stage for r in red if r.isolated is not None and not r.isolated.ok and r.stage not in own}
    strays |= _moved(clean, run, other_uses(fault, ids))
    return Verdict(
        fault,
        dtype,
        True,
        first.stage,
        expected,
        max(r.ratio for r in first.results),
        strays=tuple(stage for stage in ids if stage in strays),
        loud=tuple(_loud(red)),
        tensor=tensors.get(first.stage),
    )


def _moved(clean: CaseRun, run: CaseRun, stages: Iterable[str]) -> set[str]:
    """Those of ``stages`` that, fed alone, are not what they are without the fault, as far as their errors tell."""
    before, after = ({row.stage: _errors(row.isolated) for row in r.rows} for r in (clean, run))
    return {stage for stage in stages if after[stage] != before[stage]}


def _errors(result: Result | None) -> str:
    return "" if result is None else repr((result.ok, result.ratio, result.max_abs, result.errors, result.worst_values))


def _loud(rows: Iterable[suite.Row]) -> Iterator[str]:
    """Stages whose shape, dtype or finiteness changed. Unpadded copies are derived from a mask after the run: another mask
    changes how many rows they have, which the model itself never shows."""
    for row in rows:
        if any(not r.count for r in row.results) and ".unpad." not in row.stage:
            yield row.stage


def judge_all(
    faults: Sequence[Fault], bench: Bench, dtype: str | None = None, on_fault: Callable[[Verdict], None] | None = None
) -> list[Verdict]:
    """Faults one after another; ``dtype`` runs value faults there and leaves out those that belong to another dtype."""
    verdicts = []
    with fingerprint.ieee():
        for fault in faults:
            if dtype is not None and fault.dtype not in ("float64", dtype):
                continue
            if dtype not in (None, "float64") and "/" in fault.case:
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
    """What a fault is and patches says the code (`vidi faults --list`); lists and reasons stand only where there are any."""
    margin = _finite(v.margin)
    told = {"strays": list(v.strays), "loud": list(v.loud), "crashed": v.crashed, "not_run": v.not_run}
    return {
        "name": v.fault.name,
        "killed": v.killed,
        "stage": v.stage,
        "expected_stage": v.expected_stage,
        "margin": margin and float(f"{margin:.4g}"),
        "case": v.fault.case,
        "dtype": v.dtype,
        **{key: value for key, value in told.items() if value},
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
