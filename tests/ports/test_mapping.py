"""Mappings that are proposed: the right one for each way of tracing, none for another tensor."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from stageparity.port.mapping import propose
from stageparity.port.stagetrace import arrange

RNG = np.random.default_rng(7)
GOLDEN = RNG.normal(size=(2, 4, 5, 3))


def agrees(golden: np.ndarray) -> Callable[[np.ndarray], bool]:
    return lambda x: bool(np.abs(x - golden).max() < 1e-6)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (1, 0, 2, 3), (3, 2, 1, 0)])
def test_turned_axes(order: tuple[int, ...]) -> None:
    candidate = GOLDEN.transpose(order)
    said = propose(candidate, GOLDEN, agrees(GOLDEN))
    layout = re.search('layout="(.*)"', said)
    assert layout is not None
    np.testing.assert_array_equal(arrange(candidate, layout[1]), GOLDEN)


def test_turned_axes_of_equal_size() -> None:
    square = RNG.normal(size=(3, 3, 2))
    assert 'layout="a b c -> b a c"' in propose(square.transpose(1, 0, 2), square, agrees(square))


@pytest.mark.parametrize("shape", [(8, 5, 3), (2, 20, 3), (2, 4, 15), (40, 3)])
def test_joined_axes(shape: tuple[int, ...]) -> None:
    joined = GOLDEN.reshape(shape)
    for candidate, golden in ((joined, GOLDEN), (GOLDEN, joined)):
        layout = re.search('layout="(.*)"', propose(candidate, golden, agrees(golden)))
        assert layout is not None
        np.testing.assert_array_equal(arrange(candidate, layout[1], golden.shape), golden)


@pytest.mark.parametrize("tiled", [False, True])
def test_repeated_heads(tiled: bool) -> None:
    few = GOLDEN[:, :2]
    golden = np.concatenate([few, few], 1) if tiled else np.repeat(few, 2, 1)
    layout = re.search('layout="(.*)"', propose(few, golden, agrees(golden)))
    assert layout is not None
    assert ("(r b)" if tiled else "(b r)") in layout[1]
    np.testing.assert_array_equal(arrange(few, layout[1], golden.shape), golden)


def test_surplus_rows() -> None:
    padded = np.insert(GOLDEN, [2, 5, 5], 9.0, axis=2)
    said = propose(padded, GOLDEN, agrees(GOLDEN))
    assert said == "3 surplus rows along axis 2: the golden's are rows 0:2, 3:6; cut the rest with keep="


def test_a_missing_piece() -> None:
    assert "the first 3 of 5 rows along axis 2" in propose(GOLDEN[:, :, :3], GOLDEN, agrees(GOLDEN))
    assert "the last 2 of 5 rows along axis 2" in propose(GOLDEN[:, :, 3:], GOLDEN, agrees(GOLDEN))


@pytest.mark.parametrize(
    "candidate",
    [GOLDEN * 1.01, GOLDEN[..., ::-1], np.zeros((2, 4, 5, 4)), GOLDEN[:, :3] * 1.01, GOLDEN.reshape(120) + 1],
)
def test_what_is_another_tensor_gets_none(candidate: np.ndarray) -> None:
    assert propose(candidate, GOLDEN, agrees(GOLDEN)) == ""
