"""A tiny 7B for unit tests: every feature bites, weights are random but fixed."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from vidi.config import VidiConfig
from vidi.model import VidiModel

__all__ = ["OFFICIAL", "config", "model"]

# As a released config.json would have it, towers beside it.
OFFICIAL: dict[str, Any] = {
    "model_type": "dattn_mistral",
    "vocab_size": 512,
    "hidden_size": 40,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "sliding_window": 5,
    "hidden_act": "silu",
    "rms_norm_eps": 4e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_image_pool_size": 3,
    "mm_audio_pool_size": 4,
    "mm_input_type": "video",
    "mm_image_aspect_ratio": "resize",
    "mm_std": 0.03,
    "mm_time_interval": 5000,
    "mm_splits": 32,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "mm_audio_tower": "openai/whisper-large-v3",
    "loss_thres": None,
    "train_vis": False,
    "train_aud": False,
    "vision_config": {
        "image_size": 26,
        "patch_size": 2,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    },
    "audio_config": {
        "num_mel_bins": 16,
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "max_source_positions": 50,
    },
}


def config(**changes: Any) -> VidiConfig:
    return VidiConfig.from_official(OFFICIAL | changes)


@cache
def model() -> VidiModel:
    """In float64."""
    made = VidiModel(config()).double()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in made.named_parameters():
        scale = 0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
        parameter.data = values + (1.0 if "norm" in name and parameter.ndim == 1 else 0.0)
    return made.requires_grad_(False)
