"""Sketches: the generator by hand, linearity, and the error that the factored form resolves."""

from __future__ import annotations

import numpy as np
import pytest

from stageparity import sketch
from stageparity.sketch import SketchSpec

MASK = (1 << 64) - 1


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_words_by_hand() -> None:
    golden_ratio = 0x9E3779B97F4A7C15
    for seed, stream, counter in ((0, 0, 0), (7, 3, 12345), (2**32 - 1, 2, 2**40)):
        key = _mix(((seed << 32) + stream + golden_ratio) & MASK)
        by_hand = _mix((key + (counter + 1) * golden_ratio) & MASK)
        assert int(sketch.words(seed, stream, np.array([counter]))[0]) == by_hand
    frozen = [6185607176102258243, 10501912786529156102, 7560840679159554992]
    assert sketch.words(1, 2, np.arange(3)).tolist() == frozen, "the generator changed: it needs a new VERSION"


def test_two_products_make_the_sketch() -> None:
    x, spec = np.random.default_rng(1).standard_normal((50, 30)), SketchSpec(block_rows=32)
    made = sketch.make(x, spec)
    for block, (first, rows) in enumerate(((0, 32), (32, 18))):
        left, right = sketch.projections(spec, first, rows, 30)
        np.testing.assert_allclose(made.blocks[block], left @ x[first : first + rows] @ right, rtol=1e-6)
        assert (np.abs(left).sum(axis=0) == 1).all()
        assert (np.abs(right).sum(axis=1) == 1).all()


def test_sketches_are_linear_and_blocks_local() -> None:
    rng = np.random.default_rng(2)
    x, spec = rng.standard_normal((96, 40)), SketchSpec(block_rows=32)
    error = np.zeros_like(x)
    error[40] = rng.standard_normal(40)
    norms = sketch.error_norms(sketch.make(x + error, spec), sketch.make(x, spec))
    assert norms[0] == norms[2] == 0
    assert norms[1] == pytest.approx(np.linalg.norm(error), rel=0.2)


@pytest.mark.slow
def test_what_the_factored_form_resolves() -> None:
    """The measured spreads lie under the stated ones, and not far: a generator gone bad shows either way."""

    def spread(make_error) -> float:
        ratios = []
        for seed in range(150):
            error = make_error(np.random.default_rng(seed))
            made = sketch.make(error, SketchSpec(seed=seed, top=1, samples=1))
            ratios.append(np.sqrt(np.square(made.blocks.astype(np.float64)).sum()) / np.linalg.norm(error))
        return float(np.std(ratios))

    def only(index) -> object:
        def make_error(rng: np.random.Generator) -> np.ndarray:
            error = np.zeros((64, 300))
            error[index] = rng.standard_normal(error[index].shape)
            return error

        return make_error

    measured = {
        "dense": spread(lambda rng: rng.standard_normal((64, 300))),
        "one row": spread(only((5, slice(None)))),
        "one column": spread(only((slice(None), 7))),
        "one element": spread(only((slice(5, 6), slice(7, 8)))),
    }
    for kind, stated in sketch.SPREAD.items():
        assert measured[kind] <= stated * 1.15 + 1e-6, (kind, measured)
        assert measured[kind] >= stated * 0.6 - 1e-6, (kind, measured)


def test_top_entries_and_samples() -> None:
    x = np.random.default_rng(3).standard_normal((20, 10))
    x[3, 4], x[11, 0] = 50.0, -60.0
    made = sketch.make(x, SketchSpec(block_rows=8, top=2, samples=16))
    assert made.top_index.tolist() == [110, 34]
    assert made.top_value.tolist() == [-60.0, 50.0]
    np.testing.assert_array_equal(made.sample_value, x.reshape(-1)[made.sample_index()])
    assert len(set((made.sample_index() % 10).tolist())) == 10
    np.testing.assert_array_equal(made.block_max, [np.abs(x[a : a + 8]).max() for a in (0, 8, 16)])


def test_refusals() -> None:
    x = np.ones((4, 4))
    with pytest.raises(ValueError, match="non-empty"):
        sketch.make(x[:0])
    with pytest.raises(ValueError, match="finite"):
        sketch.make(x * np.nan)
    with pytest.raises(ValueError, match="different rules or shapes"):
        sketch.error_norms(sketch.make(x), sketch.make(x, SketchSpec(seed=1)))
    with pytest.raises(ValueError, match="sketch version 0 is not"):
        sketch.make(x, SketchSpec(version=0))
