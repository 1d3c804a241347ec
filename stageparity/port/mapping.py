"""A tensor that would be the golden if its axes or rows were read another way: a matter of tracing, not of the model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np

__all__ = ["propose"]

_LETTERS = "abcdefgh"
_MAX_AXES = 5  # of permutations that are tried
_MAX_ROWS = 4096


def propose(candidate: np.ndarray, golden: np.ndarray, agree: Callable[[np.ndarray], bool]) -> str:
    """In words, the mapping under which ``agree`` holds; nothing where none is found.

    Tried: other axes (with a flattening or its reverse), heads repeated or tiled, surplus rows along an axis, one piece of
    several. candidate and golden: any shapes. agree(array of the golden's shape): within the budget?
    """
    if not candidate.size or not golden.size or candidate.dtype.kind not in "fiub":
        return ""
    ways = (_turned, _joined, _repeated, _rows)
    for said, array in itertools.chain.from_iterable(way(candidate, golden) for way in ways):
        if array.shape == golden.shape and agree(array):
            return said
    return _piece(candidate, golden)


def _orders(candidate: np.ndarray) -> Iterator[tuple[list[str], np.ndarray]]:
    if candidate.ndim <= _MAX_AXES:
        for order in itertools.permutations(range(candidate.ndim)):
            yield [_LETTERS[axis] for axis in order], candidate.transpose(order)


def _turned(candidate: np.ndarray, golden: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    here = _LETTERS[: candidate.ndim]
    for there, turned in _orders(candidate):
        if turned.shape == golden.shape and "".join(there) != here:
            yield "its axes are in another order: " + _layout(" ".join(here), " ".join(there)), turned


def _joined(candidate: np.ndarray, golden: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Axes that one of the two has apart and the other joined, maybe turned before."""
    if candidate.size != golden.size or candidate.ndim == golden.ndim:
        return
    here = " ".join(_LETTERS[: candidate.ndim])
    for there, turned in _orders(candidate) if candidate.ndim > golden.ndim else ():
        if groups := _merged(turned.shape, golden.shape):
            yield "axes are joined in the golden: " + _layout(here, _side(groups, there)), turned.reshape(golden.shape)
    if candidate.ndim < golden.ndim <= _MAX_AXES and (groups := _merged(golden.shape, candidate.shape)):
        names = list(_LETTERS[: golden.ndim])
        said = "axes of the golden are joined here: "
        yield said + _layout(_side(groups, names), " ".join(names)), candidate.reshape(golden.shape)


def _layout(here: str, there: str) -> str:
    return f'layout="{here} -> {there}"'


def _side(groups: list[list[int]], names: list[str]) -> str:
    """One side of a layout, axes that are joined in brackets."""
    sides = [[names[n] for n in group] for group in groups]
    return " ".join("1" if not side else side[0] if len(side) == 1 else f"({' '.join(side)})" for side in sides)


def _merged(long: tuple[int, ...], short: tuple[int, ...]) -> list[list[int]]:
    """Which neighbouring axes of ``long`` make each axis of ``short``; nothing where none do."""
    groups: list[list[int]] = []
    n = 0
    for size in short:
        group: list[int] = []
        while n < len(long) and (math.prod(long[k] for k in group) < size or (long[n] == 1 and group)):
            group.append(n)
            n += 1
        if math.prod(long[k] for k in group) != size:
            return []
        groups.append(group)
    return groups if n == len(long) else []


def _repeated(candidate: np.ndarray, golden: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The golden repeats an axis; also after one exchange of two axes."""
    orders = [tuple(range(candidate.ndim))]
    for a, b in itertools.combinations(range(candidate.ndim), 2):
        swapped = list(orders[0])
        swapped[a], swapped[b] = b, a
        orders.append(tuple(swapped))
    for order in orders:
        turned = candidate.transpose(order)
        if turned.ndim != golden.ndim:
            return
        differ = [n for n, (a, b) in enumerate(zip(turned.shape, golden.shape, strict=True)) if a != b]
        if len(differ) != 1 or golden.shape[differ[0]] % turned.shape[differ[0]]:
            continue
        axis, letters = differ[0], list(_LETTERS[: candidate.ndim])
        times, there = golden.shape[axis] // turned.shape[axis], [letters[n] for n in order]
        for said, group, array in (
            (f"each entry of an axis {times} times", f"({there[axis]} r)", np.repeat(turned, times, axis)),
            (f"an axis {times} times over", f"(r {there[axis]})", np.concatenate([turned] * times, axis)),
        ):
            sides = [*there[:axis], group, *there[axis + 1 :]]
            yield f"the golden holds {said}: " + _layout(" ".join(letters), " ".join(sides)), array


def _rows(candidate: np.ndarray, golden: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Along one axis the candidate has more rows than the golden, which stand among them in order."""
    if candidate.ndim != golden.ndim:
        return
    differ = [n for n, (a, b) in enumerate(zip(candidate.shape, golden.shape, strict=True)) if a != b]
    if (
        len(differ) != 1
        or candidate.shape[differ[0]] < golden.shape[differ[0]]
        or candidate.shape[differ[0]] > _MAX_ROWS
    ):
        return
    axis = differ[0]
    mine = np.moveaxis(candidate, axis, 0).reshape(candidate.shape[axis], -1).astype(np.float64)
    theirs = np.moveaxis(golden, axis, 0).reshape(golden.shape[axis], -1).astype(np.float64)
    close = 1e-3 * (np.sqrt(np.square(theirs).mean()) or 1.0)
    found: list[int] = []
    at = 0
    for row in theirs:
        while at < len(mine) and np.sqrt(np.square(mine[at] - row).mean()) > close:
            at += 1
        if at == len(mine):
            return
        found.append(at)
        at += 1
    runs, start = [], 0
    for n in range(1, len(found) + 1):
        if n == len(found) or found[n] != found[n - 1] + 1:
            runs.append(f"{found[start]}:{found[n - 1] + 1}")
            start = n
    surplus = candidate.shape[axis] - golden.shape[axis]
    said = f"{surplus} surplus rows along axis {axis}: the golden's are rows {', '.join(runs)}; cut the rest with keep="
    yield said, np.take(candidate, found, axis)


def _piece(candidate: np.ndarray, golden: np.ndarray) -> str:
    """One piece of several: the candidate's rows are the golden's first, or last."""
    if candidate.ndim != golden.ndim:
        return ""
    differ = [n for n, (a, b) in enumerate(zip(candidate.shape, golden.shape, strict=True)) if a != b]
    if len(differ) != 1 or candidate.shape[differ[0]] >= golden.shape[differ[0]]:
        return ""
    axis, n = differ[0], candidate.shape[differ[0]]
    scale = float(np.sqrt(np.square(golden.astype(np.float64)).mean())) or 1.0
    for where, part in (("first", np.arange(n)), ("last", np.arange(golden.shape[axis] - n, golden.shape[axis]))):
        if np.abs(np.take(golden, part, axis).astype(np.float64) - candidate).max() <= 1e-3 * scale:
            return f"it holds the {where} {n} of {golden.shape[axis]} rows along axis {axis}: pieces are missing; join={axis}"
    return ""
