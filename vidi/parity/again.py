"""The first wrong stage of a run again, alone on the same golden inputs, under other circumstances: code or environment?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stageparity import environment
from stageparity.compare import compare
from stageparity.report.verdict import Finding
from stageparity.stage import NotHeld
from stageparity.store import Case
from stageparity.subject import reference_of
from vidi.parity.subject import VidiSubject

__all__ = ["circumstances"]


def circumstances(subject: VidiSubject, finding: Finding, case: Case) -> str:
    """In a sentence (`stageparity.environment`); nothing for a stage that cannot be fed alone, or that is right so."""
    _, row = finding.first
    if row.alone is None or row.alone.ok:
        return ""
    targets = case.variant(reference_of(case, subject.dtype)[0])
    golden, rule = targets[subject.stages.judged_as(row.stage)], row.alone.rule
    axes = subject.stages.axes(row.stage)
    ratios: dict[str, float | None] = {}
    for name in environment.SETTINGS:
        dtype = "float64" if name == "float64" else subject.dtype
        other = VidiSubject(dtype, device=subject.device, backend=subject.backend)
        try:
            with other.scope(), _setting(name):
                bench = other.bench(case, other.build(case), targets)
                ratios[name] = compare(row.stage, bench.alone(row.stage), golden, rule, axes).ratio
        except (NotHeld, RuntimeError):
            ratios[name] = None
    return environment.sentence(row.alone.ratio, ratios)


@contextmanager
def _setting(name: str) -> Iterator[None]:
    threads, fused = torch.get_num_threads(), torch.backends.mkldnn.enabled
    try:
        if name == "one thread":
            torch.set_num_threads(1)
        torch.backends.mkldnn.enabled = fused and name != "plain"  # type: ignore[assignment]
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.mkldnn.enabled = fused  # type: ignore[assignment]
