"""The comparison and the budgets as our stages' entries set them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stageparity import compare as comparison
from stageparity import tolerance
from stageparity.result import Result
from vidi.parity.stages import STAGES

__all__ = ["GOLDENS", "compare", "rules"]

GOLDENS = Path(__file__).parents[2] / "goldens"


def compare(stage: str, candidate: Any, golden: Any, rule: Any, **options: Any) -> Result:
    """`stageparity.compare.compare` with the axes of the stage."""
    return comparison.compare(stage, candidate, golden, rule, STAGES.axes(stage), **options)


def rules(folder: Path = GOLDENS) -> tolerance.Tolerances:
    return tolerance.load(folder, STAGES)
