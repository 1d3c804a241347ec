"""Two configurations of Vidi 7B for synthetic checkpoints. The released file decides what its own has (spec §1)."""

from __future__ import annotations

from typing import Any

from vidi.config import VidiConfig

__all__ = ["FULL", "TINY", "config"]

# As a released config.json would have it, towers beside it.
TINY: dict[str, Any] = {
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
# What the specification assumes, where no text tells: Mistral 7B v0.3, pools of 2 and 5, the 9B's interval and deviation.
FULL: dict[str, Any] = {name: value for name, value in TINY.items() if not name.endswith("_config")} | {
    "vocab_size": 32768,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "mm_image_pool_size": 2,
    "mm_audio_pool_size": 5,
    "mm_std": 0.0290,
    "mm_time_interval": 10000,
}


def config(size: str) -> VidiConfig:
    """size: tiny (every feature bites) or full."""
    return VidiConfig.from_official({"tiny": TINY, "full": FULL}[size])
