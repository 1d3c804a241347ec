"""How far a port's tensors are from what each known fault makes of them, stage by stage: sketches held against sketches.

Of a forced run that records fewer stages than the sketches were made with, a fault shows at the next stage that is recorded, and
as in a chained run, where everything recorded before it is sound there. Behind that nothing is known of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from stageparity.port.sketches import BUCKETS, QUANTUM, Difference, Known, Table

__all__ = ["DIFFERS", "Feeds", "Likeness", "Tensors"]

DIFFERS = 1.0  #: budgets from which on a difference wants an explanation
GAIN = 3.0  #: noise of what a fault adds to a tensor, beside that of the tensor
Feeds = Callable[[str], Iterable[str]]  #: stage -> the stages, and raw inputs, that feed it


@dataclass(frozen=True)
class Tensors:
    """Differences of all traced stages: rms (S,), numbers (S, BUCKETS), NaN where there are none, content (S,)."""

    rms: np.ndarray
    numbers: np.ndarray
    content: np.ndarray

    @classmethod
    def of(cls, found: Sequence[Difference]) -> Tensors:
        none = np.full(BUCKETS, np.nan)
        numbers = [none if d.numbers is None else d.numbers for d in found]
        rms, content = [d.rms for d in found], [d.content for d in found]
        return cls(np.array(rms), np.array(numbers), np.array(content, np.uint64))


@dataclass(frozen=True)
class _Rows:
    """Rows of a table that are of traced stages, by (stage, fault), in the units of the port."""

    s: np.ndarray
    f: np.ndarray
    rms: np.ndarray
    content: np.ndarray
    numbers: np.ndarray  #: NaN where the rms alone is kept

    @classmethod
    def of(cls, table: Table, stages: Sequence[str], shown: np.ndarray, units: np.ndarray) -> _Rows:
        place = {stage: s for s, stage in enumerate(stages)}
        traced = np.array([place.get(stage, -1) for stage in table.stages])
        rows = np.flatnonzero((traced[table.stage] >= 0) & shown[table.fault])
        s, at = traced[table.stage[rows]], table.at[rows]
        times = table.units[table.stage[rows]] / units[s]
        numbers = np.full((len(rows), BUCKETS), np.nan)
        numbers[at >= 0] = table.numbers[at[at >= 0]] * (QUANTUM * times[at >= 0, None])
        return cls(s, table.fault[rows].astype(np.int64), table.rms[rows] * times, table.content[rows], numbers)

    def where(self, chosen: np.ndarray) -> _Rows:
        return _Rows(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def joined(self, other: _Rows) -> _Rows:
        parts = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return _Rows(*(np.concatenate(part) for part in parts))

    def spread(self, shape: tuple[int, int]) -> np.ndarray:
        """(S, F) rms, 0 where there is no row."""
        out = np.zeros(shape)
        out[self.s, self.f] = self.rms
        return out


class Likeness:
    """Faults (F) over the traced stages (S).

    candidates: numbers of those that change any. size: (S, F) rms of each fault's difference. own: (S, F) where it is one.
    unknown: (S, F) where a forced run may differ and nothing says how.
    """

    def __init__(
        self,
        faults: Sequence[Known],
        tables: Mapping[str, Table],
        passes: str,
        stages: Sequence[str],
        sizes: np.ndarray,
        dtype: str,
        feeds: Feeds | None,
    ) -> None:
        """tables: by pass. sizes: (S, 2) unit and rms of each stage's golden."""
        self.stages, self.faults, units = np.array(stages), faults, sizes[:, 0]
        self.shape = len(stages), len(faults)
        shown = np.array([fault.dtype in ("float32", dtype) for fault in faults])
        self._rows, self.unknown = _Rows.of(tables[passes], stages, shown, units), np.zeros(self.shape, bool)
        if passes == "forced" and feeds is not None:
            self._untraced(tables["forced"], _Rows.of(tables["chained"], stages, shown, units), feeds)
        self.size = self._rows.spread(self.shape)
        self.own: np.ndarray = self.size > DIFFERS
        self.candidates = np.unique(self._rows.f)
        # A fault that changes a tensor by its own size, or more, changes what comes of rounding in it as well.
        grown = np.where(np.isfinite(self.size), self.size, 0) * units[:, None] / np.maximum(sizes[:, 1:], 1e-30)
        self._noise = np.hypot(1, GAIN * grown)

    def _untraced(self, forced: Table, chained: _Rows, feeds: Feeds) -> None:
        """Stages that are not recorded go on as the fault makes them."""
        place = {stage: s for s, stage in enumerate(self.stages.tolist())}
        changed = {stage: forced.fault[forced.stage == n] for n, stage in enumerate(forced.stages)}
        reach: np.ndarray = chained.spread(self.shape) > DIFFERS
        hidden, reached = np.zeros(self.shape, bool), np.zeros(self.shape, bool)
        for stage, s in place.items():
            before, between = _before(stage, place, feeds, forced.stages)
            for name in between:
                hidden[s, changed.get(name, [])] = True
            for name in before:
                reached[s] |= reach[place[name]]
        first = chained.where((hidden & ~reached)[chained.s, chained.f])
        self._rows = self._rows.where(~hidden[self._rows.s, self._rows.f]).joined(first)
        self.unknown = hidden & reached

    def distances(self, port: Tensors) -> np.ndarray:
        """(S, F): how far each stage is from what each fault makes of it: from the golden where it changes nothing, infinitely
        where that is not known."""
        rows, out = self._rows, np.repeat(port.rms[:, None], self.shape[1], axis=1)
        with np.errstate(invalid="ignore"):
            apart = np.sqrt(np.square(port.numbers[rows.s] - rows.numbers).mean(1))
            by_size = np.abs(port.rms[rows.s] - rows.rms)  # no sketch: at least so far
        apart = np.where(np.isfinite(apart), apart, np.where(np.isnan(by_size), 0.0, by_size))
        out[rows.s, rows.f] = np.where(port.content[rows.s] == rows.content, apart, np.inf)
        out[self.unknown] = np.inf
        return out / self._noise

    def of(self, fault: int) -> Tensors:
        """What a fault of the table makes, as if a port had made it."""
        own, shape = self._rows.where(self._rows.f == fault), len(self.stages)
        made = Tensors(np.zeros(shape), np.zeros((shape, BUCKETS)), np.zeros(shape, np.uint64))
        made.rms[own.s], made.numbers[own.s], made.content[own.s] = own.rms, own.numbers, own.content
        return made

    def contained(self, port: Tensors, fault: int, over: np.ndarray) -> tuple[float, float]:
        """How many times the port's differences contain the fault's, over some stages, and what part is left without it."""
        mine, theirs = port.numbers, self.of(fault).numbers
        held = over & np.isfinite(mine).all(1) & np.isfinite(theirs).all(1)
        mine, theirs = mine[held], theirs[held]
        power, before = float(np.square(theirs).sum()), float(np.square(mine).sum())
        left = math.sqrt(np.square(mine - theirs).sum() / before) if before else 0.0
        return float((mine * theirs).sum()) / power if power else math.nan, left


def _before(stage: str, traced: Collection[str], feeds: Feeds, order: Sequence[str]) -> tuple[set[str], set[str]]:
    """The traced stages that a stage is made of, and those in between that are not traced. Some stages lie within another and
    feed nothing by name: what stands between in pipeline order counts too."""
    before, between, waiting = set[str](), set[str](), [*feeds(stage)]
    while waiting:
        name = waiting.pop()
        if name in traced:
            before.add(name)
        elif name not in between:
            between.add(name)
            waiting += feeds(name)
    if stage in order:
        last = max((n for n, name in enumerate(order) if name in before), default=-1)
        inside = set(order[last + 1 : order.index(stage)])
        before |= inside & set(traced)
        between |= inside - set(traced)
    return before, between
