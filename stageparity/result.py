"""Rules and results: what a comparison may tolerate, and what it found, with the text that a failure shows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

__all__ = ["EXACT", "Result", "Rule"]


@dataclass(frozen=True)
class Rule:
    """Budgets as multiples of the golden's rms; None means not judged. `why` is shown with the result.

    max, rms, row, head: budgets for max|d|, rms(d), the worst row's and head's rms(d). Each is widened by the floor:
    `floor_ulp` units in the last place (`eps`) at the scale of the row (its largest |x|). rms, where row is set too: one
    row may err by its own budget and the rest by this one (tensors compared value by value, not sketches). max_abs: an
    absolute budget for max|d| that replaces the relative one. sums: budget for a sum over n values, divided by sqrt(n),
    where a golden is known by sums too; None leaves sums unjudged (half-precision rounding is not independent from value
    to value, so no multiple of sqrt(n) bounds it). bias_ulp: what a sum may be off beside that, in units in the last place
    of its sum of magnitudes. zero_rows: rows of exact zeros must stay exact zeros.
    """

    name: str
    why: str
    max: float | None = None
    rms: float | None = None
    row: float | None = None
    head: float | None = None
    max_abs: float | None = None
    sums: float | None = None
    bias_ulp: float = 0.0
    floor_ulp: float = 0.0
    eps: float = 0.0
    zero_rows: bool = True

    @property
    def judges(self) -> bool:
        """Whether any budget is set at all."""
        return any(b is not None for b in (self.max, self.rms, self.row, self.head, self.max_abs))


EXACT = Rule("exact", "masks, indices, lengths and ids have no rounding", max_abs=0.0)


@dataclass(frozen=True)
class Result:
    """What a comparison found.

    errors: max|d|, rms, worst row's and head's rms, as multiples of `rms_golden`; budgets: what each was allowed, at the
    same place. ratio: the largest error over its budget anywhere, inf where no budget helps. worst_index: the value
    furthest over its budget, else the largest error. row_errors: rms of d by row, as multiples of `rms_golden`.
    """

    stage: str
    ok: bool
    rule: Rule
    count: int = 0
    max_abs: float = math.nan
    rms_golden: float = math.nan
    errors: dict[str, float] = field(default_factory=dict)
    budgets: dict[str, float] = field(default_factory=dict)
    worst_index: tuple[int, ...] | None = None
    worst_values: tuple[float, float] | None = None
    worst_row: tuple[int, ...] | None = None
    worst_head: int | None = None
    first_rows: tuple[tuple[int, ...], ...] = ()
    rows_over: int = 0
    rows: int = 0
    elements_over: int = 0
    problems: tuple[str, ...] = ()
    ratio: float = math.inf
    row_errors: np.ndarray | None = None

    def text(self, *, why: bool = True) -> str:
        """One line when equal; otherwise counts, maxima with their places, first rows, errors against budgets, and the
        reason of the budget."""
        if self.ok:
            errors = ", ".join(f"{k} {v:.2e}" for k, v in self.errors.items())
            return f"{self.stage}: equal ({self.count} values{', ' + errors if errors else ''})"
        lines = [f"{self.stage}: DIFFERENT under {self.rule.name}", *(f"  {p}" for p in self.problems)]
        if self.elements_over:
            lines.append(f"  {self.elements_over} of {self.count} values over budget")
        if self.worst_index is not None and self.worst_values is not None:
            candidate, golden = self.worst_values
            place = list(self.worst_index)
            off = abs(candidate - golden)
            lines.append(f"  worst |d| {off:.6g} at {place}: candidate {candidate:.9g}, golden {golden:.9g}")
        for key, budget in self.budgets.items():
            where = {"row": self.worst_row, "head": self.worst_head}.get(key)
            at = "" if where is None else f" at {list(where) if isinstance(where, tuple) else where}"
            over = "  <-- over" if self.errors[key] > budget else ""
            lines.append(f"  {key}{at}: {self.errors[key]:.3g} of rms, budget {budget:.3g}{over}")
        if self.rows_over:
            shown = ", ".join(str(list(row)) for row in self.first_rows)
            more = ", ..." if self.rows_over > len(self.first_rows) else ""
            lines.append(f"  {self.rows_over} of {self.rows} rows differ, first: {shown}{more}")
        return "\n".join(lines + [f"  budget: {self.rule.why}"] * why)
