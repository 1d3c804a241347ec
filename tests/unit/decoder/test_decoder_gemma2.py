"""The decoder without streams is Gemma 2: transformers' eager one beside it, same random weights, float32."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests import tiny
from tests.not_run import not_run
from vidi.checkpoint import names
from vidi.config import VidiConfig
from vidi.inputs.batch import Batch
from vidi.model import VidiModel

TINY = VidiConfig.tiny()
# Caps and a window that bite at these sizes: scores reach past the cap, texts past the window.
DECODER = dataclasses.replace(TINY.decoder, attn_softcap=2.0, final_softcap=3.0, sliding_window=4)


def theirs(config, *, window: int):
    try:
        from transformers import Gemma2Config, Gemma2ForCausalLM
    except ImportError:
        not_run("transformers is missing; pip install 'vidi-parity[oracle]'")
    asked = Gemma2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        query_pre_attn_scalar=config.query_pre_attn_scalar,
        attn_logit_softcapping=config.attn_softcap,
        final_logit_softcapping=config.final_softcap,
        sliding_window=window,
        rms_norm_eps=config.rms_norm_eps,
        pad_token_id=0,
    )
    asked._attn_implementation = "eager"
    return Gemma2ForCausalLM(asked).eval().requires_grad_(False)


@pytest.fixture
def pair():
    # Their window counts the query itself, ours (as the release's kernel) does not: w here is w + 1 there.
    torch.manual_seed(2)
    gemma = theirs(DECODER, window=DECODER.sliding_window + 1)
    rng = torch.Generator().manual_seed(5)
    for parameter in gemma.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=rng) * 0.15)
    model = VidiModel(dataclasses.replace(TINY, decoder=DECODER)).requires_grad_(False)
    state = {names.our_name(name): value for name, value in gemma.state_dict().items() if name != names.HEAD}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == []
    assert [name for name in missing if name.startswith("decoder.")] == []
    return gemma, model


IDS = torch.randint(3, 500, (2, 14), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_text_alone_is_gemma_2(pair):
    gemma, model = pair
    wanted, found = gemma(IDS).logits, model(Batch(IDS))
    tiny.assert_close(found, wanted, 2e-5)
    assert wanted.abs().max() > 2, "the final softcap does not bite"


@torch.no_grad()
def test_right_padding_does_not_change_kept_rows(pair):
    gemma, model = pair
    keep = torch.ones_like(IDS, dtype=torch.bool)
    keep[1, 9:] = False
    found = model(Batch(IDS, keep))
    tiny.assert_close(found[0], gemma(IDS[:1]).logits[0], 2e-5)
    tiny.assert_close(found[1, :9], gemma(IDS[1:, :9]).logits[0], 2e-5)


@torch.no_grad()
@pytest.mark.parametrize("change", [{"sliding_window": 5}, {"attn_softcap": 2.5}, {"query_pre_attn_scalar": 16}])
def test_the_comparison_sees_each_constant(pair, change):
    """The window, the cap and the scale bite here: with another value the two models differ visibly."""
    gemma, model = pair
    other = VidiModel(dataclasses.replace(TINY, decoder=dataclasses.replace(DECODER, **change))).requires_grad_(False)
    other.load_state_dict(model.state_dict())
    with pytest.raises(AssertionError, match="off by"):
        tiny.assert_close(other(Batch(IDS)), gemma(IDS).logits, 1e-3)
