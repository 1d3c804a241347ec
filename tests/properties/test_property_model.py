"""For both models, what a result must not depend on: neighbours in the batch, padding, chunks, a cache (spec §10)."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from tests import tiny
from vidi import generate
from vidi.attention import eager
from vidi.decoder import decoder
from vidi.inputs.batch import Batch

samples = st.builds(
    tiny.sample,
    text=st.integers(2, 13),
    frames=st.integers(0, 3),
    audio=st.sampled_from([0, 7, 10, 23, 60, 110]),
    seed=st.integers(0, 50),
)


both = pytest.mark.parametrize("name", ["9b", "7b"])


def logits_of(name: str, batch: Batch) -> list[torch.Tensor]:
    """The kept rows of each sample's logits."""
    out_BTV = tiny.model(name)(batch)
    keep_BT = batch.keep_BT & (batch.input_ids_BT != -200)
    return [row[: int(keep.sum())] for row, keep in zip(out_BTV, keep_BT, strict=True)]


def widened(batch: Batch, extra: int) -> Batch:
    """The batch with more padding at the right of its text, ids of it arbitrary."""
    ids = torch.full((len(batch), extra), 77)
    return dataclasses.replace(
        batch,
        input_ids_BT=torch.cat([batch.input_ids_BT, ids], dim=1),
        keep_BT=torch.cat([batch.keep_BT, torch.zeros_like(ids, dtype=torch.bool)], dim=1),
    )


@both
@settings(max_examples=15)
@given(st.lists(samples, min_size=2, max_size=3))
def test_a_sample_does_not_depend_on_its_neighbours(name, batch):
    together = logits_of(name, tiny.make(batch))
    for sample, found in zip(batch, together, strict=True):
        (alone,) = logits_of(name, tiny.make([sample]))
        tiny.assert_close(found, alone)


@both
@settings(max_examples=15)
@given(samples, st.integers(1, 6))
def test_padding_of_the_text_does_not_matter(name, sample, extra):
    batch = tiny.make([sample])
    tiny.assert_close(logits_of(name, widened(batch, extra))[0], logits_of(name, batch)[0])


@both
@settings(max_examples=15)
@given(st.lists(samples, min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 400), st.integers(1, 600))
def test_chunks_are_a_matter_of_memory_alone(name, batch, frame_chunk, key_chunk, stream_chunk):
    """Frames in chunks over tower and bridge, keys in chunks in attention, tokens in chunks in the stream update."""
    inputs, model = tiny.make(batch), tiny.model(name)
    whole = logits_of(name, inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "frame_chunk", frame_chunk)
        patch.setattr(eager, "KEY_CHUNK", key_chunk)
        patch.setattr(decoder, "STREAM_CHUNK", stream_chunk)
        chunked = logits_of(name, inputs)
    for found, wanted in zip(chunked, whole, strict=True):
        tiny.assert_close(found, wanted)


@both
@settings(max_examples=15)
@given(st.lists(samples, min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))
def test_cached_decoding_equals_whole_passes_at_every_step(name, batch, steps, window, seed):
    """Random lengths, windows and paddings; also past the window and at the last step."""
    inputs, model = tiny.make(batch), tiny.model(name, window=window)
    tokens = torch.randint(3, 500, (len(batch), steps), generator=torch.Generator().manual_seed(seed))
    cached = generate.forced_logits(model, inputs, tokens)
    tiny.assert_close(cached, tiny.whole_pass_logits(model, inputs, tokens))


@both
@settings(max_examples=10)
@given(st.lists(samples, min_size=2, max_size=3), st.integers(1, 6))
def test_rows_of_a_batch_decode_as_each_row_alone(name, batch, steps):
    together = generate.greedy(tiny.model(name), tiny.make(batch), max_new_tokens=steps)
    alone = [generate.greedy(tiny.model(name), tiny.make([s]), max_new_tokens=steps) for s in batch]
    assert together.tokens == [a.tokens[0] for a in alone]
    assert together.stopped == [a.stopped[0] for a in alone]


@both
@settings(max_examples=15)
@given(samples, st.integers(0, 3))
def test_nan_behind_a_mask_never_reaches_a_kept_row(name, sample, where):
    """A second sample that is longer in everything leaves padding in the first one's streams; NaN put there, after
    the masks are built, must not be seen."""
    model = tiny.model(name)
    inputs = tiny.make([sample, tiny.sample(14, 4, 160, seed=7)])
    streams = model.streams(inputs)
    clean = model.decode_text(inputs, streams)
    keep_BT = inputs.keep_BT & (inputs.input_ids_BT != -200)
    kept = int(keep_BT[0].sum())
    for stream in streams.values():
        stream.x_BLD.masked_fill_(~stream.keep_BL[..., None], torch.nan)
    dirty = model.decode_text(inputs, streams)
    assert torch.equal(dirty[0, :kept], clean[0, :kept])
    assert clean[0, :kept].isfinite().all()
