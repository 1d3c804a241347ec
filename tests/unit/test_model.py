"""The whole model: what may be absent, what must not matter, training, gradients (spec §5, §8, §10)."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from tests import tiny
from vidi.attention import dispatch
from vidi.inputs.batch import Batch
from vidi.model import VidiModel, frame_chunks


def kept(batch: Batch) -> list[int]:
    keep = batch.input_ids_BT != -200
    return ((keep & batch.keep_BT) if batch.keep_BT is not None else keep).sum(1).tolist()


# ---- masks ----------------------------------------------------------------------------------------------------------


def test_no_mask_means_all_kept():
    batch = tiny.make([tiny.sample(8)])
    assert torch.equal(tiny.model()(dataclasses.replace(batch, keep_BT=None)), tiny.model()(batch))


def test_the_placeholders_place_has_no_effect():
    sample = tiny.sample(8)
    ids = [i for i in sample.ids if i != -200]
    outs = [
        tiny.model()(tiny.make([dataclasses.replace(sample, ids=[*ids[:at], -200, *ids[at:]])])) for at in (0, 3, 8)
    ]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_left_padding_and_holes_close():
    batch = tiny.make([tiny.sample(6)])
    ids, keep = batch.input_ids_BT, torch.ones(1, 10, dtype=torch.bool)
    loose = torch.tensor([[9, *ids[0, :3].tolist(), 9, 9, *ids[0, 3:].tolist()]])
    keep[0, [0, 4, 5]] = False
    found = tiny.model()(dataclasses.replace(batch, input_ids_BT=loose, keep_BT=keep))
    assert torch.equal(found, tiny.model()(batch))


# ---- what may be absent ---------------------------------------------------------------------------------------------


def test_text_alone():
    found = tiny.model()(tiny.make([tiny.sample(8, 0, 0)]))
    assert found.shape == (1, 8, 512)
    assert found.isfinite().all()


@pytest.mark.parametrize("missing", ["images", "audio"])
def test_a_modality_absent_for_a_sample_equals_absent_for_the_batch(missing):
    lone = tiny.sample(8, 0, 60) if missing == "images" else tiny.sample(8, 2, 0)
    batch = tiny.make([lone, tiny.sample(11, 3, 110, seed=4)])
    assert batch.images is not None
    assert batch.audios is not None
    alone = tiny.make([lone])
    assert (alone.images if missing == "images" else alone.audios) is None
    tiny.assert_close(tiny.model()(batch)[0, :8], tiny.model()(alone)[0])


@pytest.mark.parametrize("size", [1, 5, 9])
def test_less_than_one_audio_token_is_no_audio(size):
    with_audio = tiny.model()(tiny.make([tiny.sample(8, 2, size)]))
    without = tiny.model()(tiny.make([tiny.sample(8, 2, 0)]))
    tiny.assert_close(with_audio, without)
    assert "a" not in tiny.model().streams(tiny.make([tiny.sample(8, 2, size)]))


def test_silence_of_zeros_is_no_modality():
    """All-zero frames or all-zero log-mel: the sample keeps no token of it."""
    sample = tiny.sample(8, 2, 60)
    zero_frames = dataclasses.replace(sample, images=torch.zeros_like(sample.images))
    zero_sound = dataclasses.replace(sample, audio=torch.zeros_like(sample.audio))
    tiny.assert_close(tiny.model()(tiny.make([zero_frames])), tiny.model()(tiny.make([_without(sample, "images")])))
    tiny.assert_close(tiny.model()(tiny.make([zero_sound])), tiny.model()(tiny.make([_without(sample, "audio")])))


def _without(sample, modality):
    gone = {"images": None} if modality == "images" else {"audio": None, "audio_size": None}
    return dataclasses.replace(sample, **gone)


def test_black_pixels_are_a_picture():
    sample = dataclasses.replace(tiny.sample(8, 2, 0), images=torch.zeros(2, 3, 26, 26, dtype=torch.uint8))
    streams = tiny.model().streams(tiny.make([sample]))
    assert streams["v"].keep_BL.all()


def test_one_frame_and_one_audio_token_stand_at_position_0():
    seen = tiny.Seen()
    out = tiny.model()(tiny.make([tiny.sample(5, 1, 10)]), tap=seen)
    assert out.isfinite().all()
    assert seen["audio.pos_t"].shape[0] == 1
    module = tiny.model().bridge.pos_t
    first_of_many = module(7)[:1]
    tiny.assert_close(seen["vision.pos_t.embed.0"][:, 0, 0], first_of_many, 1e-12)
    tiny.assert_close(seen["audio.pos_t.embed.0"], first_of_many, 1e-12)


def test_both_modalities_change_the_answer():
    base = tiny.sample(8, 2, 60)
    out = tiny.model()(tiny.make([base]))
    for gone in ("images", "audio"):
        other = tiny.model()(tiny.make([_without(base, gone)]))
        assert (out - other).abs().max() > 1e-3


# ---- chunks and backends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 100])
def test_chunks_hold_every_frame_once_in_order(size):
    videos = [torch.arange(3).view(3, 1), torch.arange(3, 3).view(0, 1), torch.arange(3, 8).view(5, 1)]
    chunks = list(frame_chunks(videos, size))
    assert torch.cat(chunks).flatten().tolist() == list(range(8))
    assert all(len(c) == size for c in chunks[:-1])
    assert 0 < len(chunks[-1]) <= size


def test_a_backend_that_cannot_cap_scores_refuses_the_decoder_and_names_others():
    model = copy.copy(tiny.model())
    model.backend = "sdpa"
    with pytest.raises(ValueError, match=r"sdpa.*softcap 50.*eager"):
        model(tiny.make([tiny.sample()]))


def test_an_unknown_backend_is_refused_when_the_model_is_made():
    with pytest.raises(
        ValueError, match=f"unknown attention backend 'fast'; choose from {', '.join(dispatch.BACKENDS)}"
    ):
        VidiModel(tiny.config(), backend="fast")


def test_masks_are_read_from_the_device_once_a_pass(monkeypatch):
    """Lengths and indices are built once per forward: no host sync for each layer."""
    calls = []
    real = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda x: calls.append(1) or real(x))
    batch = tiny.make([tiny.sample(12, 2, 60), tiny.sample(5, 1, 23)])
    model = tiny.model()
    model.decode_text(batch, model.streams(batch))
    assert len(calls) <= 6  # text, visual and audio rows, and what the inputs ask; not four layers times three


# ---- training -------------------------------------------------------------------------------------------------------


def test_positions_are_noisy_in_training_alone():
    model, asked = copy.deepcopy(tiny.model()), []

    def noise(axis: str, length: int) -> torch.Tensor:
        asked.append((axis, length))
        return torch.full((length,), 0.3)

    model.position_noise = noise
    batch = tiny.make([tiny.sample(6, 3, 60), tiny.sample(4, 2, 30)])
    quiet = model(batch)
    assert asked == []
    model.train()
    noisy = model(batch)
    assert sorted(asked) == [("h", 7), ("t_a.0", 6), ("t_a.1", 3), ("t_v.0", 3), ("t_v.1", 2), ("w", 7)]
    assert not torch.equal(quiet, noisy)
    model.eval()
    assert torch.equal(model(batch), quiet)


def test_training_noise_follows_a_generator():
    model, batch = copy.deepcopy(tiny.model()).train(), tiny.make([tiny.sample(6, 3, 60)])
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model(batch))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_a_new_model_is_in_evaluation_mode():
    assert not VidiModel(tiny.config()).training


@pytest.mark.slow
def test_gradients_equal_finite_differences():
    """One number of every kind of parameter that feeds the loss, float64, central differences."""
    model = copy.deepcopy(tiny.model()).requires_grad_(True)
    labelled = [
        dataclasses.replace(s, labels=[-100, *s.ids[1:]])
        for s in (tiny.sample(9, 2, 60), tiny.sample(5, 1, 30, seed=2))
    ]
    batch = tiny.make(labelled)
    named = dict(model.named_parameters())
    loss = model.loss(batch)
    slopes = dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))
    unused = {name for name, slope in slopes.items() if slope is None}
    # The tower's last layer and head feed nothing (spec §10).
    assert unused == {n for n in named if n.startswith(("vision_tower.unused.", "vision_tower.layers.2."))}
    kinds = {}
    for name in named:
        if name not in unused:
            kinds.setdefault(".".join("*" if part.isdigit() else part for part in name.split(".")), name)
    assert len(kinds) > 55
    step, wrong = 1e-5, []
    with torch.no_grad():
        for name in kinds.values():
            flat, slope = named[name].view(-1), slopes[name].reshape(-1)
            at = int(slope.abs().argmax())  # where it counts most
            here = flat[at].item()
            values = []
            for move in (step, -step):
                flat[at] = here + move
                values.append(model.loss(batch).item())
            flat[at] = here
            measured = (values[0] - values[1]) / (2 * step)
            if abs(measured - slope[at].item()) > 1e-5 * max(abs(measured), 1e-3):
                wrong.append(f"{name}: {slope[at].item():.9g}, measured {measured:.9g}")
    assert wrong == []


def test_a_pass_leaves_weights_and_inputs_alone():
    model = tiny.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = tiny.make([tiny.sample(8, 2, 60)])
    images, audio = batch.images[0].clone(), batch.audios[0].clone()
    model(batch)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(batch.images[0], images)
    assert torch.equal(batch.audios[0], audio)


def test_logits_have_a_row_for_every_text_position():
    batch = tiny.make([tiny.sample(8), tiny.sample(3, 1, 0)])
    assert tiny.model()(batch).shape == (2, 8, 512)
    assert kept(batch) == [8, 3]
