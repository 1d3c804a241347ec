"""Sketches: what is kept of a tensor too large to keep, so that an error can still be measured and found.

A CountSketch is linear, so sketch(candidate) - sketch(reference) = sketch(error), whose norm estimates the norm of the
error. Signs and buckets factor over (row, column): for a block of rows x_RC the sketch is `left @ x_RC @ right`, two
small products with ±1 matrices, deterministic, without atomics. `projections` hands out those matrices, so a caller on
a GPU does the two products with its own library and only the small result comes back.

What the factored form resolves (measured by tests/harness/test_sketch.py over 400 seeds, 8 x 256 = 2,048 buckets a
block): the norm of a dense Gaussian error comes out within 2 % (one standard deviation); an error confined to one row
sees only the 256 column buckets, 4.5 %; an error confined to one column, or of rank one, sees only the 8 row buckets,
24 % (and reads 5 % low); one single element is exact. `SPREAD` states them. Blocks are independent, so over n blocks
the dense figure falls by sqrt(n). Stored in float32, a sketch cannot resolve errors under about 1e-7 of the tensor's
rms.

A sketch of norms is blind to one element that is off by a little: therefore also the largest |x| of each block, the
largest entries with their places, and strided exact samples.

The random numbers are the project's own: `words` is a counter-based generator (a hash of seed, stream and counter), the
same on every machine. VERSION names it; a change of any bit of it needs a new number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["SPREAD", "VERSION", "Sketch", "SketchSpec", "error_norms", "make", "projections", "words"]

VERSION = 1

# One standard deviation of estimated norm / true norm - 1, for 8 row and 256 column buckets.
SPREAD = {"dense": 0.02, "one row": 0.05, "one column": 0.25, "one element": 0.0}

_ROW_SIGN, _ROW_BUCKET, _COLUMN_SIGN, _COLUMN_BUCKET = range(4)


@dataclass(frozen=True)
class SketchSpec:
    """How a tensor is sketched: rows a block, buckets for rows and columns, largest entries and samples kept."""

    block_rows: int = 1024
    row_buckets: int = 8
    column_buckets: int = 256
    top: int = 16
    samples: int = 64
    seed: int = 0
    version: int = VERSION


@dataclass(frozen=True)
class Sketch:
    """The sketch of a matrix of (rows, columns).

    blocks: (ceil(rows / block_rows), row_buckets, column_buckets) float32. block_max: largest |x| per block.
    top_index, top_value: flat places and values of the largest |x|, largest first. sample_value: the entries at
    `sample_index()`. sum_squares: of the whole matrix, float64.
    """

    spec: SketchSpec
    rows: int
    columns: int
    blocks: np.ndarray
    block_max: np.ndarray
    top_index: np.ndarray
    top_value: np.ndarray
    sample_value: np.ndarray
    sum_squares: float

    def problem(self) -> str:
        """What does not fit in its parts; nothing where all does. Sizes of the spec are sizes of arrays that are made later."""
        spec, size = self.spec, self.rows * self.columns
        if (
            min(spec.block_rows, spec.row_buckets, spec.column_buckets, spec.top, spec.samples, size) < 1
            or spec.seed >= 1 << 32
        ):
            return f"a sketch of {self.rows} × {self.columns} entries by {spec}"
        wanted = {
            "blocks": (-(-self.rows // spec.block_rows), spec.row_buckets, spec.column_buckets),
            "block_max": (-(-self.rows // spec.block_rows),),
            "top_index": (min(spec.top, size),),
            "top_value": (min(spec.top, size),),
            "sample_value": (min(spec.samples, size),),
        }
        for name, shape in wanted.items():
            found = getattr(self, name)
            if found.shape != shape:
                return f"{name} has shape {list(found.shape)} where {list(shape)} is needed"
            if found.dtype.kind != ("i" if name == "top_index" else "f"):
                return f"{name} holds {found.dtype}"
        if not 0 <= int(self.top_index.min()) <= int(self.top_index.max()) < size:
            return "top_index names entries that the tensor has not"
        return ""

    def sample_index(self) -> np.ndarray:
        """Flat places of the strided samples: evenly spread with an odd stride, so that they visit all columns."""
        return sample_index(self.rows * self.columns, self.spec.samples)


def words(seed: int, stream: int, counters: np.ndarray) -> np.ndarray:
    """uint64 words of the counter-based generator (splitmix64's finaliser over seed, stream and counter).

    seed, stream: below 2^32. counters: integers ≥ 0. word = mix(mix(seed·2^32 + stream + g) + (counter+1)·g) with
    g = 0x9E3779B97F4A7C15, all modulo 2^64; mix(z): z ^= z>>30, z *= 0xBF58476D1CE4E5B9, z ^= z>>27,
    z *= 0x94D049BB133111EB, z ^= z>>31.
    """
    golden_ratio = np.uint64(0x9E3779B97F4A7C15)

    def mix(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    with np.errstate(over="ignore"):
        key = mix(np.array([(seed << 32) + stream], np.uint64) + golden_ratio)
        return mix(key + (counters.astype(np.uint64) + np.uint64(1)) * golden_ratio)


def _signs(seed: int, stream: int, counters: np.ndarray) -> np.ndarray:
    return 1.0 - 2.0 * (words(seed, stream, counters) >> np.uint64(63)).astype(np.float64)


def _buckets(seed: int, stream: int, counters: np.ndarray, count: int) -> np.ndarray:
    """Bucket of each counter: the word's upper 32 bits times count, over 2^32."""
    high = words(seed, stream, counters) >> np.uint64(32)
    return ((high * np.uint64(count)) >> np.uint64(32)).astype(np.int64)


def projections(spec: SketchSpec, first_row: int, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """The two ±1 matrices of a block: left (row_buckets, rows), right (columns, column_buckets), float64.

    first_row: number of the block's first row in the whole tensor. The block's sketch is left @ x_RC @ right.
    """
    if spec.version != VERSION:
        raise ValueError(f"sketch version {spec.version} is not this generator's ({VERSION}): regenerate the sketch")
    r, c = np.arange(first_row, first_row + rows), np.arange(columns)
    left = np.zeros((spec.row_buckets, rows))
    left[_buckets(spec.seed, _ROW_BUCKET, r, spec.row_buckets), np.arange(rows)] = _signs(spec.seed, _ROW_SIGN, r)
    right = np.zeros((columns, spec.column_buckets))
    right[c, _buckets(spec.seed, _COLUMN_BUCKET, c, spec.column_buckets)] = _signs(spec.seed, _COLUMN_SIGN, c)
    return left, right


def sample_index(size: int, samples: int) -> np.ndarray:
    """Flat places of up to `samples` strided entries of a tensor of `size` elements."""
    if size <= samples:
        return np.arange(size)
    return np.arange(samples) * ((size // samples - 1) | 1)


def make(x_RC: np.ndarray, spec: SketchSpec | None = None, top_index: np.ndarray | None = None) -> Sketch:
    """Sketch a matrix. top_index: take the top entries at these flat places (a reference's) instead of the largest.

    Raises ValueError for anything but a non-empty matrix of finite real numbers.
    """
    spec = spec or SketchSpec()
    if x_RC.ndim != 2 or x_RC.size == 0:
        raise ValueError(f"a sketch needs a non-empty (rows, columns) matrix, got shape {x_RC.shape}")
    if not np.isfinite(x_RC).all():
        raise ValueError("a sketch needs finite values: a NaN or Inf would spread over its whole block")
    rows, columns = x_RC.shape
    starts = range(0, rows, spec.block_rows)
    blocks = np.zeros((len(starts), spec.row_buckets, spec.column_buckets), np.float32)
    block_max, sum_squares = np.zeros(len(starts)), 0.0
    for n, start in enumerate(starts):
        block = x_RC[start : start + spec.block_rows].astype(np.float64)
        left, right = projections(spec, start, len(block), columns)
        blocks[n] = left @ block @ right
        block_max[n] = np.abs(block).max()
        sum_squares += float(np.square(block).sum())
    flat = x_RC.reshape(-1)
    places = _largest(np.abs(flat), spec.top) if top_index is None else np.asarray(top_index)
    samples = flat[sample_index(flat.size, spec.samples)].astype(np.float64)
    return Sketch(spec, rows, columns, blocks, block_max, places, flat[places].astype(np.float64), samples, sum_squares)


def _largest(magnitude: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest values, largest first, ties by place."""
    count = min(count, magnitude.size)
    least = np.partition(magnitude, magnitude.size - count)[magnitude.size - count]
    places = np.flatnonzero(magnitude >= least)
    return places[np.argsort(-magnitude[places], kind="stable")][:count]


def error_norms(candidate: Sketch, reference: Sketch) -> np.ndarray:
    """Estimated Euclidean norm of the error in each block of rows (spread: see SPREAD), float64.

    Raises ValueError when the two were not made by the same rule over the same shape.
    """
    mine = (candidate.spec, candidate.rows, candidate.columns)
    theirs = (reference.spec, reference.rows, reference.columns)
    if mine != theirs:
        raise ValueError(f"sketches of different rules or shapes cannot be compared: {mine} against {theirs}")
    error = candidate.blocks.astype(np.float64) - reference.blocks.astype(np.float64)
    return np.sqrt(np.square(error).sum(axis=(1, 2)))
