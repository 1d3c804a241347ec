"""Padding, packing and keep masks: each drawn out by hand, or against a loop."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidi.config import VidiConfig
from vidi.inputs import batch
from vidi.inputs.batch import Batch, Sample

CONFIG = VidiConfig.tiny()  # pictures of 26 pixels, 16 mel bins, 100 mel frames a piece, 512 ids
T, F = True, False


def pictures(num_frames, dtype=torch.uint8):
    return torch.ones(num_frames, 3, 26, 26, dtype=dtype)


def test_two_samples():
    one = Sample([2, 7, -200, 9], pictures(3), torch.ones(1, 16, 100), 40)
    two = Sample([2, -200, 5, 6, 8, 1], pictures(2), torch.ones(2, 16, 100), 130)
    made = batch.make_batch([one, two], CONFIG)
    assert made.input_ids_BT.tolist() == [[2, 7, -200, 9, 0, 0], [2, -200, 5, 6, 8, 1]]
    assert made.keep_BT.tolist() == [[T, T, T, T, F, F], [T] * 6]
    assert [len(x) for x in made.images] == [3, 2]
    assert made.audio_sizes == (40, 130)
    assert made.labels_BT is None
    assert len(made) == 2


def test_padding_uses_the_configurations_id():
    rows = [Sample([2, 5]), Sample([2, 5, 6])]
    assert batch.make_batch(rows, dataclasses.replace(CONFIG, pad_id=9)).input_ids_BT.tolist() == [[2, 5, 9], [2, 5, 6]]


def test_a_sample_without_sound_beside_one_with_it():
    rows = [Sample([2, -200, 5], pictures(1)), Sample([2, -200, 5], None, torch.ones(1, 16, 100), 99)]
    made = batch.make_batch(rows, CONFIG)
    assert made.audio_sizes == (0, 99)
    assert [tuple(x.shape) for x in made.audios] == [(0, 16, 100), (1, 16, 100)]
    assert [tuple(x.shape) for x in made.images] == [(1, 3, 26, 26), (0, 3, 26, 26)]
    assert {x.dtype for x in made.images} == {torch.uint8}


def test_a_modality_of_no_sample_is_none():
    made = batch.make_batch([Sample([2, -200, 5], pictures(1))], CONFIG)
    assert (made.audios, made.audio_sizes) == (None, None)


def test_labels_are_padded_with_ignored():
    rows = [Sample([2, -200, 5], pictures(1), labels=[-100, -100, 5]), Sample([2, -200], pictures(1), labels=[2, 3])]
    assert batch.make_batch(rows, CONFIG).labels_BT.tolist() == [[-100, -100, 5], [2, 3, -100]]


def test_moving_casts_floats_alone():
    sample = Sample([2, -200, 5], pictures(1), torch.ones(1, 16, 100), 99, labels=[1, 2, 3])
    moved = batch.make_batch([sample], CONFIG).to("cpu", torch.bfloat16)
    assert moved.audios[0].dtype == torch.bfloat16
    assert moved.images[0].dtype == torch.uint8
    assert moved.input_ids_BT.dtype == moved.labels_BT.dtype == torch.int64
    assert moved.keep_BT.dtype == torch.bool
    floats = batch.make_batch([dataclasses.replace(sample, images=pictures(1, torch.float32))], CONFIG)
    assert floats.to(dtype=torch.float64).images[0].dtype == torch.float64


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample([2, 5], pictures(1)), "holds 0 placeholders"),
        (Sample([2, -200, -200, 5], pictures(1)), "holds 2 placeholders"),
        (Sample([2, -200, -200, 5]), "holds 2 placeholders"),
        (Sample([-200], pictures(1)), "no text"),
        (Sample([]), "no text"),
        (Sample([2, 512, -1]), r"\[512, -1\]; the vocabulary is 0 to 511"),
        (Sample([2, 5], labels=[2]), "1 labels for 2 ids"),
        (Sample([2, -200, 5], torch.ones(1, 3, 27, 27)), r"\(1, 3, 27, 27\)"),
        (Sample([2, -200, 5], torch.ones(1, 26, 26, 3)), r"\(1, 26, 26, 3\)"),
        (Sample([2, -200, 5], pictures(1, torch.int64)), "int64"),
        (Sample([2, -200, 5], None, torch.ones(1, 16, 99), 9), r"\(1, 16, 99\)"),
        (Sample([2, -200, 5], None, torch.ones(1, 16, 100)), "go together"),
        (Sample([2, -200, 5], None, None, 7), "go together"),
        (Sample([2, -200, 5], None, torch.ones(1, 16, 100), 101), "audio_sizes.0. is 101.*0 to 100"),
        (Sample([2, -200, 5], None, torch.ones(1, 16, 100), -1), "is -1"),
        (Sample([2, -200, 5], None, torch.ones(1, 16, 100, dtype=torch.uint8), 9), "uint8"),
    ],
)
def test_wrong_samples_are_refused_with_their_numbers(sample, message):
    with pytest.raises(ValueError, match=message):
        batch.make_batch([sample], CONFIG)


def test_no_sample_and_labels_of_some():
    with pytest.raises(ValueError, match="at least one"):
        batch.make_batch([], CONFIG)
    with pytest.raises(ValueError, match="labels for 1 of 2"):
        batch.make_batch([Sample([2, 5], labels=[1, 2]), Sample([2, 5])], CONFIG)


IDS = torch.tensor([[2, -200, 5]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_ids_BT": IDS[0]}, "input_ids_BT"),
        ({"input_ids_BT": IDS.int()}, "int32"),
        ({"input_ids_BT": IDS, "keep_BT": torch.ones(1, 3)}, "keep_BT is torch.float32"),
        ({"input_ids_BT": IDS, "keep_BT": torch.ones(1, 2, dtype=torch.bool)}, r"shape \(1, 2\)"),
        ({"input_ids_BT": IDS, "labels_BT": torch.ones(1, 4, dtype=torch.int64)}, "labels_BT"),
        ({"input_ids_BT": IDS, "images": (pictures(1), pictures(1))}, "2 images for 1 samples"),
        ({"input_ids_BT": IDS, "images": (torch.ones(1, 3, 26, 20),)}, "square"),
        ({"input_ids_BT": IDS.repeat(2, 1), "images": (pictures(1), pictures(1, torch.float32))}, "one dtype"),
        ({"input_ids_BT": IDS, "audios": (torch.ones(1, 16, 100),)}, "go together"),
        ({"input_ids_BT": IDS, "audios": (torch.ones(1, 16, 100),), "audio_sizes": (1, 2)}, "2 audio_sizes"),
    ],
)
def test_wrong_tensors_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Batch(**fields)


# ---- packing ------------------------------------------------------------------------------------------------------


def test_packing_as_drawn():
    ids = torch.tensor([[2, 7, -200, 9, 0, 0], [0, 2, -200, 5, 4, 6]])
    keep = torch.tensor([[T, T, T, T, F, F], [F, T, T, T, F, T]])  # padded at the right; at the left, with a hole
    labels = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]])
    packed_ids, packed_keep, packed_labels = batch.pack_text(ids, keep, labels)
    assert packed_ids.tolist() == [[2, 7, 9], [2, 5, 6]]
    assert packed_keep.tolist() == [[T, T, T], [T, T, T]]
    assert packed_labels.tolist() == [[1, 2, 4], [2, 4, 6]]


def test_packing_pads_the_shorter_row():
    ids = torch.tensor([[2, -200, 9, 8], [2, -200, 5, 0]])
    keep = torch.tensor([[T, T, T, T], [T, T, T, F]])
    packed_ids, packed_keep, packed_labels = batch.pack_text(ids, keep, ids)
    assert packed_ids.tolist() == [[2, 9, 8], [2, 5, 0]]
    assert packed_keep.tolist() == [[T, T, T], [T, T, F]]
    assert packed_labels.tolist() == [[2, 9, 8], [2, 5, -100]]


def test_no_mask_keeps_all_but_the_placeholder():
    packed_ids, packed_keep, labels = batch.pack_text(torch.tensor([[0, -200, 0, 3]]))
    assert packed_ids.tolist() == [[0, 0, 3]]  # id 0 is a token unless a mask says otherwise
    assert packed_keep.tolist() == [[T, T, T]]
    assert labels is None


def test_nothing_kept():
    packed_ids, packed_keep, _ = batch.pack_text(torch.tensor([[-200]]))
    assert packed_ids.shape == packed_keep.shape == (1, 0)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.lists(st.tuples(st.sampled_from([-200, 0, 1, 7]), st.booleans()), min_size=5, max_size=5), min_size=1)
)
def test_packing_equals_a_loop(rows):
    ids = torch.tensor([[token for token, _ in row] for row in rows])
    keep = torch.tensor([[kept for _, kept in row] for row in rows])
    truth = [[token for token, kept in row if kept and token != -200] for row in rows]
    length = max(map(len, truth))
    packed_ids, packed_keep, _ = batch.pack_text(ids, keep)
    assert packed_ids.tolist() == [row + [0] * (length - len(row)) for row in truth]
    assert packed_keep.tolist() == [[T] * len(row) + [F] * (length - len(row)) for row in truth]


def test_rows_are_padded_with_zeros_and_keep_their_gradients():
    rows = [torch.ones(2, 3, requires_grad=True), torch.ones(0, 3), torch.full((3, 3), 2.0, dtype=torch.float32)]
    padded = batch.pad_rows(rows)
    assert padded[..., 0].tolist() == [[1, 1, 0], [0, 0, 0], [2, 2, 2]]
    assert batch.pad_rows(rows, 5)[..., 1].tolist() == [[1, 1, 0, 0, 0], [0] * 5, [2, 2, 2, 0, 0]]
    padded.sum().backward()
    assert rows[0].grad.tolist() == [[1, 1, 1], [1, 1, 1]]
    with pytest.raises(ValueError, match="3 do not fit into 2"):
        batch.pad_rows(rows, 2)


@pytest.mark.parametrize("lengths", [[2, 0, 4], torch.tensor([2, 0, 4])])
def test_keep_from_lengths(lengths):
    assert batch.keep_from_lengths(lengths, 4).tolist() == [[T, T, F, F], [F] * 4, [T] * 4]
