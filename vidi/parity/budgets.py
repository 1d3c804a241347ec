"""What judges a stage: its budget in each case, the parts that this is made of, and the weakest fault that it must see."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stageparity import rounding, store, tolerance
from stageparity.faults import stored
from stageparity.result import Rule
from stageparity.run import ids
from stageparity.subject import reference_of, unfit
from vidi.parity.stages import STAGES

__all__ = ["BLIND", "Budget", "Weakest", "budgets", "weakest"]

BLIND = 1.0  #: of rms: an error as large as the values themselves
Weakest = Mapping[tuple[str, str], tuple[float, str]]


@dataclass(frozen=True)
class Budget:
    """Of a stage of a case (SET/NAME) in one pass. parts: of what is a multiple of a baseline, metric -> (factor, the baseline's
    error). fault: (margin, name) of the weakest fault that its gate must catch in this stage; None where none is planted. bits:
    the share of values that may have other bits than the specified roundings give; None where bits are not held.
    """

    case: str
    stage: str
    kind: str
    rule: Rule
    parts: Mapping[str, tuple[float, float]]
    fault: tuple[float, str] | None
    bits: float | None

    @property
    def judges(self) -> bool:
        """Whether it is bits, a mean error below the values' own rms, or a largest one: more than that every value is there."""
        limits = [x for x in (self.rule.max, self.rule.rms) if x is not None]
        return self.bits is not None or self.rule.max_abs is not None or any(x <= BLIND for x in limits)


def budgets(goldens: Path, globs: str | None, dtype: str, cases: Iterable[str] = ()) -> Iterator[Budget]:
    """Those of every stage that matches, in pipeline order, case by case: chained and, where it is fed alone, isolated.

    Raises NoBudget where a baseline was never measured, GoldenError for a case that is not there.
    """
    tolerances, faults = tolerance.load(goldens, STAGES), weakest(stored.read(goldens)) or {}
    for ref in store.select(goldens, cases):
        case, name = store.open_case(ref.folder, ref.name), f"{ref.set}/{ref.name}"
        variant, gate = reference_of(case, dtype)
        if unfit(case, variant, dtype):
            continue
        for stage in ids(case.variant(variant), STAGES, globs, alone=True):
            found, judged_as = STAGES.find(stage), STAGES.judged_as(stage)
            assert found is not None
            entry, half = found[0], dtype in ("bfloat16", "float16") and variant == "cast"
            bits = entry.spreads.get(dtype, rounding.SHARE) if entry.rounded is not None and half else None
            chained, isolated = entry.alone_only is None, entry.run is not None and not entry.reads_raw
            for kind in tolerance.KINDS[not chained : 1 + isolated]:
                alone = kind == "isolated" or entry.reads_raw
                yield Budget(
                    name,
                    stage,
                    kind,
                    tolerances.rule(gate, judged_as, name, kind=kind),
                    {} if entry.exact else tolerances.parts(gate, judged_as, name, kind=kind),
                    faults.get((gate, STAGES.template_of(stage))),
                    bits if alone else None,
                )


def weakest(document: Mapping[str, Any] | None) -> Weakest | None:
    """(gate, template) -> (margin, name) of the weakest fault that the gate must catch there, from what `faults` stored: each
    fault in its own dtype, and those of wrong mathematics in every lower one too. None without a document."""
    if document is None:
        return None
    found: dict[tuple[str, str], tuple[float, str]] = {}

    def enter(gate: str, stage: str, margin: float | None, name: str) -> None:
        key = gate, STAGES.template_of(stage)
        found[key] = min(found.get(key, (math.inf, name)), (math.inf if margin is None else margin, name))

    home = {}
    for fault in document["faults"]:
        stage = fault.get("expected_stage")
        if stage is None or fault.get("crashed") or fault.get("loud") or fault.get("not_run"):
            continue
        home[fault["name"]] = stage
        dtype, recorded = fault.get("dtype", "float64"), str(fault.get("case", "")).startswith("official/")
        reference = "recorded" if recorded else "none" if dtype == "float64" else "cast"
        enter(f"{dtype}-{reference}", stage, fault.get("margin"), fault["name"])
    for dtype, own in document.get("dtypes", {}).items():
        for name, margin in own["margins"].items():
            if name in home:
                enter(f"{dtype}-cast", own.get("elsewhere", {}).get(name, home[name]), margin, name)
    return found
