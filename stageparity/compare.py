"""The one comparison of the repository: a candidate array against a golden, under a rule.

Errors are taken against the golden's own rms: max|d|, the rms of d over the tensor, and the rms of d within the worst
row (rows = tokens) and the worst head. A row that is exactly zero in the golden (padding) must be exactly zero. Bool
and integer tensors are compared bit for bit. What can silently pass elsewhere fails here: another dtype class, a shape
that only broadcasts, an empty tensor, NaN, a candidate that is missing.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from stageparity import sketch as sketches
from stageparity.arrays import to_numpy
from stageparity.golden import Golden, Sampled, Sketched, Whole, stats_of
from stageparity.result import EXACT, Result, Rule
from stageparity.stage import Axes

__all__ = ["EXACT", "Result", "Rule", "as_matrix", "compare", "compare_sketches", "nothing_compared"]

ROWS = Axes()  # every axis but the last tells rows apart
_SHOWN = 3  # rows listed in a failure text
_BLOCK = 1 << 15  # values compared at a time
_STATS = ("sum", "sum|x|", "sum x²", "min", "max")


def compare(
    stage: str, candidate: Any, golden: Golden, rule: Rule, axes: Axes = ROWS, *, candidate_dtype: str | None = None
) -> Result:
    """Hold `candidate` against `golden` under `rule`.

    candidate: the full tensor, anything that `arrays.to_numpy` takes, or None when the run did not produce it. axes: which
    of its axes tell rows apart and count heads. candidate_dtype: the dtype that it had, where it was upcast before; dtypes
    are compared by class (bool, integer, real) and, for bool and integer tensors, exactly. Returns a Result, never raises
    for a difference.
    """
    array, dtype = (None, "") if candidate is None else to_numpy(candidate)
    problems = _structural(array, golden, rule, candidate_dtype or dtype)
    if problems or array is None:
        return Result(stage, False, rule, problems=tuple(problems))
    if isinstance(golden, Whole):
        return _compare_whole(stage, array, golden.array, axes, rule)
    if isinstance(golden, Sampled):
        return _compare_sampled(stage, array, golden, axes, rule)
    mine = sketches.make(as_matrix(array, axes), golden.sketch.spec, golden.sketch.top_index)
    return compare_sketches(stage, mine, golden, rule)


def nothing_compared(results: list[Result]) -> bool:
    """True when a run has no result, or none that compared a value: it must not count as equal."""
    return not any(result.count for result in results)


def _class(dtype: str) -> str:
    if dtype == "bool":
        return "bool"
    return "integer" if dtype.lstrip("u").startswith("int") else "real"


def _structural(candidate: np.ndarray | None, golden: Golden, rule: Rule, mine: str) -> list[str]:
    """What makes values incomparable: missing, empty, another shape or dtype, NaN, a rule that judges nothing."""
    if candidate is None:
        return ["missing: the run produced no tensor of this id"]
    problems, theirs = [], golden.dtype
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
    if golden.dtype.kind in "bui" or rule is EXACT:
        return _compare_exact(stage, candidate, golden)
    if candidate.ndim == 0:
        candidate, golden, where = candidate.reshape(1), golden.reshape(1), Axes((0,))
    row_axes, head_axis = where.of(candidate.ndim)
    content = tuple(axis for axis in range(candidate.ndim) if axis not in row_axes)
    sums, tops, size = _measured(candidate, golden, row_axes, head_axis)
    others = tuple(axis for axis in range(candidate.ndim) if axis != head_axis)
    scale = math.sqrt(float(sums["golden"].sum()) / size) if rms is None else rms
    row_scale, row_top = (tops[key].max(axis=content, keepdims=True) for key in ("golden", "d"))
    per_row = size // row_scale.size
    row_rms = np.sqrt(sums["d"].sum(axis=content, keepdims=True) / per_row)
    whole_rms = math.sqrt(float(sums["d"].sum()) / size)
    heads = None
    if head_axis is not None:
        heads = np.sqrt(sums["d"].sum(axis=others) / (size // candidate.shape[head_axis]))

    # Budgets by element, by row, and for the whole. Floors differ from row to row, so an element's budget is its row's.
    floor = rule.floor_ulp * rule.eps * row_scale
    element_budget = (rule.max_abs if rule.max_abs is not None else _times(rule.max, scale)) + floor
    row_budget = np.broadcast_to(_times(rule.row, scale) + floor, row_rms.shape)
    rms_floor, max_floor = float(np.sqrt(np.square(floor).mean())), float(floor.max())
    rms_budget = _times(rule.rms, scale) + rms_floor
    if rule.rms is not None and rule.row is not None:
        # In a tensor of few rows one that errs by its own budget decides the rms of all: it must be allowed there too.
        one = 1 / row_rms.size
        rms_budget = (
            math.hypot(rule.rms * math.sqrt(1 - one), max(rule.rms, rule.row) * math.sqrt(one)) * scale + rms_floor
        )
    element_ratio, row_ratio = _ratio(row_top, element_budget), _ratio(row_rms, row_budget)
    ratios = [float(element_ratio.max()), float(row_ratio.max()), float(_ratio(whole_rms, rms_budget))]
    if heads is not None:
        ratios.append(float(_ratio(heads.max(), _times(rule.head, scale) + max_floor)))

    rows_over = (element_ratio > 1) | (row_ratio > 1)
    problems = []
    if rule.zero_rows:
        touched = (row_scale == 0) & (row_rms > 0)
        rows_over |= touched
        if touched.any():
            problems.append(f"{int(touched.sum())} rows are exactly zero in the golden (padding), not in the candidate")
    elements_over, at = 0, None
    if (element_ratio > 1).any():
        distance = np.abs(candidate.astype(np.float64) - golden)
        ratio = _ratio(distance, np.broadcast_to(element_budget, distance.shape))
        elements_over, at = int((ratio > 1).sum()), _index(int(ratio.argmax()), candidate.shape)
    largest = np.unravel_index(int(row_top.argmax()), row_top.shape)
    if at is None:
        inside = tuple(slice(None) if axis in content else int(largest[axis]) for axis in range(candidate.ndim))
        here = np.abs(candidate[inside].astype(np.float64) - golden[inside])
        place = iter(_index(int(here.argmax()), here.shape))
        at = tuple(next(place) if axis in content else int(largest[axis]) for axis in range(candidate.ndim))
    table = [row_rms.shape[axis] for axis in row_axes] or [1]
    listed = np.argwhere(rows_over.reshape(table))
    errors = {"max": row_top.max(), "rms": whole_rms, "row": row_rms.max()}
    allowed = {
        "max": np.broadcast_to(element_budget, row_top.shape)[largest],
        "rms": rms_budget,
        "row": row_budget.reshape(-1)[row_rms.argmax()],
    }
    if heads is not None:
        errors["head"], allowed["head"] = heads.max(), _times(rule.head, scale) + max_floor
    return Result(
        stage,
        ok=max(ratios) <= 1 and not problems,
        rule=rule,
        count=size,
        max_abs=float(row_top.max()),
        rms_golden=scale,
        errors={key: _over(float(error), scale) for key, error in errors.items()},
        budgets={key: _over(float(budget), scale) for key, budget in allowed.items() if math.isfinite(budget)},
        worst_index=at,
        worst_values=(float(candidate[at]), float(golden[at])),
        worst_row=_index(int(row_rms.argmax()), tuple(table)),
        worst_head=None if heads is None else int(heads.argmax()),
        first_rows=tuple(tuple(int(i) for i in row) for row in listed[:_SHOWN]),
        rows_over=len(listed),
        rows=int(row_rms.size),
        elements_over=elements_over,
        problems=tuple(problems),
        ratio=math.inf if problems else max(ratios),
        row_errors=(row_rms / scale if scale else row_rms).reshape(table),
    )


def _measured(
    candidate: np.ndarray, golden: np.ndarray, row_axes: tuple[int, ...], head_axis: int | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], int]:
    """(sums of squares, largest magnitudes, number of values) of the golden and of the difference `d`, in float64, by row and
    head: of the tensor's own number of axes, all others of size one. In blocks that stay in a processor's cache: comparing
    a whole run is reading it from memory once."""
    kept = sorted({*row_axes, *([] if head_axis is None else [head_axis])})
    shape = [size if axis in kept else 1 for axis, size in enumerate(candidate.shape)]
    rows = math.prod(shape)
    mine, theirs = (np.moveaxis(x, kept, range(len(kept))).reshape(rows, -1) for x in (candidate, golden))
    out = {key: np.empty(rows) for key in ("golden²", "d²", "golden", "d")}
    step = max(1, _BLOCK // mine.shape[1])
    for start in range(0, rows, step):
        block = slice(start, start + step)
        for first in range(0, mine.shape[1], _BLOCK):
            part = slice(first, first + _BLOCK)
            y = theirs[block, part].astype(np.float64)
            d = mine[block, part] - y
            found = (
                np.einsum("ij,ij->i", y, y), np.einsum("ij,ij->i", d, d), np.maximum(y.max(1), -y.min(1)),
                np.maximum(d.max(1), -d.min(1)),
            )  # fmt: skip
            for (key, to), x in zip(out.items(), found, strict=True):
                if not first:
                    to[block] = x
                elif key.endswith("²"):
                    to[block] += x
                else:
                    np.maximum(to[block], x, out=to[block])
    sums = {key: out[f"{key}²"].reshape(shape) for key in ("golden", "d")}
    return sums, {key: out[key].reshape(shape) for key in ("golden", "d")}, candidate.size


def _index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(flat, shape))


def _compare_exact(stage: str, candidate: np.ndarray, golden: np.ndarray) -> Result:
    differs = np.atleast_1d(candidate != golden)
    candidate, golden = np.atleast_1d(candidate), np.atleast_1d(golden)
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
        ratio=math.inf if len(listed) else 0.0,
    )


def _compare_sampled(stage: str, candidate: np.ndarray, golden: Sampled, axes: Axes, rule: Rule) -> Result:
    """The sampled rows value by value, then what is known of the rest: minimum and maximum, and, where the rule judges
    them, the sums of all rows and of the whole. A sum over n values is allowed sqrt(n) times `sums`, and `bias_ulp` units
    in the last place of the sum of magnitudes, for a rounding that all values share."""
    part = np.take(candidate, golden.index, axis=golden.axis)
    if golden.sample.dtype.kind in "bui" or rule is EXACT:
        return _compare_exact(stage, part, golden.sample)
    result = _compare_whole(stage, part, golden.sample, axes, rule, golden.rms)
    floor = rule.floor_ulp * rule.eps * float(max(abs(golden.stats[3]), abs(golden.stats[4])))
    value = (rule.max_abs if rule.max_abs is not None else _times(rule.max, golden.rms)) + floor
    one = _times(rule.sums, golden.rms) + floor
    x, size, bias = candidate.astype(np.float64), candidate.size, rule.bias_ulp * rule.eps
    problems, ratios = list(result.problems), [result.ratio]
    if golden.row_sum.size and rule.sums is not None:
        others = tuple(axis for axis in range(x.ndim) if axis != golden.axis)
        d = np.abs(x.sum(axis=others)[golden.row_sum_index] - golden.row_sum)
        magnitudes = np.abs(x).sum(axis=others)[golden.row_sum_index]
        budgets = one * math.sqrt(size / x.shape[golden.axis]) + bias * magnitudes
        bad = np.flatnonzero(d > budgets)
        worst = int(_ratio(d, budgets).argmax())
        ratios.append(float(_ratio(d[worst], budgets[worst])))
        if len(bad):
            rows = [int(i) for i in golden.row_sum_index[bad[:_SHOWN]]]
            problems.append(
                f"{len(bad)} of {d.size} row sums along axis {golden.axis} differ, first rows {rows},"
                f" worst {d[worst]:.3g}, budget {budgets[worst]:.3g}"
            )
    total = one * math.sqrt(size)
    # A float64 sum of n terms has a rounding of its own, up to n·eps/2 of the sum of magnitudes.
    slack = (1e-16 * size + bias) * float(golden.stats[1])
    squares = 2 * total * golden.rms + size * one**2 + 1e-16 * size * float(golden.stats[1]) * golden.rms
    squares += 2 * bias * float(golden.stats[2])
    allowed = (total + slack, total + slack, squares, value, value)
    for name, m, g, budget in zip(_STATS, stats_of(x), golden.stats, allowed, strict=True):
        ratios.append(float(_ratio(abs(m - g), budget)))
        if ratios[-1] > 1:
            problems.append(f"{name} of the whole tensor is {m:.9g}, golden {g:.9g}, budget {budget:.3g}")
    return replace(result, ok=result.ok and not problems, problems=tuple(problems), ratio=max(ratios))


def as_matrix(tensor: np.ndarray, axes: Axes) -> np.ndarray:
    """A tensor as the (rows, columns) matrix that its sketch is taken of: row axes first, then the rest."""
    rows, _ = axes.of(tensor.ndim)
    moved = np.moveaxis(tensor, rows, range(len(rows)))
    return moved.reshape(math.prod(moved.shape[: len(rows)]), -1)


def compare_sketches(stage: str, mine: sketches.Sketch, golden: Sketched, rule: Rule) -> Result:
    """As `compare`, from error norms by block and the exact entries kept beside them, for a candidate sketched with the
    golden's `top_index`. `row` of the rule applies to a block as a whole, widened by three standard deviations."""
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
    ratio = max((float(_ratio(errors[key], budget)) for key, budget in budgets.items()), default=math.inf)
    worst = int(block_rms.argmax())
    limit = budgets.get("row", budgets.get("rms", math.inf))
    listed = np.flatnonzero(block_rms > limit * scale)
    place = int(d.argmax())
    flat = int(np.concatenate([theirs.top_index, theirs.sample_index()])[place])
    return Result(
        stage,
        ok=bool(budgets) and ratio <= 1,
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
        ratio=ratio,
        row_errors=block_rms / scale if scale else block_rms,
    )


def _times(factor: float | None, scale: float) -> float:
    """A budget in units of the tensor; no budget is an infinite one."""
    return math.inf if factor is None else factor * scale


def _ratio(error: Any, budget: Any) -> np.ndarray:
    """error / budget; 0 for no error, inf for an error without any budget."""
    error, budget = np.asarray(error, np.float64), np.asarray(budget, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0, 0.0, error / budget)


def _over(value: float, scale: float) -> float:
    """value / scale, where an all-zero golden (scale 0) makes any value infinitely wrong."""
    if scale:
        return float(value) / scale
    return math.inf if value else 0.0
