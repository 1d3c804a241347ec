"""Greedy decoding and the caches (spec §2, §7, §10)."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch

from tests import tiny
from vidi import generate
from vidi.cache import Cache, LayerTextCache
from vidi.fast import accelerate

WINDOW = tiny.model().config.decoder.sliding_window


@pytest.mark.parametrize("text", [1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3])
def test_cached_equals_whole_passes_across_the_window(text):
    """Prompts below, at and beyond the window; ten steps more, the last included."""
    model, batch = tiny.model(), tiny.make([tiny.sample(text)])
    tokens = torch.randint(3, 500, (1, 10), generator=torch.Generator().manual_seed(text))
    tiny.assert_close(generate.forced_logits(model, batch, tokens), tiny.whole_pass_logits(model, batch, tokens))


def test_the_window_bites_here():
    tokens = torch.randint(3, 500, (1, 10), generator=torch.Generator().manual_seed(0))
    batch = tiny.make([tiny.sample(WINDOW + 1)])
    narrow, wide = (generate.forced_logits(tiny.model(window=w), batch, tokens) for w in (WINDOW, WINDOW + 1))
    assert (narrow - wide).abs().max() > 1e-3


def test_every_row_starts_from_its_own_last_kept_token():
    samples = [tiny.sample(12, 2, 60), tiny.sample(3, 1, 0, seed=1), tiny.sample(7, 0, 30, seed=2)]
    model = tiny.model()
    together, _ = model.prefill(tiny.make(samples), 20)
    for b, sample in enumerate(samples):
        alone, _ = model.prefill(tiny.make([sample]), 20)
        tiny.assert_close(together[b], alone[0])


def test_a_padded_batch_decodes_as_each_row_alone():
    samples = [tiny.sample(12, 2, 60), tiny.sample(3, 1, 0, seed=1), tiny.sample(9, 3, 110, seed=2)]
    model = tiny.model()
    tokens = torch.randint(3, 500, (3, 12), generator=torch.Generator().manual_seed(0))
    together = generate.forced_logits(model, tiny.make(samples), tokens)
    for b, sample in enumerate(samples):
        tiny.assert_close(together[b], generate.forced_logits(model, tiny.make([sample]), tokens[b : b + 1])[0])


def told(script: list[list[int]], monkeypatch: pytest.MonkeyPatch):
    """A model whose rows say what they are told to."""
    model = copy.copy(tiny.model())
    steps = itertools.count(1)

    def logits(step: int) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor([row[step] for row in script]), 512).double()

    def step(ids, cache):
        return logits(next(steps))

    monkeypatch.setattr(
        model, "prefill", lambda batch, capacity, streams=None, reuse=None: (logits(0), None), raising=False
    )
    monkeypatch.setattr(model, "step", step, raising=False)
    return model


def test_rows_stop_on_their_own_and_the_run_with_the_last(monkeypatch):
    batch = tiny.make([tiny.sample(4, 1, 0), tiny.sample(6, 1, 0)])
    seen = []
    model = told([[5, 107, 9, 9, 9], [6, 7, 8, 107, 9]], monkeypatch)
    found = generate.greedy(model, batch, max_new_tokens=20, progress=lambda done, limit: seen.append((done, limit)))
    assert found.tokens == [[5], [6, 7, 8]]
    assert found.stopped == [True, True]
    assert seen == [(1, 20), (2, 20), (3, 20), (4, 20)]


def test_the_limit_counts_new_tokens(monkeypatch):
    batch = tiny.make([tiny.sample(4, 1, 0), tiny.sample(6, 1, 0)])
    found = generate.greedy(told([[5, 107, 9], [6, 7, 8]], monkeypatch), batch, max_new_tokens=3)
    assert found.tokens == [[5], [6, 7, 8]]
    assert found.stopped == [True, False]


@pytest.mark.parametrize(("limit", "length"), [({}, 1024), ({"max_new_tokens": 3000}, 3000)])
def test_no_answer_is_cut_below_the_limit(limit, length, monkeypatch):
    found = generate.greedy(told([[5] * 3000], monkeypatch), tiny.make([tiny.sample(4, 1, 0)]), **limit)
    assert found == generate.Generated([[5] * length], [False])


@pytest.mark.parametrize("path", [lambda model: model, accelerate], ids=["plain", "fast"])
def test_a_cache_holds_as_many_tokens_as_asked_for(path):
    _, cache = path(tiny.model()).prefill(tiny.make([tiny.sample(4, 1, 0)]), 9000)
    assert cache.capacity == 9000


def test_a_stop_token_at_once_is_an_empty_answer(monkeypatch):
    found = generate.greedy(told([[107, 9]], monkeypatch), tiny.make([tiny.sample(4, 1, 0)]), max_new_tokens=5)
    assert found == generate.Generated([[]], [True])


def test_the_stop_token_is_the_configurations(monkeypatch):
    model = told([[5, 107, 9, 9]], monkeypatch)
    model.config = dataclasses.replace(model.config, end_of_turn_id=9)
    found = generate.greedy(model, tiny.make([tiny.sample(4, 1, 0)]), max_new_tokens=5)
    assert found.tokens == [[5, 107]]


def test_a_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="max_new_tokens is 0; at least 1"):
        generate.greedy(tiny.model(), tiny.make([tiny.sample()]), max_new_tokens=0)


def test_greedy_takes_the_largest_logit_at_each_step():
    model, batch = tiny.model(), tiny.make([tiny.sample(9, 2, 60), tiny.sample(4, 1, 0)])
    tokens = torch.tensor(generate.greedy(model, batch, max_new_tokens=6).tokens)
    assert torch.equal(generate.forced_logits(model, batch, tokens).argmax(-1), tokens)


# ---- cache ----------------------------------------------------------------------------------------------------------


def test_keys_are_written_at_their_positions_of_each_row():
    held = LayerTextCache(torch.zeros(2, 5, 1, 1), torch.zeros(2, 5, 1, 1))
    held.extend(torch.ones(2, 2, 1, 1), torch.ones(2, 2, 1, 1), torch.tensor([[0, 1], [0, 1]]))
    k, v = held.extend(torch.full((2, 1, 1, 1), 7.0), torch.full((2, 1, 1, 1), 8.0), torch.tensor([[2], [1]]))
    assert k.flatten(1).tolist() == [[1, 1, 7, 0, 0], [1, 7, 0, 0, 0]]
    assert v.flatten(1).tolist() == [[1, 1, 8, 0, 0], [1, 8, 0, 0, 0]]


def test_heads_are_kept_un_repeated():
    config = tiny.model().config.decoder
    cache = Cache.empty(config, torch.tensor([3, 2]), 11, torch.float64, torch.device("cpu"))
    assert cache.capacity == 11
    assert len(cache.text) == config.num_layers
    assert {t.k_BSGH.shape for t in cache.text} == {(2, 11, config.num_kv_heads, config.head_dim)}
    _, filled = tiny.model().prefill(tiny.make([tiny.sample(5, 2, 60)]), 9)
    assert len(filled.cross) == config.num_layers
    assert filled.cross[0]["v"].k_BLGH.shape == (1, 98, config.num_kv_heads, config.head_dim)
    assert filled.cross[0]["a"].v_BLGH.shape == (1, 6, config.num_kv_heads, config.head_dim)


def test_streams_are_written_once_and_lengths_grow_by_one():
    model = tiny.model()
    logits, cache = model.prefill(tiny.make([tiny.sample(5, 2, 60), tiny.sample(3, 1, 0)]), 9)
    before = [cache.cross[i]["v"].k_BLGH.clone() for i in range(4)]
    assert cache.lengths_B.tolist() == [5, 3]
    model.step(logits.argmax(-1), cache)
    assert cache.lengths_B.tolist() == [6, 4]
    assert all(torch.equal(before[i], cache.cross[i]["v"].k_BLGH) for i in range(4))


def test_what_a_shorter_rows_padding_left_in_the_cache_never_matters():
    model = tiny.model()
    logits, cache = model.prefill(tiny.make([tiny.sample(9, 1, 0), tiny.sample(3, 1, 0)]), 12)
    clean = copy.deepcopy(cache)
    for held in cache.text:
        held.k_BSGH[1, 4:] = 99.0
        held.v_BSGH[1, 4:] = 99.0
    ids = logits.argmax(-1)
    assert torch.equal(model.step(ids, cache), model.step(ids, clean))


@pytest.mark.parametrize("path", ["plain", "fast"])
def test_a_second_question_over_kept_keys_is_a_question_alone(path):
    """Logits along given tokens, step by step; the first question's cache stays what it was."""
    samples = [tiny.sample(12, 2, 60), tiny.sample(5, 2, 60, seed=7)]
    # Another text about the first one's video.
    first, second = (tiny.make([dataclasses.replace(samples[0], ids=sample.ids)]) for sample in samples)
    model = tiny.model()
    runner = model if path == "plain" else accelerate(copy.deepcopy(model))
    tokens = torch.randint(3, 500, (1, 6), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        _, held = runner.prefill(first, 30)
        for batch in (second, first):
            logits, cache = runner.prefill(
                dataclasses.replace(batch, images=None, audios=None, audio_sizes=None), 30, reuse=held
            )
            alone, alone_cache = runner.prefill(batch, 30)
            assert torch.equal(logits, alone)
            for step in range(tokens.shape[1]):
                assert torch.equal(runner.step(tokens[:, step], cache), runner.step(tokens[:, step], alone_cache))


@pytest.mark.parametrize("path", ["plain", "fast"])
def test_frames_in_pieces_are_the_whole_video(path):
    model = tiny.model()
    runner = model if path == "plain" else accelerate(copy.deepcopy(model), frame_batch=4)
    images = torch.randint(0, 256, (11, 3, 26, 26), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = runner.streams(tiny.make([dataclasses.replace(tiny.sample(5, 1, 60), images=images)]))["v"]
        pieces = runner.encode_frames(iter(images.split([1, 2, 5, 3])), 11)
        assert torch.equal(pieces.x_BLD, whole.x_BLD)
        assert torch.equal(pieces.keep_BL, whole.keep_BL)
        for wrong in (10, 12):
            with pytest.raises(ValueError, match="announced"):
                runner.encode_frames(iter(images.split(1)), wrong)
