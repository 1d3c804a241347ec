"""The 7B's way from patches to tokens (its spec, §3.2-3.3): what is sampled, and that nothing else need be computed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as nnf

from tests import seven
from vidi.bridge.conv_pool import ConvPool, corner_rows
from vidi.parity.trace import Trace


@pytest.mark.parametrize(
    ("rows", "samples", "touched"),
    [(14, 2, [0, 13]), (19, 3, [0, 9, 18]), (21, 4, [0, 6, 7, 13, 14, 20]), (22, 5, [0, 5, 6, 10, 11, 15, 16, 21])],
)
def test_rows_by_hand(rows: int, samples: int, touched: list[int]) -> None:
    """What 27 patches leave of kernels 14, 9, 7 and 6: the samples of the specification."""
    found, weights = corner_rows(rows, samples)
    assert found == touched
    wanted = [i * (rows - 1) / (samples - 1) for i in range(samples)]
    assert (weights @ torch.tensor(found, dtype=torch.float64)).tolist() == pytest.approx(wanted, abs=1e-12)
    assert weights.sum(1).tolist() == pytest.approx([1.0] * samples, abs=1e-15)


def test_a_single_sample_stands_at_the_first_row() -> None:
    assert corner_rows(1, 1)[0] == [0]
    assert corner_rows(5, 1)[0] == [0]


@pytest.mark.parametrize("pool", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("patches", [13, 27])
def test_it_is_a_convolution_then_bilinear_with_aligned_corners(pool: int, patches: int) -> None:
    config = seven.config()
    vision = dataclasses.replace(config.vision, image_size=2 * patches, hidden_size=4, num_heads=2)
    grid = ConvPool(dataclasses.replace(config, vision=vision, image_pool_size=pool)).double()
    assert grid.conv.weight.shape == (4, 4, -(-patches // pool), -(-patches // pool))
    x = torch.randn(2, patches**2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(pool))
    square = x.transpose(1, 2).reshape(2, 4, patches, patches)
    wanted = nnf.interpolate(grid.conv(square), size=(pool, pool), mode="bilinear", align_corners=True)
    (group,) = grid.groups([1, 1], config)
    for everywhere in (False, True):
        grid.everywhere = everywhere
        seen = Trace()
        found = grid(x, group, seen)
        assert (found - wanted.permute(0, 2, 3, 1)).abs().max() < 1e-13
        assert set(seen.tensors()) == ({"vision.conv", "vision.pool"} if everywhere else {"vision.pool"})
        assert grid.tokens_side(group) == pool


def test_patches_that_are_no_square_are_refused() -> None:
    grid = ConvPool(seven.config())
    with pytest.raises(ValueError, match="168 patches are no square grid"):
        grid(torch.zeros(1, 168, 32), grid.groups([1], seven.config())[0])
