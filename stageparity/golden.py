"""What a golden tensor can look like: whole, some of its rows, or a sketch. Plain NumPy data, no files."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from stageparity.sketch import Sketch

__all__ = ["Golden", "GoldenError", "Sampled", "Sketched", "Whole", "stats_of", "whole"]


class GoldenError(ValueError):
    """A golden file cannot be trusted or used. The text names the case and the tensor and says what to do."""


@dataclass(frozen=True)
class Whole:
    """A tensor with all its values. `dtype` is the dtype the tensor had when made (bfloat16 is held as float32)."""

    array: np.ndarray
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


@dataclass(frozen=True)
class Sampled:
    """Some rows of a tensor along one axis, sums over every row, and the statistics of the whole.

    shape: of the full tensor. sample: full tensor taken at `index` along `axis`. row_sum: float64 sums over all other
    axes for the rows `row_sum_index` of the same axis (empty when no sums are kept). stats: sum, sum|x|, sum x², min,
    max of the full tensor in float64.
    """

    shape: tuple[int, ...]
    dtype: str
    axis: int
    index: np.ndarray
    sample: np.ndarray
    stats: np.ndarray
    row_sum: np.ndarray = field(default_factory=lambda: np.zeros(0))
    row_sum_index: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def problem(self) -> str:
        """What does not fit in the parts; nothing where all does."""
        length = self.shape[self.axis]
        wanted = (*self.shape[: self.axis], self.index.size, *self.shape[self.axis + 1 :])
        for name, rows in (("index", self.index), ("row_sum_index", self.row_sum_index)):
            if rows.ndim != 1 or rows.dtype.kind not in "iu":
                return f"{name} is no list of rows"
            if rows.size and not 0 <= int(rows.min()) <= int(rows.max()) < length:
                return f"{name} names rows that a tensor of shape {list(self.shape)} has not along axis {self.axis}"
        if self.sample.shape != wanted:
            return f"sample has shape {list(self.sample.shape)} where {list(wanted)} is needed"
        if self.stats.shape != (5,) or self.row_sum.shape != self.row_sum_index.shape:
            return "stats or row_sum has another length than is needed"
        kinds = [x.dtype.kind for x in (self.sample, self.stats, self.row_sum)]
        return "" if all(kind in "fiub" for kind in kinds) else "sample, stats or row_sum holds no numbers"

    @property
    def rms(self) -> float:
        return float(np.sqrt(self.stats[2] / max(int(np.prod(self.shape)), 1)))


@dataclass(frozen=True)
class Sketched:
    """A tensor known by its sketch alone; `shape` is the full tensor's."""

    shape: tuple[int, ...]
    dtype: str
    sketch: Sketch

    def problem(self) -> str:
        """What does not fit in the sketch; nothing where all does."""
        if math.prod(self.shape) != self.sketch.rows * self.sketch.columns:
            return f"a sketch of {self.sketch.rows} × {self.sketch.columns} entries of a tensor of shape {list(self.shape)}"
        return self.sketch.problem()


Golden = Whole | Sampled | Sketched


def whole(array: np.ndarray, dtype: str | None = None) -> Whole:
    """Wrap an array as a golden whose dtype is the array's own unless said otherwise."""
    return Whole(array, dtype or array.dtype.name)


def stats_of(array: np.ndarray) -> np.ndarray:
    """sum, sum|x|, sum x², min, max in float64, as the recordings keep them."""
    x = array.astype(np.float64, copy=False)
    return np.array([x.sum(), np.abs(x).sum(), np.square(x).sum(), x.min(), x.max()])
