"""Where a half-precision run must round, bit for bit.

An error budget cannot see most misplaced casts: doing a step in float32 that the model does in bfloat16 even shrinks the
error. So a stage whose arithmetic the specification fixes is computed once more from the same rounded goldens
(`Stage.rounded`), in float32 with a rounding wherever the model stores a tensor; its values must have the same bits. Sums may
round apart in another order, so a small share of values (`SHARE`) may differ. A stage of many steps is held step by step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stageparity.arrays import to_numpy
from stageparity.result import Result, Rule
from stageparity.stage import Axes

__all__ = ["SHARE", "WHY", "Step", "compare", "judge"]

SHARE = 0.02  #: of the values may have other bits, one value always; see `WHY`
WHY = (
    "bits of a twin that rounds where the specification says: over all small cases sums in another order move 0.1 % of a"
    " stage's values (1 of 72, where few), the weakest misplaced cast 6 %"
)


@dataclass(frozen=True)
class Step:
    """A part of a stage: what the model has there, and what it must have, given what the model had before it."""

    name: str
    mine: Any
    theirs: np.ndarray


def judge(
    stage: str,
    found: Any,
    theirs: np.ndarray | tuple[np.ndarray, ...] | list[Step],
    axes: Axes,
    spreads: Mapping[str, float],
) -> Result:
    """theirs: the twin; several of which any will do, where kernels legitimately round apart; or steps, each with a twin of its
    own, of which the worst is told. spreads: the share that may differ, by dtype, where it is not the usual one."""
    mine, dtype = to_numpy(found)
    share = spreads.get(dtype)
    if not isinstance(theirs, list):
        ways = theirs if isinstance(theirs, tuple) else (theirs,)
        return min((compare(stage, mine, way, axes, share) for way in ways), key=lambda result: result.ratio)
    steps = [(step.name, compare(stage, to_numpy(step.mine)[0], step.theirs, axes, share)) for step in theirs]
    name, result = max(steps, key=lambda step: step[1].ratio)
    return replace(result, problems=tuple(f"{name}: {problem}" for problem in result.problems))


def compare(stage: str, mine: np.ndarray, theirs: np.ndarray, axes: Axes, share: float | None = None) -> Result:
    """Bits of a stage against its twin's. share: of values that may differ, where it is not the usual one."""
    allowed = max(SHARE if share is None else share, 1 / theirs.size)
    rule = Rule("casts", WHY, max=allowed)
    if mine.shape != theirs.shape or not np.isfinite(mine).all():
        return Result(stage, False, rule, problems=("another shape, or values that are not finite",))
    # What is float32 in a half-precision run (a loss) may differ by an ulp of another logarithm.
    differs = ~np.isclose(mine, theirs, rtol=5e-7, atol=0)
    found = float(differs.mean())
    row_axes, _ = axes.of(mine.ndim)
    content = tuple(axis for axis in range(mine.ndim) if axis not in row_axes)
    rows = np.argwhere(differs.any(axis=content))
    at = tuple(int(i) for i in np.unravel_index(int(differs.argmax()), mine.shape))
    return Result(
        stage,
        ok=found <= allowed,
        rule=rule,
        count=int(mine.size),
        max_abs=float(np.abs(mine - theirs).max()),
        errors={"max": found},
        budgets={"max": allowed},
        worst_index=at,
        worst_values=(float(mine[at]), float(theirs[at])),
        first_rows=tuple(tuple(int(i) for i in row) for row in rows[:3]),
        rows_over=len(rows),
        rows=int(np.prod([mine.shape[axis] for axis in row_axes])),
        elements_over=int(differs.sum()),
        problems=()
        if found <= allowed
        else (f"{found:.1%} of the values have other bits than the specified casts give",),
        ratio=found / allowed,
    )
