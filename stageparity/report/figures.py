"""The drawings of the HTML page: inline SVG strings, coloured by the page's style sheet.

An error is placed by its ratio to what the rule allows, on one log axis for all stages, so that the tolerance is the
same line everywhere: noise belongs left of it, every fault that the stage must catch right of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from stageparity.compare import Result

__all__ = ["AXIS", "BINS", "DECADES", "LEVELS", "heat_row", "place", "strip"]

DECADES = 8  # of the axis, on either side of the tolerance
AXIS = ((0, "10⁻⁸"), (25, "10⁻⁴"), (50, "1"), (75, "10⁴"), (100, "10⁸"))  # percent of the width, label
BINS = 96  # cells of a heat map's row
LEVELS = (1e-6, 1e-5, 1e-4, 1e-2, 0.1, 1.0, 10.0, 1e3)  # upper ends of the colour classes, in budgets; one more above


def place(ratio: float) -> float:
    """Percent of the axis' width at which a ratio to the budget stands; what lies beyond stands at an end."""
    if not ratio > 0:
        return 0.0
    return min(max((math.log10(ratio) if math.isfinite(ratio) else math.inf) / DECADES * 50 + 50, 0.0), 100.0)


def strip(marks: Mapping[str, float | None]) -> str:
    """One line of the axis. ``marks``: ratios to the budget of noise, fault, chained, alone; None is not drawn."""
    parts = []
    if (noise := marks.get("noise")) is not None:
        parts.append(f"<rect class=n width={place(noise):.3g}% y=2 height=10 />")
    for name in ("fault", "chained", "alone"):
        ratio = marks.get(name)
        if ratio is None:
            continue
        bad = " class=x" if name != "fault" and ratio > 1 else ""
        parts.append(f"<use href=#{name}{bad} x={place(ratio):.3g}% />")
    return f"<svg class=s aria-hidden=true>{''.join(parts)}</svg>"


def heat_row(result: Result) -> str:
    """One stage of the heat map: its rows (tokens) from first to last, coloured by error over budget.

    More than BINS rows share cells, each cell showing its worst. Equal neighbours are drawn as one.
    """
    errors = result.row_errors
    if errors is None or not errors.size:
        return ""
    flat = np.nan_to_num(errors.reshape(-1).astype(np.float64), nan=math.inf, posinf=math.inf)
    if len(flat) > BINS:
        flat = np.maximum.reduceat(flat, np.linspace(0, len(flat), BINS, endpoint=False).astype(int))
    allowed = next((result.budgets[key] for key in ("row", "rms", "max") if result.budgets.get(key)), 1.0)
    levels = np.searchsorted(LEVELS, flat / allowed)
    starts = np.flatnonzero(np.r_[True, levels[1:] != levels[:-1]])
    ends = np.r_[starts[1:], len(levels)]
    paths: dict[int, list[str]] = {}
    for start, end in zip(starts, ends, strict=True):
        paths.setdefault(int(levels[start]), []).append(f"M{start} 0h{end - start}v1h-{end - start}z")
    drawn = "".join(f'<path class=h{level} d="{"".join(d)}"/>' for level, d in sorted(paths.items()))
    return f'<svg class=h viewBox="0 0 {len(levels)} 1" preserveAspectRatio=none aria-hidden=true>{drawn}</svg>'
