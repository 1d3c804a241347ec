"""Each stage of the bridge called alone, held against its definition written out (spec §3 to §5)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image

from stageparity.run import Trace
from tests import tiny
from vidi.bridge import audio, fold, mask, norm, pack, position, visual
from vidi.bridge.projector import Projector
from vidi.config import VidiConfig

RNG = torch.Generator().manual_seed(0)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=RNG, dtype=torch.float64)


# ---- fold -----------------------------------------------------------------------------------------------------------


def test_patches_stand_row_by_row():
    tower = torch.arange(9.0).view(1, 9, 1)
    assert fold.pad(tower)[0, 0].tolist() == [[0, 1, 2, 0], [3, 4, 5, 0], [6, 7, 8, 0], [0, 0, 0, 0]]


def test_patches_that_are_no_square_are_refused():
    with pytest.raises(ValueError, match="728 patches are no square grid"):
        fold.pad(torch.zeros(1, 728, 2))


def test_channels_of_a_folded_block():
    """channel = c·4 + dy·2 + dx: nothing is averaged, four patches become one token of four times the width."""
    grid = torch.tensor([[[[1.0, 2], [3, 4]], [[5, 6], [7, 8]]]])
    assert fold.space_to_depth(grid)[0, :, 0, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_resize_is_bilinear_between_pixel_centres_without_antialias():
    """Positions (i + 0.5)·scale - 0.5, clamped at the edges; each output reads two rows and two columns."""
    grid = noise(1, 2, 12, 12)
    found = fold.resize(grid, 10)
    place = ((np.arange(10) + 0.5) * 12 / 10 - 0.5).clip(0)
    low = np.floor(place).astype(int)
    high, part = np.minimum(low + 1, 11), torch.from_numpy(place - low)
    rows = grid[:, :, low] * (1 - part)[:, None] + grid[:, :, high] * part[:, None]
    wanted = rows[..., low] * (1 - part) + rows[..., high] * part
    tiny.assert_close(found, wanted, 1e-12)
    # Pillow's bilinear antialiases when it shrinks, so it is another one.
    other = Image.fromarray(grid[0, 0].float().numpy()).resize((10, 10), Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(other) - found[0, 0].numpy()).max() > 1e-2


def test_a_grid_of_that_side_is_left_alone():
    grid = noise(1, 2, 12, 12)
    assert fold.resize(grid, 12) is grid


# ---- norm, projector, position --------------------------------------------------------------------------------------


def test_rms_has_its_own_epsilon():
    x = noise(3, 8) * 1e-2
    wanted = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    tiny.assert_close(norm.rms(x), wanted, 1e-13)


def test_the_weight_multiplies_in_the_activations_dtype():
    layer = norm.RMSNorm(8).to(torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(noise(8))
    x = noise(5, 8).to(torch.bfloat16)
    wide = x.float()
    normed = (wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()).to(torch.bfloat16)
    assert torch.equal(layer(x), layer.weight * normed)


def test_the_projectors_gelu_is_the_erf_form():
    layer = Projector(6, 4).double()
    x = noise(3, 6)
    h = x @ layer.fc1.weight.T + layer.fc1.bias
    h = h * (1 + torch.erf(h / math.sqrt(2))) / 2
    tiny.assert_close(layer(x), h @ layer.fc2.weight.T + layer.fc2.bias, 1e-12)


def test_the_table_is_torchs_exp_in_float32_on_the_cpu():
    for width in (24, 40, 64, 3584):
        wanted = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(10000.0) / width))
        assert torch.equal(position.frequencies(width), wanted)


def test_positions_are_computed_in_exactly_that_order():
    """arange / (L-1) · (P-1): another order is off by an ulp, which at 9999 is a visible angle."""
    found = position.positions(7, 10000, torch.float32)
    assert torch.equal(found, torch.arange(7, dtype=torch.float32) / 6 * 9999)
    linspace = torch.linspace(0, 9999, 331)
    assert not torch.equal(position.positions(331, 10000, torch.float32), linspace)


def test_an_embedding_is_two_layers_over_the_sinusoid():
    module = position.PositionEmbedding(8, 2).double()
    found = position.embed(module, "h", 5, None, torch.float64)
    table = position.sinusoid(torch.arange(5.0, dtype=torch.float64) / 4, module.freq_K.double())
    h = table @ module.fc1.weight.T + module.fc1.bias
    h = h * (1 + torch.erf(h / math.sqrt(2))) / 2
    tiny.assert_close(found, h @ module.fc2.weight.T + module.fc2.bias, 1e-12)


def test_noise_is_asked_for_by_axis_and_length():
    asked = []

    def given(axis: str, length: int) -> torch.Tensor:
        asked.append((axis, length))
        return torch.full((length,), 0.25)

    module = position.PositionEmbedding(8, 10000).double()
    noisy = position.embed(module, "t_v.1", 4, given, torch.float64)
    assert asked == [("t_v.1", 4)]
    assert not torch.equal(noisy, position.embed(module, "t_v.1", 4, None, torch.float64))


# ---- mask and packing -----------------------------------------------------------------------------------------------


def test_a_token_is_kept_where_anything_is_not_zero_and_its_sample_is_not_silent():
    packed = torch.tensor([[[1.0, -1], [0, 0], [0, 3]], [[1, 1], [2, 2], [0, 0]]])
    signal = torch.tensor([True, False])
    assert mask.keep_tokens(packed, signal).tolist() == [[True, False, True], [False] * 3]


def test_a_sum_that_cancels_is_not_zero():
    assert mask.keep_tokens(torch.tensor([[[1.0, -1.0]]]), torch.tensor([True])).item() is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_faint_token_is_a_token(dtype):
    """Kept is what is not exactly zero: no threshold."""
    packed = torch.tensor([[[0, 1e-30], [0, 0], [1e-6, 0]]], dtype=dtype)
    assert mask.keep_tokens(packed, torch.tensor([True])).tolist() == [[True, False, True]]


def test_signal_is_judged_on_the_raw_input():
    zero, one = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    one[1, 2, 3, 3] = 1e-30
    pixels = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)  # black, which is -1: a picture
    assert mask.has_signal([zero, one, zero[:0], pixels, pixels[:0]]).tolist() == [False, True, False, True, False]


def test_packing_pads_norms_and_masks():
    rows, llm_norm, tap = noise(5, 4), norm.RMSNorm(4, init=0.5).double(), Trace()
    stream = pack.to_stream(rows, [3, 2], torch.tensor([True, True]), llm_norm, "vision", tap)
    held = tap.tensors()
    assert torch.equal(held["vision.packed"][1, :2], rows[3:])
    assert not held["vision.packed"][1, 2].any()
    assert stream.keep_BL.tolist() == [[True] * 3, [True, True, False]]
    tiny.assert_close(stream.x_BLD[0], 0.5 * norm.rms(rows[:3]), 1e-12)
    assert not stream.x_BLD[1, 2].any()


# ---- audio ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "positions", "tokens"), [(0, 0, 0), (1, 0, 0), (9, 4, 0), (10, 5, 1), (3000, 1500, 300), (4501, 2250, 450)]
)
def test_counts_of_audio(size, positions, tokens):
    full = VidiConfig.full()
    assert audio.num_positions(size, full) == positions
    assert audio.num_tokens(size, full) == tokens


def test_pieces_of_a_sample_are_joined_then_cut():
    tower = torch.arange(3 * 4 * 2.0).view(3, 4, 2)
    found = audio.trim(tower, [2, 1], [7, 3])
    assert torch.equal(found[0], tower[:2].flatten(0, 1)[:7])
    assert torch.equal(found[1, :3], tower[2, :3])
    assert not found[1, 3:].any()


def test_an_hours_pieces_are_all_joined():
    """480 pieces of 30 s, four hours: nothing is cut but the end, and a sample counts as heard for its last value alone."""
    tower = torch.arange(480 * 3.0).view(480, 3, 1)
    found = audio.trim(tower, [479, 1], [479 * 3 - 1, 2])
    assert torch.equal(found[0], tower[:479].flatten(0, 1)[:-1])
    assert found[1, :3].flatten().tolist() == [479 * 3, 479 * 3 + 1, 0]
    tower = torch.zeros(480, 2, 2)
    assert not mask.has_signal([tower])
    tower[-1, -1, -1] = 1
    assert mask.has_signal([tower])


def test_pooling_is_one_strided_convolution():
    conv = torch.nn.Conv1d(2, 3, 5, stride=5, bias=False).double()
    x = noise(1, 11, 2)
    found = audio.pool(x, conv)
    assert found.shape == (1, 3, 2)
    wanted = torch.stack([(conv.weight * x[0, 5 * i : 5 * i + 5].T).sum((1, 2)) for i in range(2)], dim=1)
    tiny.assert_close(found[0], wanted, 1e-12)


def test_a_window_that_straddles_a_samples_end_is_dropped():
    """Of 7 positions one window is whole; what stands beyond (zeros) never becomes a token."""
    model = tiny.model()
    tower = noise(1, 50, 32)
    stream = audio.encode(model.bridge, tower, [1], [14], torch.tensor([True]), model.config)
    assert stream.x_BLD.shape[1] == 1
    moved = tower.clone()
    moved[0, 7:] = 99
    again = audio.encode(model.bridge, moved, [1], [14], torch.tensor([True]), model.config)
    assert torch.equal(stream.x_BLD, again.x_BLD)


# ---- visual ---------------------------------------------------------------------------------------------------------


def test_tokens_run_over_time_then_rows_then_columns():
    """Two frames: token t·49 + y·7 + x is made of the 2×2 patches at (y, x) of frame t, and of them alone."""
    model = tiny.model()
    tower = noise(2, 169, 32)
    signal = torch.tensor([True])
    before = visual.encode(model.bridge, iter([tower]), [2], signal, model.config).x_BLD[0]
    moved = tower.clone()
    moved[1, 13 * 4 + 6] += 1  # frame 1, row 4, column 6: block (2, 3)
    after = visual.encode(model.bridge, iter([moved]), [2], signal, model.config).x_BLD[0]
    changed = (before != after).any(-1).nonzero().flatten().tolist()
    assert changed == [49 + 2 * 7 + 3]


def test_stages_come_in_order_with_their_shapes():
    model, shapes = tiny.model(), {}

    def tap(stage, x):
        shapes.setdefault(stage, []).append(tuple(x.shape))
        return x

    chunks, signal_B = iter(noise(5, 169, 32).split(2)), torch.tensor([True, True])
    stream = visual.encode(model.bridge, chunks, [2, 3], signal_B, model.config, tap=tap)
    assert shapes["vision.pad"] == [(2, 32, 14, 14), (2, 32, 14, 14), (1, 32, 14, 14)]
    assert shapes["vision.space_to_depth"][0] == (2, 128, 7, 7)
    assert shapes["vision.pos_h.embed"] == [(1, 7, 1, 40)]
    assert shapes["vision.pos_w.embed"] == [(1, 1, 7, 40)]
    assert shapes["vision.pos_t.embed.1"] == [(3, 1, 1, 40)]
    assert "vision.resize" not in shapes
    assert stream.x_BLD.shape == (2, 3 * 49, 40)
    assert stream.keep_BL.sum(1).tolist() == [98, 147]


@pytest.mark.parametrize(("frames", "said"), [(4, "too few"), (6, "too many")])
def test_frames_that_do_not_add_up_are_refused(frames, said):
    model = tiny.model()
    with pytest.raises(ValueError, match=said):
        visual.encode(
            model.bridge, iter(noise(frames, 169, 32).split(2)), [2, 3], torch.tensor([True, True]), model.config
        )


def test_a_budget_for_each_video_makes_it_independent_of_its_neighbours():
    config = dataclasses.replace(tiny.config(), visual_token_budget=120, budget_scope="video")
    shared = dataclasses.replace(config, budget_scope="batch")
    bridge, tower, signal = tiny.model().bridge, noise(5, 169, 32), torch.tensor([True, True])
    alone = visual.encode(bridge, iter([tower[:2]]), [2], signal[:1], config)
    both = visual.encode(bridge, iter([tower]), [2, 3], signal, config)
    tiny.assert_close(both.x_BLD[0, : alone.x_BLD.shape[1]], alone.x_BLD[0], 1e-12)
    assert both.keep_BL.sum(1).tolist() == [2 * 49, 3 * 36]
    # Sharing one budget, the shorter video shrinks as well.
    assert visual.encode(bridge, iter([tower]), [2, 3], signal, shared).keep_BL.sum(1).tolist() == [2 * 25, 3 * 25]
