"""One decoder layer against its formula, and what rows of zeros and absent streams do (spec §6 to §8)."""

from __future__ import annotations

import math
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf

from tests import tiny
from vidi.attention import rope
from vidi.attention.unpad import Rows
from vidi.decoder import decoder as decoders
from vidi.decoder.attention import repeat_heads
from vidi.decoder.layer import CrossKeys, DecoderLayer
from vidi.decoder.mlp import GatedMlp
from vidi.decoder.norm import gemma_norm
from vidi.decoder.parts import PARTS
from vidi.stream import Stream

RNG = torch.Generator().manual_seed(0)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=RNG, dtype=torch.float64)


def norm(x, layer):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + layer.weight)


def attend(q_TNH, k_SNH, v_SNH, config, keep_TS=None):
    """Plain softmax over whole matrices, one sample."""
    scores = torch.einsum("tnh,snh->nts", q_TNH, k_SNH) * config.query_pre_attn_scalar**-0.5
    scores = config.attn_softcap * torch.tanh(scores / config.attn_softcap)
    if keep_TS is not None:
        scores = scores.masked_fill(~keep_TS, -math.inf)
    return torch.einsum("nts,snh->tnh", scores.softmax(-1), v_SNH)


def by_formula(layer, config, x, streams):
    """(T, D) and streams of (L, D) -> the text and the streams after the layer, written out for one sample."""
    a, heads = layer.attention, config.num_heads

    def split(y, n):
        return y.view(len(y), n, config.head_dim)

    def kv(s):
        n = norm(s, layer.input_norm)
        return [
            split(n @ w.weight.T, config.num_kv_heads).repeat_interleave(heads // config.num_kv_heads, 1)
            for w in (a.k, a.v)
        ]

    def turned(y):
        freq = 1 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
        angle = torch.arange(len(y), dtype=torch.float64)[:, None] * freq
        first, second = y.chunk(2, -1)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def ffn(y):
        n = norm(y, layer.pre_ffn_norm)
        h = nnf.gelu(n @ layer.mlp.gate.weight.T, approximate="tanh") * (n @ layer.mlp.up.weight.T)
        return y + norm(h @ layer.mlp.down.weight.T, layer.post_ffn_norm)

    q = split(norm(x, layer.input_norm) @ a.q.weight.T, heads)
    k, v = kv(x)
    behind = torch.arange(len(x))[:, None] - torch.arange(len(x))
    keep = (behind >= 0) & (behind <= (len(x) if layer.window is None else layer.window))
    mixed = attend(turned(q), turned(k), v, config, keep).flatten(1) @ a.o.weight.T
    after = {}
    for name, s in streams.items():
        k, v = kv(s)
        mixed = mixed + attend(q, k, v, config).flatten(1) @ a.o.weight.T
        after[name] = ffn(s + norm(v.flatten(1) @ a.o.weight.T, layer.post_attn_norm))
    return ffn(x + norm(mixed, layer.post_attn_norm)), after


@pytest.mark.parametrize("layer_idx", [0, 1])
@pytest.mark.parametrize("modalities", ["", "v", "a", "va"])
def test_a_layer_is_its_formula(layer_idx, modalities):
    """Layer 0 slides over 8 past keys (the text is longer), layer 1 does not."""
    model = tiny.model()
    config, layer = model.config.decoder, model.decoder.layers[layer_idx]
    x, streams = noise(1, 13, 40), {m: noise(1, 21 if m == "v" else 5, 40) for m in modalities}
    text = model.decoder.text_rows(torch.arange(13)[None], Rows.all_kept(1, 13), "eager", torch.float64)
    cross = {m: CrossKeys(*layer.stream_keys_values(s), Rows.all_kept(1, s.shape[1])) for m, s in streams.items()}
    wanted, after = by_formula(layer, config, x[0], {m: s[0] for m, s in streams.items()})
    tiny.assert_close(layer(x, text, cross)[0], wanted)
    for m, s in streams.items():
        tiny.assert_close(layer.update_stream(s, cross[m].v_BLGH)[0], after[m])


def test_rows_of_zeros_stay_exactly_zero_through_every_layer():
    """Padded text, padded stream rows and silent samples (spec §7)."""
    model, seen = tiny.model(), tiny.Seen()
    inputs = tiny.make([tiny.sample(12, 3, 60), tiny.sample(4, 1, 0), tiny.sample(7, 0, 20)])
    model(inputs, last_stream=True, tap=seen)
    keep = {"output": seen["text.mask"], "image_stream": seen["vision.mask"], "audio_stream": seen["audio.mask"]}
    for i in range(4):
        for part, mask in keep.items():
            x = seen[f"layer.{i}.{part}"]
            assert not x[~mask].any(), f"layer.{i}.{part}"
            assert x[mask].any(-1).all()
    assert seen["layer.0.t2v.gate"].tolist() == [True, True, False]
    assert seen["layer.0.t2a.gate"].tolist() == [True, False, True]
    assert not seen["layer.2.t2v"][2].any()
    assert not seen["layer.2.t2a"][1].any()


def test_gemmas_norm_adds_one_and_casts_last():
    x, weight = noise(3, 8).to(torch.bfloat16), noise(8).to(torch.bfloat16)
    wide = x.float()
    wanted = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * (1 + weight.float())
    assert torch.equal(gemma_norm(x, weight, 1e-6), wanted.to(torch.bfloat16))


def test_the_mlps_gelu_is_the_tanh_form():
    mlp = GatedMlp(4, 6, PARTS["gemma2"].activation).double()
    x = noise(5, 4)
    g = x @ mlp.gate.weight.T
    g = 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
    tiny.assert_close(mlp(x), (g * (x @ mlp.up.weight.T)) @ mlp.down.weight.T, 1e-12)


def test_heads_are_repeated_block_wise():
    x = torch.arange(3.0).view(1, 1, 3, 1)
    assert repeat_heads(x, 6).flatten().tolist() == [0, 0, 1, 1, 2, 2]


def test_rope_turns_pairs_of_halves():
    cos, sin = rope.angles(torch.tensor([[0, 1, 5]]), 4, 100.0, torch.float64)
    assert cos.shape == (1, 3, 4)
    assert cos[0, 0].tolist() == [1, 1, 1, 1]
    # Frequencies 1 and 0.1, written twice.
    assert cos[0, 2].tolist() == pytest.approx([math.cos(5), math.cos(0.5)] * 2, rel=1e-14)
    x = noise(1, 3, 2, 4)
    found = rope.apply(x, cos, sin)
    assert torch.equal(found[0, 0], x[0, 0])
    assert found[0, 2, 1, 0].item() == pytest.approx(
        (x[0, 2, 1, 0] * math.cos(5) - x[0, 2, 1, 2] * math.sin(5)).item(), rel=1e-12
    )
    tiny.assert_close(found.square().sum(-1), x.square().sum(-1), 1e-12)


def test_rope_counts_every_position_of_the_release():
    """To the last of 8,192, which no recording reaches: each rotary factor against one computed by NumPy."""
    pos, width, theta = np.arange(8192), 256, 10000.0
    angle = pos[:, None] * theta ** (-2 * np.arange(width // 2) / width)
    cos, sin = rope.angles(torch.from_numpy(pos)[None], width, theta, torch.float64)
    for found, wanted in ((cos, np.cos(angle)), (sin, np.sin(angle))):
        np.testing.assert_allclose(found[0].numpy(), np.concatenate([wanted, wanted], 1), rtol=0, atol=1e-11)


def test_text_visual_and_audio_features_get_the_same_factor():
    model, seen = tiny.model(), tiny.Seen()
    model(tiny.make([tiny.sample(5, 2, 30)]), tap=seen)
    for before, after in (
        ("text.embeds", "layer.0.input"),
        ("vision.llm_norm", "layer.0.image_input"),
        ("audio.llm_norm", "layer.0.audio_input"),
    ):
        assert torch.equal(seen[after], seen[before] * 40**0.5)


def test_the_head_is_tied_and_capped():
    decoder = tiny.model().decoder
    x = noise(1, 2, 40) * 200
    raw = x @ decoder.embed.weight.T
    assert raw.abs().max() > 30, "the cap does not bite"
    tiny.assert_close(decoder.logits(x), 30 * torch.tanh(raw / 30), 1e-12)


def test_padded_text_is_zeros_not_the_embedding_of_the_pad_id():
    decoder = tiny.model().decoder
    found = decoder.embed_tokens(torch.tensor([[7, 0, 0]]), torch.tensor([[True, True, False]]))
    assert torch.equal(found[0, :2], decoder.embed.weight[[7, 0]])
    assert found[0, 1].any()
    assert not found[0, 2].any()


def test_a_stream_in_chunks_is_the_stream_at_once(monkeypatch):
    layer = tiny.model().decoder.layers[0]
    s = noise(2, 30, 40)
    _, v = layer.stream_keys_values(s)
    whole = layer.update_stream(s, v)
    monkeypatch.setattr(decoders, "STREAM_CHUNK", 7)
    tiny.assert_close(decoders.update_in_chunks(layer, s, v), whole, 1e-12)


def test_the_last_stream_update_feeds_nothing_and_is_skipped():
    model, calls = tiny.model(), []
    batch, streams = tiny.make([tiny.sample(6, 1, 0)]), None
    streams = model.streams(batch)
    assert isinstance(streams["v"], Stream)
    hooks = [
        layer.post_ffn_norm.register_forward_hook(lambda m, i, o, n=layer.layer_idx: calls.append(n))
        for layer in model.decoder.layers
    ]
    try:
        short = model.decode_text(batch, streams)
        assert calls.count(3) == 1  # the text alone
        assert calls.count(2) == 2
        calls.clear()
        long = model.decode_text(batch, streams, last_stream=True)
        assert calls.count(3) == 2
    finally:
        for hook in hooks:
            hook.remove()
    assert torch.equal(short, long)


def test_a_pass_without_a_cache_holds_the_keys_of_two_layers_at_most(monkeypatch):
    """One layer's while the text reads them, and the next one's as they are made: all 42 would be 43 GB in a long video."""
    held, most, own = [], [], DecoderLayer.stream_keys_values

    def noted(layer, s_BLD):
        k_BLGH, v_BLGH = own(layer, s_BLD)
        held.append((layer.layer_idx, weakref.ref(k_BLGH)))
        most.append(len({idx for idx, k in held if k() is not None}))
        return k_BLGH, v_BLGH

    monkeypatch.setattr(DecoderLayer, "stream_keys_values", noted)
    tiny.model()(tiny.make([tiny.sample(5, 2, 30)]))
    assert most == [1, 1, 2, 2, 2, 2, 2, 2]
