"""What a fault makes of a case's tensors, from raw inputs (chained) and among goldens (forced)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from stageparity import run as runs
from stageparity.faults.judge import Bench
from stageparity.faults.plant import Fault, planted
from stageparity.subject import reference_of

__all__ = ["tensors"]


def tensors(bench: Bench, place: str, dtype: str, *faults: Fault, setting: str = "") -> dict[str, Mapping[str, Any]]:
    """Pass -> stage -> tensor of the case ``place`` (SET/CASE) with all ``faults`` planted; none: of the unharmed model.
    Whatever a faulty model raises passes through."""
    subject, case = bench.subject(dtype), bench.case(place)
    targets = case.variant(reference_of(case, dtype)[0])
    judged = set(runs.ids(targets, subject.stages))
    with subject.setting(setting), contextlib.ExitStack() as planting:
        model = None if any(fault.rebuild for fault in faults) else bench.model(place, dtype)
        for fault in faults:
            planting.enter_context(planted(fault, model))
        on_bench = subject.bench(case, model or subject.build(case), targets)
        chained = runs.Trace()
        on_bench.run(chained)
        return {
            "chained": {stage: x for stage, x in chained.tensors().items() if stage in judged},
            "forced": runs.forced_tensors(on_bench, case, subject.stages, judged),
        }
