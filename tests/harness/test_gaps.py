"""Checks that mutation asked for: what the small cases cannot show because they never go there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from stageparity import store
from vidi import generate
from vidi.attention import dispatch, eager, sdpa, unpad
from vidi.attention.call import AttentionCall
from vidi.attention.unpad import Rows
from vidi.bridge import audio, fold, mask, position, visual
from vidi.cache import Cache
from vidi.config import VidiConfig
from vidi.inputs import batch as batches
from vidi.model import VidiModel, frame_chunks
from vidi.parity import feed
from vidi.parity.goldens import inputs_of

GOLDENS = Path(__file__).resolve().parents[2] / "goldens" / "small"


@pytest.fixture(scope="module")
def train() -> store.Case:
    return store.open_case(GOLDENS, "train")


@pytest.fixture(scope="module")
def decode() -> store.Case:
    return store.open_case(GOLDENS, "decode")


def test_noise_is_a_clamped_normal() -> None:
    """Both ends are cut, each draw is the generator's own, and the scale is 0.45 (spec §5)."""
    drawn = position.draw_noise("h", 4000, torch.Generator().manual_seed(3))
    normal = torch.randn(4000, generator=torch.Generator().manual_seed(3)) * 0.45
    assert torch.equal(drawn, normal.clamp(-0.45, 0.45))
    assert (drawn.min().item(), drawn.max().item()) == (pytest.approx(-0.45), pytest.approx(0.45))
    assert drawn.dtype == torch.float32


def test_training_draws_noise_of_its_own(train: store.Case) -> None:
    model = feed.load_model(train, torch.float64)
    asked = []
    model.position_noise = lambda axis, length: asked.append((axis, length)) or torch.zeros(length)
    batch = feed.batch_of(inputs_of(train))
    quiet = model(batch)
    assert not asked
    model.train()
    assert torch.equal(model(batch), quiet)
    assert asked == [("h", 6), ("w", 6), ("t_v.0", 2), ("t_a.0", 5)]


def test_loss_of_the_model_is_the_golden_one(train: store.Case) -> None:
    model = feed.load_model(train, torch.float64)
    noise = feed.noise_of(train.inputs)
    model.train()
    model.position_noise = lambda axis, length: noise[axis]
    batch = feed.batch_of(inputs_of(train))
    golden, losses = train.targets["loss.none"].array, train.targets["loss.per_token"].array
    np.testing.assert_allclose(model.loss(batch).detach().numpy(), golden, rtol=1e-12)
    kept = np.sort(losses[losses > 0])
    middle = float(kept[len(kept) // 2])
    np.testing.assert_allclose(model.loss(batch, threshold=middle).item(), kept[kept > middle].mean(), rtol=1e-12)
    np.testing.assert_allclose(model.loss(batch, threshold=1e9).item(), kept.mean(), rtol=1e-12)
    model.config = dataclasses.replace(model.config, loss_threshold=middle)
    np.testing.assert_allclose(model.loss(batch).item(), kept[kept > middle].mean(), rtol=1e-12)
    with pytest.raises(ValueError, match="holds no labels_BT"):
        model.loss(dataclasses.replace(batch, labels_BT=None))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 7, 100])
def test_frame_chunks_are_full_and_in_order(size: int) -> None:
    videos = [torch.arange(n * 3.0).view(n, 3) + 100 * b for b, n in enumerate((4, 0, 1, 7))]
    joined, chunks = torch.cat(videos), list(frame_chunks(videos, size))
    assert torch.equal(torch.cat(chunks), joined)
    assert [len(x) for x in chunks[:-1]] == [size] * (len(chunks) - 1)
    assert 0 < len(chunks[-1]) <= size


@pytest.mark.parametrize("size", [1, 2, 3, 4, 12])
def test_chunks_are_cut_at_group_ends(size: int) -> None:
    rows = torch.arange(12.0)
    pieces = list(visual.split_at(iter(rows.split(size)), [3, 5, 4]))
    assert torch.equal(torch.cat(pieces), rows)
    ends = {int(x[-1]) + 1 for x in pieces}
    assert {3, 8, 12} <= ends
    assert all(len(x) for x in pieces)


def test_too_few_and_too_many_frames(decode: store.Case) -> None:
    model = feed.load_model(decode, torch.float64)
    features = torch.zeros(3, 121, 8, dtype=torch.float64)
    signal = torch.ones(2, dtype=torch.bool)
    for counts, word in (([2, 2], "few"), ([1, 1], "many")):
        with pytest.raises(ValueError, match=f"too {word} frames; .* per video were announced"):
            model.fold_features(iter([features]), counts, signal)


def test_groups_of_videos(decode: store.Case) -> None:
    config = VidiConfig.from_official(decode.config)
    assert visual.groups([2, 1], config) == [visual.Group(range(2), 3, 12, "")]
    own = dataclasses.replace(config, budget_scope="video", visual_token_budget=50)
    assert visual.groups([2, 1], own) == [visual.Group(range(1), 2, 10, ".0"), visual.Group(range(1, 2), 1, 12, ".1")]


def test_grid_that_fits_is_the_same_tensor() -> None:
    grid = torch.randn(1, 2, 12, 12)
    assert fold.resize(grid, 12) is grid
    assert fold.resized_side(3, 12, 108) == 12
    assert fold.resized_side(4, 12, 108) == 10
    assert fold.resized_side(1, 8, 16) == 8  # a budget that is just met enlarges nothing
    assert fold.resized_side(10**6, 28, 60000) == 10
    assert fold.pad(torch.zeros(2, 16, 3)).shape == (2, 3, 4, 4)
    with pytest.raises(ValueError, match="15 patches are no square grid"):
        fold.pad(torch.zeros(1, 15, 3))


def test_signals_of_bytes() -> None:
    assert mask.has_signal(
        [torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.zeros(0, 3, 2, 2, dtype=torch.uint8)]
    ).tolist() == [
        True,
        False,
    ]
    assert mask.has_signal([torch.zeros(1, 4), torch.tensor([[0.0, -1.0]])]).tolist() == [False, True]


def test_audio_counts(decode: store.Case) -> None:
    config = VidiConfig.from_official(decode.config)
    assert [audio.num_positions(n, config) for n in (0, 1, 2, 27, 58, 80)] == [0, 0, 1, 13, 29, 40]
    assert [audio.num_tokens(n, config) for n in (0, 9, 10, 27, 58, 80)] == [0, 0, 1, 2, 5, 8]


def test_rows_know_themselves() -> None:
    kept = Rows.all_kept(2, 3)
    assert (kept.full, kept.prefix, kept.keep_BL.shape, kept.keep_BL.dtype) == (True, True, (2, 3), torch.bool)
    assert vars(kept).keys() >= {"full", "prefix"}  # known without asking the device
    holed = Rows(torch.tensor([[True, False, True], [False, False, False]]))
    assert (holed.full, holed.prefix, holed.max_seqlen) == (False, False, 2)
    assert holed.cu_seqlens.tolist() == [0, 2, 2]
    assert holed.cu_seqlens.dtype == holed.lengths_B.dtype == torch.int32
    assert Rows(torch.tensor([[True, True, False]])).prefix
    assert Rows(torch.zeros(0, 3, dtype=torch.bool)).max_seqlen == 0


def _qkv(queries: int, keys: int, heads: int = 2) -> tuple[torch.Tensor, ...]:
    made = torch.Generator().manual_seed(1)
    q = torch.randn(2, queries, heads, 4, generator=made, dtype=torch.float64)
    k, v = (torch.randn(2, keys, 2, 4, generator=made, dtype=torch.float64) for _ in "kv")
    return q, k, v


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("window", [None, 2])
def test_sdpa_is_eager(heads: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks, positions, windows and grouped heads, with keys that nothing sees and NaN behind the mask."""
    q, k, v = _qkv(5, 5, heads)
    keep = Rows(torch.tensor([[True, True, False, True, False], [False] * 5]))
    k[0, 2] = v[0, 2] = torch.nan
    options = {"scale": 0.3, "keep_q": Rows(torch.tensor([[True] * 5, [True] * 3 + [False] * 2])), "keep_k": keep}
    if window is not None:
        options |= {"q_pos_BT": torch.arange(5).expand(2, 5), "window": window}
    theirs = sdpa.attend(AttentionCall(q, k, v, **options))
    for chunk in (8192, 5, 2, 1):
        monkeypatch.setattr(eager, "KEY_CHUNK", chunk)
        torch.testing.assert_close(eager.attend(AttentionCall(q, k, v, **options)), theirs, rtol=1e-12, atol=1e-12)
    assert (theirs[1] == 0).all()
    assert theirs.isfinite().all()


def test_dispatch_refuses() -> None:
    q, k, v = _qkv(2, 3)
    with pytest.raises(ValueError, match="a window needs query positions"):
        dispatch.attend(AttentionCall(q, k, v, scale=1.0, window=2))
    with pytest.raises(ValueError, match="still counts the image placeholder"):
        dispatch.attend(AttentionCall(q, k, v, scale=1.0, keep_q=Rows.all_kept(2, 3)))
    with pytest.raises(ValueError, match="unknown attention backend 'best'"):
        dispatch.attend(AttentionCall(q, k, v, scale=1.0), "best")
    with pytest.raises(ValueError, match="backend 'sdpa' cannot cap"):
        dispatch.attend(AttentionCall(q, k, v, scale=1.0, softcap=5.0), "sdpa")
    one = dispatch.attend(AttentionCall(q[:, :1], k, v, scale=1.0, keep_q=Rows(torch.zeros(2, 7, dtype=torch.bool))))
    assert one.abs().min() > 0  # a single query row consults no mask


def test_greedy_limits_and_progress(decode: store.Case) -> None:
    model = feed.load_model(decode, torch.float64)
    batch = feed.batch_of(inputs_of(decode))
    calls: list[tuple[int, int]] = []
    found = generate.greedy(model, batch, max_new_tokens=2, progress=lambda done, limit: calls.append((done, limit)))
    assert calls == [(1, 2), (2, 2)]
    assert [len(row) for row in found.tokens] == [2, 2]
    assert found.stopped == [False, False]
    assert [len(row) for row in generate.greedy(model, batch, max_new_tokens=1).tokens] == [1, 1]
    with pytest.raises(ValueError, match="max_new_tokens is 0; at least 1"):
        generate.greedy(model, batch, max_new_tokens=0)
    steps = []
    step, model.step = model.step, lambda ids, cache: steps.append(ids) or step(ids, cache)
    generate.greedy(model, batch, max_new_tokens=40, progress=None)
    longest = max(len(row) + ended for row, ended in zip(*_free(model, batch), strict=True))
    assert len(steps) // 2 == longest - 1  # decoding ends once every row has stopped


def _free(model: VidiModel, batch: batches.Batch) -> tuple[list[list[int]], list[bool]]:
    found = generate.greedy(model, batch, max_new_tokens=40)
    return found.tokens, found.stopped


def test_prefill_room(decode: store.Case) -> None:
    """The cache holds at least the prompt, and what was asked for."""
    model = feed.load_model(decode, torch.float64)
    batch = feed.batch_of(inputs_of(decode))
    assert model.prefill(batch, 1)[1].capacity == 6
    cache = model.prefill(batch, 30)[1]
    assert (cache.capacity, len(cache.text), len(cache.cross)) == (30, 3, 3)
    assert cache.lengths_B.tolist() == [6, 3]
    assert cache.lengths_B.dtype == torch.int64  # positions index keys, which older torch takes as int64 alone
    empty = Cache.empty(model.config.decoder, cache.lengths_B, 5, torch.float16, torch.device("cpu"))
    assert (empty.text[0].k_BSGH.shape, empty.text[0].k_BSGH.dtype) == ((2, 5, 2, 4), torch.float16)


def test_pad_rows_to_a_length() -> None:
    rows = [torch.ones(2, 3), torch.ones(1, 3)]
    assert batches.pad_rows(rows, 4).shape == (2, 4, 3)
    assert batches.pad_rows(rows, 4).sum() == 9
    assert torch.equal(batches.pad_rows(rows, 2), batches.pad_rows(rows))
    with pytest.raises(ValueError, match="rows of 2 do not fit into 1"):
        batches.pad_rows(rows, 1)


def test_pad_rows_looks_at_the_rows_length() -> None:
    with pytest.raises(ValueError, match="rows of 3 do not fit into 2"):
        batches.pad_rows([torch.ones(3, 1)], 2)
    long = batches.pad_rows([torch.ones(2, 1, 5)] * 4, 3)
    assert long.shape == (4, 3, 1, 5)


def test_batch_without_media_moves() -> None:
    ids = torch.tensor([[2, 5, 7]])
    moved = batches.Batch(ids).to("cpu", torch.float16)
    assert (moved.images, moved.audios, moved.keep_BT, moved.labels_BT) == (None, None, None, None)
    assert torch.equal(moved.input_ids_BT, ids)


def test_streams_are_updated_in_bounded_chunks(decode: store.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """No call sees more tokens than the chunk allows, all samples counted; one call where they fit."""
    from vidi.decoder import decoder

    layer = feed.load_model(decode, torch.float64).decoder.layers[0]
    stream = torch.randn(2, 9, 24, dtype=torch.float64)
    values = layer.stream_keys_values(stream)[1]
    whole, seen = layer.update_stream(stream, values), []
    own = layer.update_stream
    monkeypatch.setattr(
        layer, "update_stream", lambda s, v: seen.append(s.shape[0] * s.shape[1]) or own(s, v), raising=False
    )
    for chunk, calls in ((18, [18]), (17, [17, 1]), (5, [5, 5, 5, 3])):
        monkeypatch.setattr(decoder, "STREAM_CHUNK", chunk)
        seen.clear()
        torch.testing.assert_close(decoder.update_in_chunks(layer, stream, values), whole, rtol=1e-12, atol=1e-12)
        assert seen == calls


def test_unpadding_names_the_placeholder() -> None:
    """Without a cache, a text mask one too long still counts the placeholder; it does not cover cached keys."""
    q, k, v = _qkv(3, 4)
    with pytest.raises(ValueError, match="still counts the image placeholder"):
        unpad._unpad_xattn_input(q, k, v, Rows.all_kept(2, 4), Rows.all_kept(2, 4))
    with pytest.raises(ValueError, match="covers the 1 cached keys too"):
        unpad._unpad_xattn_input(q, k, v, Rows.all_kept(2, 4), Rows.all_kept(2, 4), cached_keys=1)
    with pytest.raises(ValueError, match=r"the key mask is \(2, 5\), the keys are \(2, 4\)"):
        unpad._unpad_xattn_input(q, k, v, None, Rows.all_kept(2, 5))


def test_nothing_stays_on_the_host(train: store.Case) -> None:
    """Inputs follow the model's device, and what attention makes follows its tensors (a device without memory will do)."""
    meta = torch.device("meta")
    model, batch = feed.load_model(train, torch.float32).to(meta), feed.batch_of(inputs_of(train))
    embeds, rows, labels = model.embed_text(batch)
    assert labels is not None
    assert {embeds.device, rows.keep_BL.device, labels.device} == {meta}
    moved = batch.to(meta, torch.float16)
    assert moved.images is not None
    assert moved.audios is not None
    tensors = [moved.input_ids_BT, moved.keep_BT, moved.labels_BT, *moved.images, *moved.audios]
    assert {x.device for x in tensors if x is not None} == {meta}
    assert {x.dtype for x in (*moved.images, *moved.audios)} == {torch.float16}
    q, k, v = (x.to(meta) for x in _qkv(5, 5))
    for kernel in (eager, sdpa):
        out = kernel.attend(
            AttentionCall(q, k, v, scale=1.0, q_pos_BT=torch.arange(5, device=meta).expand(2, 5), window=1)
        )
        assert (out.device, out.shape) == (meta, q.shape)
    kept = batches.keep_from_lengths([1, 2], 3, device=meta)
    assert (kept.device, kept.shape) == (meta, (2, 3))
    all_kept = Rows.all_kept(2, 3, meta)
    assert all_kept.keep_BL.device == meta
    assert all_kept.full
    assert all_kept.prefix


def test_backends_are_asked_what_they_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dispatch and sdpa itself hand dtype, device, head width and softcap to the table of limits."""
    asked: list[tuple[str, dict]] = []
    monkeypatch.setattr(dispatch.limits, "check", lambda backend, **given: asked.append((backend, given)))
    q, k, v = _qkv(3, 5)
    wanted = {"dtype": torch.float64, "device": torch.device("cpu"), "head_dim": 4, "softcap": 7.0}
    dispatch.attend(AttentionCall(q, k, v, scale=1.0, softcap=7.0), "sdpa")
    assert asked == [("sdpa", wanted), ("sdpa", wanted)]


def test_sdpa_trusts_no_kernel_with_rows_that_see_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    own = sdpa.nnf.scaled_dot_product_attention

    def kernel(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, attn_mask: torch.Tensor, **options: object
    ) -> torch.Tensor:
        out = own(q, k, v, attn_mask=attn_mask, **options)
        return out.masked_fill(~attn_mask.any(-1, keepdim=True), torch.nan)

    monkeypatch.setattr(sdpa.nnf, "scaled_dot_product_attention", kernel)
    q, k, v = _qkv(3, 5)
    out = sdpa.attend(AttentionCall(q, k, v, scale=1.0, keep_k=Rows(torch.tensor([[True] * 5, [False] * 5]))))
    assert out[0].abs().min() > 0
    assert (out[1] == 0).all()


def test_towers_take_the_backend_they_are_given(decode: store.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = feed.load_model(decode, torch.float64), []
    own = dispatch.attend
    monkeypatch.setattr(dispatch, "attend", lambda call, backend: asked.append(backend) or own(call, backend))
    images, audios = torch.zeros(1, 3, 22, 22, dtype=torch.float64), torch.zeros(1, 4, 40, dtype=torch.float64)
    for backend in ("sdpa", "eager"):
        model.vision_tower(images, backend)
        model.audio_tower(audios, backend)
    assert asked == ["sdpa"] * 4 + ["eager"] * 4


def test_a_new_model_starts_as_configured(decode: store.Case) -> None:
    config = VidiConfig.from_official(decode.config)
    bridge = VidiModel(config).bridge
    assert torch.equal(bridge.llm_norm.weight, torch.full((24,), config.norm_std))
    assert torch.equal(bridge.image_norm.weight, torch.ones(24))


def test_long_rows_keep_their_order() -> None:
    """Packing is stable: thousands of kept tokens stay in the order that they came in."""
    ids = torch.arange(20000)[None] + 3
    keep = (torch.arange(20000) % 3 != 0)[None]
    packed, kept, _ = batches.pack_text(ids, keep)
    assert torch.equal(packed[0], ids[0][keep[0]])
    assert kept.all()


def test_placeholder_is_the_configured_one(decode: store.Case) -> None:
    model = feed.load_model(decode, torch.float64)
    model.config = dataclasses.replace(model.config, image_placeholder=-7)
    embeds, rows, _ = model.embed_text(batches.Batch(torch.tensor([[2, -7, 5, 9]])))
    assert rows.keep_BL.tolist() == [[True] * 3]
    assert torch.equal(embeds[0], model.decoder.embed.weight[[2, 5, 9]])
