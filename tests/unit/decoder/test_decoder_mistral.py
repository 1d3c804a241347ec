"""What a Mistral decoder has of its own (spec of the 7B, §6-§8): its norm, how outputs join, its head, its feed-forward."""

from __future__ import annotations

import pytest
import torch

from tests import seven
from vidi.decoder.decoder import Decoder
from vidi.decoder.norm import PlainNorm
from vidi.decoder.parts import PARTS
from vidi.parity.trace import Trace

HALF = torch.float16


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def test_the_norms_weight_is_plain_and_multiplies_after_the_cast() -> None:
    norm = PlainNorm(24, 4e-5).to(HALF)
    norm.weight.data = noise(24, dtype=HALF)
    x = 3 * noise(5, 24, dtype=HALF)
    wide = x.float()
    cast = (wide / (wide.square().mean(-1, keepdim=True) + 4e-5).sqrt()).to(HALF)
    assert torch.equal(norm(x), norm.weight * cast)
    assert not torch.equal(
        norm(x), (norm.weight.float() * wide / (wide.square().mean(-1, keepdim=True) + 4e-5).sqrt()).to(HALF)
    )


def test_outputs_join_one_by_one() -> None:
    """In half precision the order shows: ((x + self) + visual) + audio."""
    x, a, b, c = (noise(4, 8, 24, dtype=HALF) * s for s in (30, 1, 0.1, 1))
    found = PARTS["mistral"].join(x, [a[0], b[1], c[2]], torch.nn.Identity())
    assert torch.equal(found, ((x + a[0]) + b[1]) + c[2])
    assert not torch.equal(found, x + ((a[0] + b[1]) + c[2]))


def test_nothing_is_normed_behind_attention_and_feed_forward() -> None:
    layer = seven.model().decoder.layers[0]
    names = {name for name, _ in layer.named_parameters() if "norm" in name}
    assert names == {"input_norm.weight", "pre_ffn_norm.weight"}
    x = noise(1, 3, 40)
    m = layer.pre_ffn_norm(x)
    gate = m @ layer.mlp.gate.weight.T
    wanted = x + (gate * gate.sigmoid() * (m @ layer.mlp.up.weight.T)) @ layer.mlp.down.weight.T
    assert (layer.feed_forward(x) - wanted).abs().max() < 1e-13


def test_nothing_is_scaled_on_its_way_in() -> None:
    x = noise(2, 3, 40)
    assert torch.equal(seven.model().decoder.scaled(x), x)


@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16, torch.float32])
def test_the_head_is_its_own_and_float32(dtype: torch.dtype) -> None:
    decoder, tap = Decoder(seven.config().decoder).to(dtype), Trace()
    x = noise(1, 2, 40, dtype=dtype)
    logits = decoder.logits(x, tap)
    assert logits.dtype == torch.float32
    raw = tap.tensors()["lm_head"]
    assert raw.dtype == dtype
    assert torch.equal(logits, raw.float())
    assert torch.equal(raw, torch.nn.functional.linear(x, decoder.head.weight))
    assert decoder.head.weight is not decoder.embed.weight


def test_every_layer_has_the_window() -> None:
    assert [layer.window for layer in seven.model().decoder.layers] == [5, 5, 5]
