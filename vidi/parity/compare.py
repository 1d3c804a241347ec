"""The one comparison of the repository: a candidate array against a golden, under a rule.

Errors are taken against the golden's own rms: max|d|, the rms of d over the tensor, and the rms of d within the worst
row (rows = tokens) and the worst head. A row that is exactly zero in the golden (padding) must be exactly zero. Bool
and integer tensors are compared bit for bit. What can silently pass elsewhere fails here: another dtype class, a shape
that only broadcasts, an empty tensor, NaN, a candidate that is missing.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from vidi.parity import sketch as sketches
from vidi.parity.golden import Golden, Sampled, Sketched, Whole
from vidi.parity.ids import Axes, axes
from vidi.parity.result import EXACT, Result, Rule

__all__ = ["EXACT", "Result", "Rule", "compare", "compare_sketches", "nothing_compared"]

_SHOWN = 3  # rows listed in a failure text


def compare(
    stage: str, candidate: np.ndarray | None, golden: Golden, rule: Rule, *, candidate_dtype: str | None = None
) -> Result:
    """Hold `candidate` against `golden` under `rule`.

    candidate: the full tensor, any dtype NumPy has (bfloat16 upcast to float32 by the caller), or None when the run
    did not produce it. candidate_dtype: its dtype before upcasting; dtypes are compared by class (bool, integer,
    real) and, for bool and integer tensors, exactly. Returns a Result, never raises for a difference.
    """
    problems = _structural(stage, candidate, golden, rule, candidate_dtype)
    if problems or candidate is None:
        return Result(stage, False, rule, problems=tuple(problems))
    if isinstance(golden, Whole):
        return _compare_whole(stage, candidate, golden.array, axes(stage, candidate.ndim), rule)
    if isinstance(golden, Sampled):
        return _compare_sampled(stage, candidate, golden, rule)
    return _compare_sketched(stage, candidate, golden, rule)


def nothing_compared(results: list[Result]) -> bool:
    """True when a run has no result, or none that compared a value: it must not count as equal."""
    return not any(result.count for result in results)


def _class(dtype: str) -> str:
    if dtype == "bool":
        return "bool"
    return "integer" if dtype.lstrip("u").startswith("int") else "real"


def _structural(
    stage: str, candidate: np.ndarray | None, golden: Golden, rule: Rule, candidate_dtype: str | None
) -> list[str]:
    """What makes values incomparable: missing, empty, another shape or dtype, NaN, a rule that judges nothing."""
    if candidate is None:
        return ["missing: the run produced no tensor of this id"]
    problems = []
    theirs, mine = golden.dtype, candidate_dtype or candidate.dtype.name
    if theirs != mine and not (_class(theirs) == _class(mine) == "real"):
        problems.append(f"dtype {mine}, golden has {theirs}")
    if tuple(candidate.shape) != tuple(golden.shape):
        try:
            broadcasts = np.broadcast_shapes(candidate.shape, golden.shape) is not None
        except ValueError:
            broadcasts = False
        note = " (it would broadcast, which hides a missing axis)" if broadcasts else ""
        problems.append(f"shape {list(candidate.shape)}, golden has {list(golden.shape)}{note}")
    if candidate.size == 0 or 0 in golden.shape:
        problems.append("empty: nothing to compare")
    if candidate.size and candidate.dtype.kind == "f":
        bad = ~np.isfinite(candidate)
        if bad.any():
            first = [int(i) for i in np.argwhere(bad)[0]]
            problems.append(f"{int(bad.sum())} of {candidate.size} values are NaN or Inf, first at {first}")
    if not rule.judges:
        problems.append(f"rule {rule.name} sets no budget: nothing would be compared")
    return problems


def _compare_whole(
    stage: str, candidate: np.ndarray, golden: np.ndarray, where: Axes, rule: Rule, rms: float | None = None
) -> Result:
    """Element by element. rms: the scale, when the golden is only part of a tensor."""
    if candidate.ndim == 0:
        candidate, golden, where = candidate.reshape(1), golden.reshape(1), Axes((0,))
    if golden.dtype.kind in "bui" or rule is EXACT:
        return _compare_exact(stage, candidate, golden, where)
    y = golden.astype(np.float64)
    d = candidate.astype(np.float64) - y
    size = np.abs(d)
    scale = float(np.sqrt(np.square(y).mean())) if rms is None else rms
    content = tuple(axis for axis in range(d.ndim) if axis not in where.rows)
    row_scale = np.abs(y).max(axis=content, keepdims=True)
    floor = rule.floor_ulp * rule.eps * row_scale
    square = np.square(d)
    row_rms = np.sqrt(square.mean(axis=content, keepdims=True))

    errors = {
        "max": _over(size.max(), scale),
        "rms": _over(math.sqrt(square.mean()), scale),
        "row": _over(row_rms.max(), scale),
    }
    budgets: dict[str, float] = {}
    element_budget = np.full(row_scale.shape, np.inf)
    if rule.max_abs is not None:
        element_budget = rule.max_abs + floor
        budgets["max"] = _over(rule.max_abs + float(floor.max()), scale)
    elif rule.max is not None:
        element_budget = rule.max * scale + floor
        budgets["max"] = rule.max + _over(float(floor.max()), scale)
    over = size > element_budget
    rows_over = over.any(axis=content, keepdims=True)
    if rule.row is not None:
        rows_over |= row_rms > rule.row * scale + floor
        budgets["row"] = rule.row + _over(float(floor.max()), scale)
    problems = []
    if rule.zero_rows:
        touched = (row_scale == 0) & (row_rms > 0)
        rows_over |= touched
        if touched.any():
            problems.append(f"{int(touched.sum())} rows are exactly zero in the golden (padding), not in the candidate")
    if rule.rms is not None:
        budgets["rms"] = rule.rms + _over(float(np.sqrt(np.square(floor).mean())), scale)
    worst_head = None
    if where.heads is not None:
        others = tuple(axis for axis in range(d.ndim) if axis != where.heads)
        head_rms = np.sqrt(square.mean(axis=others))
        worst_head = int(head_rms.argmax())
        errors["head"] = _over(head_rms.max(), scale)
        if rule.head is not None:
            budgets["head"] = rule.head + _over(float(floor.max()), scale)
    at = tuple(int(i) for i in np.unravel_index(size.argmax(), size.shape))
    listed = np.argwhere(rows_over.reshape([rows_over.shape[axis] for axis in where.rows] or [1]))
    row_table = row_rms.reshape([row_rms.shape[axis] for axis in where.rows] or [1])
    # Errors above a budget are judged element by element and row by row, because floors differ from row to row.
    totals_over = any(errors[k] > budgets[k] for k in ("rms", "head") if k in budgets)
    return Result(
        stage,
        ok=not (bool(over.any()) or bool(rows_over.any()) or totals_over or problems),
        rule=rule,
        count=int(d.size),
        max_abs=float(size.max()),
        rms_golden=scale,
        errors=errors,
        budgets=budgets,
        worst_index=at,
        worst_values=(float(candidate[at]), float(golden[at])),
        worst_row=tuple(int(i) for i in np.unravel_index(row_table.argmax(), row_table.shape)),
        worst_head=worst_head,
        first_rows=tuple(tuple(int(i) for i in row) for row in listed[:_SHOWN]),
        rows_over=len(listed),
        rows=int(row_table.size),
        elements_over=int(over.sum()),
        problems=tuple(problems),
        row_errors=row_table / scale if scale else row_table,
    )


def _compare_exact(stage: str, candidate: np.ndarray, golden: np.ndarray, where: Axes) -> Result:
    differs = candidate != golden
    listed = np.argwhere(differs)
    first = tuple(int(i) for i in listed[0]) if len(listed) else None
    return Result(
        stage,
        ok=not len(listed),
        rule=EXACT,
        count=int(golden.size),
        max_abs=float(np.abs(candidate.astype(np.float64) - golden.astype(np.float64)).max()),
        worst_index=first,
        worst_values=(float(candidate[first]), float(golden[first])) if first is not None else None,
        first_rows=tuple(tuple(int(i) for i in row) for row in listed[:_SHOWN]),
        rows_over=len(listed),
        rows=int(golden.size),
        elements_over=len(listed),
        problems=(f"{len(listed)} of {golden.size} exact values differ",) if len(listed) else (),
    )


def _compare_sampled(stage: str, candidate: np.ndarray, golden: Sampled, rule: Rule) -> Result:
    """The sampled rows value by value, then the row sums and the statistics of the whole.

    A sum over n values of independent errors is allowed sqrt(n) times the budget of one.
    """
    part = np.take(candidate, golden.index, axis=golden.axis)
    if golden.sample.dtype.kind in "bui" or rule is EXACT:
        return _compare_exact(stage, part, golden.sample, axes(stage, part.ndim))
    result = _compare_whole(stage, part, golden.sample, axes(stage, part.ndim), rule, golden.rms)
    one = rule.max_abs if rule.max_abs is not None else (rule.max or rule.row or rule.rms or 0.0) * golden.rms
    one += rule.floor_ulp * rule.eps * float(max(abs(golden.stats[3]), abs(golden.stats[4])))
    x, size = candidate.astype(np.float64), candidate.size
    problems = list(result.problems)
    if golden.row_sum.size:
        others = tuple(axis for axis in range(x.ndim) if axis != golden.axis)
        d = np.abs(x.sum(axis=others)[golden.row_sum_index] - golden.row_sum)
        budget = one * math.sqrt(size / x.shape[golden.axis])
        bad = np.flatnonzero(~(d <= budget))
        if len(bad):
            rows = [int(i) for i in golden.row_sum_index[bad[:_SHOWN]]]
            problems.append(
                f"{len(bad)} of {d.size} row sums along axis {golden.axis} differ, first rows {rows},"
                f" largest {d.max():.3g}, budget {budget:.3g}"
            )
    mine = np.array([x.sum(), np.abs(x).sum(), np.square(x).sum(), x.min(), x.max()])
    total = one * math.sqrt(size)
    for name, m, g, budget in zip(
        ("sum", "sum|x|", "sum x²", "min", "max"),
        mine,
        golden.stats,
        (total, total, 2 * total * golden.rms + size * one * one, one, one),
        strict=True,
    ):
        # A float64 sum of n terms has its own rounding, which a budget of one ulp does not cover.
        slack = 1e-15 * size * (abs(float(golden.stats[1])) / size) if name.startswith("sum") else 0.0
        if not abs(m - g) <= budget + slack:
            problems.append(f"{name} of the whole tensor is {m:.9g}, golden {g:.9g}, budget {budget:.3g}")
    return _with_problems(result, problems)


def _compare_sketched(stage: str, candidate: np.ndarray, golden: Sketched, rule: Rule) -> Result:
    """Error norms by block from the sketches, then the exact entries kept beside them.

    `row` of the rule applies to a block as a whole, widened by three standard deviations of the estimate.
    """
    matrix = np.moveaxis(candidate, axes(stage, candidate.ndim).rows, range(len(axes(stage, candidate.ndim).rows)))
    matrix = matrix.reshape(golden.sketch.rows, golden.sketch.columns)
    mine = sketches.make(matrix, golden.sketch.spec, golden.sketch.top_index)
    return compare_sketches(stage, mine, golden, rule)


def compare_sketches(stage: str, mine: sketches.Sketch, golden: Sketched, rule: Rule) -> Result:
    """As `compare`, for a candidate that was sketched elsewhere (on a GPU, with the golden's `top_index`)."""
    theirs = golden.sketch
    scale = math.sqrt(theirs.sum_squares / (theirs.rows * theirs.columns))
    norms = sketches.error_norms(mine, theirs)
    sizes = np.full(len(norms), theirs.spec.block_rows * theirs.columns, np.float64)
    sizes[-1] = theirs.rows * theirs.columns - sizes[:-1].sum()
    block_rms = norms / np.sqrt(sizes)
    exact_mine = np.concatenate([mine.top_value, mine.sample_value])
    exact_theirs = np.concatenate([theirs.top_value, theirs.sample_value])
    d = np.abs(exact_mine - exact_theirs)
    floor = rule.floor_ulp * rule.eps * float(theirs.block_max.max())
    errors = {
        "max": _over(float(max(d.max(), np.abs(mine.block_max - theirs.block_max).max())), scale),
        "rms": _over(float(np.sqrt(np.square(norms).sum() / sizes.sum())), scale),
        "row": _over(float(block_rms.max()), scale),
    }
    widen = 1 + 3 * sketches.SPREAD["one row"]
    budgets = {
        key: value * (1.0 if key == "max" else widen) + _over(floor, scale)
        for key, value in (("max", rule.max), ("rms", rule.rms), ("row", rule.row))
        if value is not None
    }
    worst = int(block_rms.argmax())
    limit = budgets.get("row", budgets.get("rms", math.inf))
    listed = np.flatnonzero(block_rms > limit * scale)
    place = int(d.argmax())
    flat = int(np.concatenate([theirs.top_index, theirs.sample_index()])[place])
    return Result(
        stage,
        ok=all(errors[key] <= budget for key, budget in budgets.items()) and bool(budgets),
        rule=rule,
        count=int(sizes.sum()),
        max_abs=float(d.max()),
        rms_golden=scale,
        errors=errors,
        budgets=budgets,
        worst_index=(flat // theirs.columns, flat % theirs.columns),
        worst_values=(float(exact_mine[place]), float(exact_theirs[place])),
        worst_row=(worst * theirs.spec.block_rows,),
        first_rows=tuple((int(b) * theirs.spec.block_rows,) for b in listed[:_SHOWN]),
        rows_over=len(listed),
        rows=len(norms),
        row_errors=block_rms / scale if scale else block_rms,
    )


def _over(value: float, scale: float) -> float:
    """value / scale, where an all-zero golden (scale 0) makes any value infinitely wrong."""
    if scale:
        return float(value) / scale
    return math.inf if value else 0.0


def _with_problems(result: Result, problems: list[str]) -> Result:
    return replace(result, ok=result.ok and not problems, problems=tuple(problems))
