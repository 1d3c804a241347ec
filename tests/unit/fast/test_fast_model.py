"""The fast path against the plain one, on the tiny models: every stage, every token, ragged batches, chunks of any size."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from vidi import generate, sizes_7b
from vidi.checkpoint import synthetic
from vidi.config import VidiConfig
from vidi.fast import accelerate, refusal, twins, weights
from vidi.fast import bridge as bridges
from vidi.fast.operands import LayerNorm, Residual
from vidi.inputs.batch import Batch
from vidi.model import VidiModel

CONFIGS = {"9b": VidiConfig.tiny(), "7b": sizes_7b.config("tiny")}
both = pytest.mark.parametrize("name", CONFIGS)


def ragged(samples: int, *, floats: bool = False) -> Batch:
    """One to three samples; the third has no frames, the second a shorter text, all other lengths. Fits both models."""
    random = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(3, 500, (samples, 12), generator=random)
    ids_BT[:, 4] = CONFIGS["9b"].image_placeholder
    keep_BT = torch.ones(samples, 12, dtype=torch.bool)
    keep_BT[1:2, 9:] = False
    images = [torch.randint(0, 256, (n, 3, 26, 26), dtype=torch.uint8, generator=random) for n in (5, 3, 0)]
    if floats:
        images = [x / 127.5 - 1 for x in images]
        images[1].zero_()  # silent: keeps no token
    audios = [torch.randn(n, 16, 100, generator=random) for n in (2, 1, 1)]
    return Batch(ids_BT, keep_BT, tuple(images[:samples]), tuple(audios[:samples]), (150, 80, 60)[:samples])


def model(name: str = "9b", dtype: torch.dtype = torch.float64) -> VidiModel:
    return synthetic.create(CONFIGS[name], 0, dtype=dtype)


def stages(runner, batch: Batch) -> dict[str, torch.Tensor]:
    found: dict[str, list[torch.Tensor]] = {}

    def tap(stage: str, x: torch.Tensor) -> torch.Tensor:
        found.setdefault(stage, []).append(x.clone())
        return x

    with torch.no_grad():
        runner(batch, last_stream=True, tap=tap)
    return {stage: torch.cat(parts) for stage, parts in found.items()}


@both
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("floats", [False, True])
def test_every_stage_is_the_plain_one_in_float64(name, samples, floats):
    # Red for any wrong operator, order, chunk border, span or fold: nothing but summation order may differ.
    plain = model(name)
    batch = ragged(samples, floats=floats)
    expected = stages(plain, batch)
    found = stages(accelerate(plain, stream_chunk=256, frame_batch=2, piece_batch=1), batch)
    assert set(found) == set(expected)
    kept = expected["text.mask"]
    for stage, value in expected.items():
        assert found[stage].shape == value.shape, stage
        if not value.is_floating_point():
            assert torch.equal(found[stage], value), stage
            continue
        mine = found[stage]
        if value.shape[:2] == kept.shape:  # what a text row that is not kept holds has no meaning
            value, mine = value[kept], mine[kept]
        assert (mine - value).abs().max() <= 1e-12 * value.square().mean().sqrt() + 1e-13, stage


def test_it_is_always_in_inference():
    fast = accelerate(model())
    assert fast.eval() is fast
    with pytest.raises(ValueError, match="for inference"):
        fast.train()


def test_the_heads_dtype_is_asked_of_one_number(monkeypatch):
    """Not of the whole head: logits of every id would be thrown away."""
    decoder, seen = model().decoder, []
    finished = decoder.finished
    monkeypatch.setattr(decoder, "finished", lambda x: seen.append(tuple(x.shape)) or finished(x))
    weights.head(decoder)
    assert seen == [(1, 1)]


def test_parts_of_the_bridge_are_the_fused_ones():
    fast = bridges.accelerated(model().bridge)
    kinds = {name: type(module) for name, module in fast.named_children()}
    assert kinds["audio_pool"] is bridges.FastPool
    assert kinds["image_projector"] is kinds["audio_projector"] is bridges.FastProjector
    assert kinds["image_norm"] is kinds["audio_norm"] is kinds["llm_norm"] is bridges.FastNorm


def test_a_layer_norm_runs_over_the_last_axis():
    x_RC, pending_C = torch.randn(3, 5, 8), torch.randn(8)
    norm = LayerNorm(torch.randn(8), torch.randn(8), 1e-6)
    out_RC = torch.empty_like(x_RC)
    twins.layer_norm(x_RC, pending_C, norm, out_RC)
    torch.testing.assert_close(out_RC, torch.layer_norm(x_RC + pending_C, (8,), norm.weight_C, norm.bias_C, norm.eps))


def test_biases_of_the_towers_wait_in_float32(monkeypatch):
    """They are summed over all layers before a norm adds them: in bfloat16 each sum would be rounded, and small biases lost."""
    seen = []
    layer_norm = twins.layer_norm

    def watched(x_RC, pending_C, norm, out_RC):
        seen.append(pending_C.dtype)
        layer_norm(x_RC, pending_C, norm, out_RC)

    monkeypatch.setattr(twins, "layer_norm", watched)
    with torch.no_grad():
        accelerate(model(dtype=torch.bfloat16)).streams(ragged(1).to(dtype=torch.bfloat16))
    assert len(seen) > 8
    assert set(seen) == {torch.float32}


@both
def test_padded_rows_are_exact_zeros(name):
    found = stages(accelerate(model(name)), ragged(3))
    dropped = ~found["text.mask"]
    for i in range(CONFIGS[name].decoder.num_layers):
        assert not found[f"layer.{i}.output"][dropped].any()
        assert not found[f"layer.{i}.image_stream"][~found["vision.mask"]].any()
        assert not found[f"layer.{i}.audio_stream"][~found["audio.mask"]].any()


@both
@pytest.mark.parametrize("chunk", [256, 512, 32768])
def test_the_chunk_is_only_a_memory_knob(name, chunk):
    plain, batch = model(name), ragged(1)
    many = Batch(batch.input_ids_BT, None, (batch.images[0].repeat(3, 1, 1, 1),), batch.audios, batch.audio_sizes)
    expected = plain(many)
    torch.testing.assert_close(accelerate(plain, stream_chunk=chunk)(many), expected, rtol=0, atol=1e-12)


@both
@pytest.mark.parametrize("samples", [1, 3])
def test_tokens_are_those_of_the_plain_path(name, samples):
    # The window (8) is shorter than prompt and answer: positions, window and cache must agree at every step.
    plain, batch = model(name), ragged(samples)
    expected = generate.greedy(plain, batch, max_new_tokens=20)
    assert generate.greedy(accelerate(plain), batch, max_new_tokens=20) == expected


@both
@pytest.mark.parametrize("samples", [1, 3])
def test_cached_logits_are_those_of_whole_passes(name, samples):
    fast, batch = accelerate(model(name)), ragged(samples)
    tokens = torch.randint(3, 500, (samples, 15), generator=torch.Generator().manual_seed(2))
    cached = generate.forced_logits(fast, batch, tokens)
    for step in (0, 1, 7, 14):
        for b in range(samples):
            row = batch.input_ids_BT[b][batch.keep_BT[b]]
            longer = Batch(
                torch.cat([row, tokens[b, :step]])[None],
                None,
                batch.images[b : b + 1],
                batch.audios[b : b + 1],
                batch.audio_sizes[b : b + 1],
            )
            torch.testing.assert_close(cached[b, step], fast(longer)[0, -1], rtol=0, atol=1e-11)


@both
@pytest.mark.parametrize(("frames", "sound"), [(0, 0), (3, 0), (0, 100)])
def test_absent_modalities(name, frames, sound):
    random = torch.Generator().manual_seed(3)
    images = (torch.randint(0, 256, (frames, 3, 26, 26), dtype=torch.uint8, generator=random),) if frames else None
    audios = (torch.randn(1, 16, 100, generator=random),) if sound else None
    batch = Batch(torch.tensor([[2, 5, -200, 9]]), None, images, audios, (sound,) if sound else None)
    plain = model(name)
    torch.testing.assert_close(accelerate(plain)(batch), plain(batch), rtol=0, atol=1e-12)
    fast = generate.greedy(accelerate(plain), batch, max_new_tokens=4)
    assert fast == generate.greedy(plain, batch, max_new_tokens=4)


def test_fusing_shares_memory_and_keeps_the_plain_model():
    plain = model()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    fast = accelerate(plain)
    again = accelerate(plain)
    layer = plain.decoder.layers[0]
    assert fast.layers[0].qkv_XD.data_ptr() == layer.attention.q.weight.data_ptr() == again.layers[0].qkv_XD.data_ptr()
    assert fast.layers[0].gate_up_2ID.data_ptr() == layer.mlp.gate.weight.data_ptr()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_full_cache_and_a_training_model_are_refused():
    plain, batch = model(), ragged(1)
    fast = accelerate(plain)
    logits_BV, cache = fast.prefill(batch, 12)
    fast.step(logits_BV.argmax(-1), cache)
    with pytest.raises(ValueError, match="holds its 12 tokens"):
        fast.step(logits_BV.argmax(-1), cache)
    with pytest.raises(ValueError, match=r"model\.eval"):
        accelerate(plain.train())


def test_a_cache_goes_with_its_last_user():
    # Red for a cycle between cache and step: 40 GB would wait for the collector.
    fast, batch = accelerate(model()), ragged(1)
    logits_BV, cache = fast.prefill(batch, 20)
    fast.step(logits_BV.argmax(-1), cache)
    left = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert left() is None
    finally:
        gc.enable()


def test_wrong_sizes_are_refused():
    fast = accelerate(model())
    with pytest.raises(ValueError, match="the tower reads"):
        fast.vision_tower(torch.zeros(1, 3, 24, 24))
    with pytest.raises(ValueError, match="the tower reads"):
        fast.audio_tower(torch.zeros(1, 16, 99))


@both
@pytest.mark.parametrize("branches", [1, 3])
def test_twins_round_where_the_plain_layer_does(name, branches):
    # Red where Mistral's branches meet each other before x, or a norm's weight meets the row before its cast.
    layer = model(name, torch.float16).decoder.layers[0]
    fused, random = weights.decoder_layer(layer), torch.Generator().manual_seed(4)
    x_RD, *given = (torch.randn(64, 40, generator=random).half() for _ in range(1 + branches))
    summed_RD = layer.parts.join(x_RD, given, layer.post_attn_norm)
    out_RD = torch.empty_like(x_RD)
    twins.add_norm(Residual(x_RD, torch.stack(given), fused.post_attn_norm, fused.pre_ffn_norm), out_RD)
    assert torch.equal(x_RD, summed_RD)
    assert torch.equal(out_RD, layer.pre_ffn_norm(summed_RD))
    gate_up_R2I = torch.randn(64, 192, generator=random).half()
    acted_RI = torch.empty(64, 96, dtype=torch.float16)
    twins.gated_mul(gate_up_R2I, fused.activation, acted_RI)
    gate, up = gate_up_R2I.chunk(2, -1)
    assert torch.equal(acted_RI, layer.mlp.activation(gate) * up)


def test_a_gpu_is_refused_by_name_where_its_kernels_lack_a_part():
    assert refusal(CONFIGS["9b"], torch.device("cuda")) is None
    assert refusal(CONFIGS["7b"], torch.device("cpu")) is None
    assert "not those of mistral; use the plain path" in str(refusal(CONFIGS["7b"], torch.device("cuda")))
