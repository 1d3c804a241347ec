"""Both towers beside transformers' own, on the same random weights, in float32."""

from __future__ import annotations

import pytest
import torch

from tests.not_run import not_run
from tests.unit.towers.state import audio_state, vision_state
from vidi.config import AudioConfig, VisionConfig
from vidi.towers.siglip import VisionTower
from vidi.towers.whisper import AudioTower

VISION = VisionConfig(image_size=26, patch_size=4, hidden_size=24, num_layers=3, num_heads=3, intermediate_size=40)
AUDIO = AudioConfig(
    num_mel_bins=16, hidden_size=24, num_layers=2, num_heads=3, intermediate_size=40, max_source_positions=20
)


def shaken(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter random, biases and norms too: a forgotten one shows."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            centre = float("norm" in name and name.endswith("weight"))
            parameter.copy_(centre + torch.randn(parameter.shape, generator=rng) * 0.3)
    return module.eval()


@pytest.fixture
def siglip():
    try:
        from transformers import SiglipVisionConfig, SiglipVisionModel
    except ImportError:
        not_run("transformers is missing; pip install 'vidi-parity[oracle]'")
    config = SiglipVisionConfig(
        image_size=26, patch_size=4, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40
    )
    config._attn_implementation = "eager"
    return shaken(SiglipVisionModel(config), 1)


@pytest.fixture
def whisper():
    try:
        from transformers import WhisperConfig
        from transformers.models.whisper.modeling_whisper import WhisperEncoder
    except ImportError:
        not_run("transformers is missing; pip install 'vidi-parity[oracle]'")
    config = WhisperConfig(
        num_mel_bins=16, d_model=24, encoder_layers=2, encoder_attention_heads=3, encoder_ffn_dim=40,
        max_source_positions=20,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return shaken(WhisperEncoder(config), 2)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@torch.no_grad()
def test_vision_tower_is_siglips_hidden_state_minus_2(siglip, backend):
    tower = VisionTower(VISION)
    tower.load_state_dict(vision_state(siglip.state_dict()))
    frames = torch.randn(3, 3, 26, 26, generator=torch.Generator().manual_seed(3))
    wanted = siglip(pixel_values=frames, output_hidden_states=True).hidden_states[-2]
    found = tower(frames, backend)
    assert found.shape == wanted.shape == (3, 36, 24)
    assert (found - wanted).abs().max() <= 2e-5 * wanted.square().mean().sqrt()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@torch.no_grad()
def test_audio_tower_is_whispers_encoder(whisper, backend):
    tower = AudioTower(AUDIO)
    tower.load_state_dict(audio_state(whisper.state_dict()))
    mel = torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(4))
    wanted = whisper(mel).last_hidden_state
    found = tower(mel, backend)
    assert found.shape == wanted.shape == (2, 20, 24)
    assert (found - wanted).abs().max() <= 2e-5 * wanted.square().mean().sqrt()


def test_towers_refuse_inputs_of_another_size():
    with pytest.raises(ValueError, match=r"\(3, 27, 27\).*\(3, 26, 26\)"):
        VisionTower(VISION)(torch.zeros(1, 3, 27, 27))
    with pytest.raises(ValueError, match=r"\(16, 41\).*\(16, 40\)"):
        AudioTower(AUDIO)(torch.zeros(1, 16, 41))


def test_the_last_vision_layer_and_the_head_feed_nothing():
    tower = VisionTower(VISION)
    frames = torch.randn(1, 3, 26, 26)
    before = tower(frames)
    with torch.no_grad():
        for part in (tower.layers[-1], tower.unused):
            for parameter in part.parameters():
                parameter.fill_(torch.nan)
    assert torch.equal(tower(frames), before)


def test_what_feeds_nothing_is_zero_until_it_is_loaded():
    head = VisionTower(VISION).unused
    for name in ("probe", "in_proj_weight", "in_proj_bias"):
        assert not getattr(head, name).any(), name
