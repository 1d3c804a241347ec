"""The token budget, the fold and the positions, for every length (spec §3.3, §3.4, §5)."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given

from vidi import sizes_7b
from vidi.bridge import conv_pool, fold, position, visual
from vidi.config import VidiConfig

BUDGET = 60000


@given(st.integers(1, 20000))
def test_the_side_is_even_at_least_10_and_never_grows_with_frames(frames):
    side, more = (fold.resized_side(n, 28, BUDGET) for n in (frames, frames + 1))
    assert side % 2 == 0
    assert 10 <= side <= 28
    assert more <= side
    tokens = frames * (side // 2) ** 2
    assert tokens <= BUDGET or side == 10
    # The side is the largest that the budget allows: two more patches a side would not fit.
    assert side == 28 or frames * (side // 2 + 1) ** 2 > BUDGET


@pytest.mark.parametrize(
    ("frames", "side"),
    [(1, 28), (306, 28), (307, 26), (1666, 12), (1667, 10), (2400, 10), (2401, 10), (10000, 10)],
)
def test_the_edges_of_the_budget(frames, side):
    assert fold.resized_side(frames, 28, BUDGET) == side
    assert (frames * (side // 2) ** 2 > BUDGET) == (frames > 2400)


@given(st.lists(st.integers(0, 400), min_size=1, max_size=4))
def test_one_budget_for_a_batch_or_one_for_each_video(frames):
    """Scope "batch" counts all frames together; scope "video" gives each video what it would get alone."""
    full = VidiConfig.full()
    shared = visual.groups(frames, full)
    assert [g.side for g in shared] == [fold.resized_side(sum(frames), 28, BUDGET)]
    own = visual.groups(frames, dataclasses.replace(full, budget_scope="video"))
    assert [g.side for g in own] == [fold.resized_side(n, 28, BUDGET) for n in frames]
    assert [g.suffix for g in own] == [f".{b}" for b in range(len(frames))]


@pytest.mark.parametrize("side", range(10, 29, 2))
def test_shrinking_is_bilinear_and_nothing_else(side):
    """From 28 to each side that the budget gives: the middle of a cell over the two cells beside it, never an average of more."""
    grid = torch.randn(1, 2, 28, 28, generator=torch.Generator().manual_seed(side), dtype=torch.float64)
    at = ((torch.arange(side, dtype=torch.float64) + 0.5) * 28 / side - 0.5).clamp(min=0)
    low = at.long()
    weights = torch.zeros(side, 28, dtype=torch.float64)
    weights[range(side), low] += 1 - (at - low)
    weights[range(side), (low + 1).clamp(max=27)] += at - low
    torch.testing.assert_close(fold.resize(grid, side), weights @ grid @ weights.T, rtol=0, atol=1e-12)


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))
def test_space_to_depth_inverts(frames, channels, height, width):
    """channel = c·4 + dy·2 + dx, so that reading it back gives every patch, once, in its place."""
    grid = torch.arange(frames * channels * height * width * 4).view(frames, channels, 2 * height, 2 * width).double()
    folded = fold.space_to_depth(grid)
    assert folded.shape == (frames, 4 * channels, height, width)
    back = folded.view(frames, channels, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3).reshape(grid.shape)
    assert torch.equal(back, grid)


@given(st.integers(1, 30), st.integers(1, 4))
def test_padding_to_an_even_grid_adds_zeros_right_and_below(side, channels):
    tower = torch.arange(1.0, side * side * channels + 1).view(1, side * side, channels)
    grid = fold.pad(tower)
    even = side + side % 2
    assert grid.shape == (1, channels, even, even)
    assert torch.equal(grid[:, :, :side, :side].flatten(2).transpose(1, 2), tower)
    assert not grid[:, :, side:].any()
    assert not grid[:, :, :, side:].any()


@given(st.integers(1, 60), st.integers(1, 20))
def test_samples_stand_evenly_from_corner_to_corner(rows, samples):
    """The 7B's pool along one axis: no row beyond the two around a sample, and none that no sample needs."""
    touched, weights_NS = conv_pool.corner_rows(rows, samples)
    assert touched == sorted(set(touched))
    assert weights_NS.ne(0).any(0).all()
    torch.testing.assert_close(weights_NS.sum(1), torch.ones(samples, dtype=torch.float64))
    wanted = torch.linspace(0, rows - 1, samples, dtype=torch.float64) if samples > 1 else torch.zeros(1).double()
    torch.testing.assert_close(weights_NS @ torch.tensor(touched).double(), wanted, rtol=0, atol=1e-9)
    for row in weights_NS:
        used = [touched[i] for i in row.nonzero().flatten()]
        assert used[-1] - used[0] <= 1


@given(st.lists(st.integers(0, 20000), min_size=1, max_size=4))
def test_the_7b_has_one_grid_for_any_number_of_frames(frames):
    config = sizes_7b.config("tiny")
    grid = conv_pool.ConvPool(config)
    (group,) = grid.groups(frames, config)
    assert (group.num_frames, grid.tokens_side(group)) == (sum(frames), config.image_pool_size)


@given(st.integers(2, 200_000), st.sampled_from([2, 10000]), st.sampled_from([torch.float32, torch.float64]))
@example(144_000, 10000, torch.float32)  # four hours of sound
def test_positions_span_the_whole_interval_at_any_length(length, extent, dtype):
    p = position.positions(length, extent, dtype)
    assert p.dtype == dtype
    assert p[0] == 0
    assert p[-1] == extent - 1
    assert (p.diff() > 0).all()


def test_a_single_position_stands_at_0():
    assert position.positions(1, 10000, torch.float32).tolist() == [0.0]


@given(st.integers(1, 300), st.integers(0, 99))
def test_training_noise_stays_within_its_bounds(length, seed):
    """normal · 0.45 cut at ±0.45 on the index, the sum clipped to [0, L-1], then scaled."""
    noise = position.draw_noise("h", length, torch.Generator().manual_seed(seed))
    again = position.draw_noise("h", length, torch.Generator().manual_seed(seed))
    assert torch.equal(noise, again)
    assert noise.abs().max() <= 0.45
    p = position.positions(length, 10000, torch.float64, noise)
    index = torch.arange(length, dtype=torch.float64)
    wanted = (index + noise).clamp(0, length - 1) / max(length - 1, 1) * 9999
    assert torch.equal(p, wanted)
    assert (p >= 0).all()
    assert (p <= 9999).all()


def test_training_noise_has_the_spread_of_a_cut_normal():
    noise = position.draw_noise("h", 200_000, torch.Generator().manual_seed(1))
    cut = (noise.abs() == torch.tensor(0.45)).float().mean()
    assert cut.item() == pytest.approx(0.3173, abs=0.01)  # beyond one standard deviation
    assert noise.mean().item() == pytest.approx(0, abs=0.005)


@given(st.integers(0, 3), st.integers(1, 40))
def test_the_sinusoid_alternates_sine_and_cosine(seed, width):
    p = torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10
    freq = torch.rand(width, generator=torch.Generator().manual_seed(seed + 9), dtype=torch.float64)
    table = position.sinusoid(p, freq)
    assert torch.equal(table[:, 0::2], torch.sin(p[:, None] * freq))
    assert torch.equal(table[:, 1::2], torch.cos(p[:, None] * freq))
