"""A tensor that is not the golden, and would be if its axes or rows were read another way: a matter of tracing, not of the model."""

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
    for said, array in itertools.chain(
        _axes(candidate, golden), _repeated(candidate, golden), _rows(candidate, golden)
    ):
        if array.shape == golden.shape and agree(array):
            return said
    return _piece(candidate, golden)


def _axes(candidate: np.ndarray, golden: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    if candidate.size != golden.size:
        return
    if candidate.ndim <= _MAX_AXES:
        for order in itertools.permutations(range(candidate.ndim)):
            turned = candidate.transpose(order)
            here = " ".join(_LETTERS[: candidate.ndim])
            there = " ".join(_LETTERS[axis] for axis in order)
            if turned.shape == golden.shape and order != tuple(range(candidate.ndim)):
                yield f'its axes are in another order: layout="{here} -> {there}"', turned
            elif turned.shape != golden.shape and (groups := _merged(turned.shape, golden.shape)):
                names = there.split()
                sides = (
                    "1" if not g else names[g[0]] if len(g) == 1 else f"({' '.join(names[n] for n in g)})"
                    for g in groups
                )
                yield (
                    f'axes are joined in the golden: layout="{here} -> {" ".join(sides)}"',
                    turned.reshape(golden.shape),
                )
    if golden.ndim > candidate.ndim and golden.ndim <= _MAX_AXES and (groups := _merged(golden.shape, candidate.shape)):
        names = _LETTERS[: golden.ndim]
        sides = ("1" if not g else names[g[0]] if len(g) == 1 else f"({' '.join(names[n] for n in g)})" for g in groups)
        yield (
            f'axes of the golden are joined here: layout="{" ".join(sides)} -> {" ".join(names)}"',
            candidate.reshape(golden.shape),
        )


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
        axis, names = differ[0], list(_LETTERS[: candidate.ndim])
        times = golden.shape[axis] // turned.shape[axis]
        there = [names[n] for n in order]
        there[axis] = f"({there[axis]} r)"
        yield (
            f'the golden holds each entry of an axis {times} times: layout="{" ".join(names)} -> {" ".join(there)}"',
            np.repeat(turned, times, axis),
        )
        there[axis] = f"(r {there[axis][1]})"
        tiled = np.concatenate([turned] * times, axis)
        yield f'the golden holds an axis {times} times over: layout="{" ".join(names)} -> {" ".join(there)}"', tiled


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
