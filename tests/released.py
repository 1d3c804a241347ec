"""The release as the tests know it: config.json and the two towers' configurations, typed from spec §1.

Nothing here is read from `vidi`: a wrong number in the model's own file of facts shows against these.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

__all__ = ["AUDIO", "CONFIG", "VISION", "config"]

VISION: Mapping[str, Any] = {
    "image_size": 384,
    "patch_size": 14,
    "num_channels": 3,
    "hidden_size": 1152,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "intermediate_size": 4304,
    "layer_norm_eps": 1e-6,
}
AUDIO: Mapping[str, Any] = {
    "num_mel_bins": 128,
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "max_source_positions": 1500,
    "layer_norm_eps": 1e-5,
}
#: config.json as the released checkpoint has it.
CONFIG: Mapping[str, Any] = {
    "model_type": "dattn_gemma2",
    "vocab_size": 256000,
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "mm_vision_tower": "google/siglip2-so400m-patch14-384",
    "mm_audio_tower": "openai/whisper-large-v3",
    "mm_vision_select_layer": -2,
    "mm_image_pool_size": 2,
    "mm_audio_pool_size": 5,
    "mm_input_type": "video",
    "mm_image_aspect_ratio": "resize",
    "mm_time_interval": 10000,
    "mm_std": 0.028976401314139366,
    "mm_projector_type": None,
}


def config(*, vision_layers: int = 27, audio_layers: int = 32, **changes: Any) -> dict[str, Any]:
    """CONFIG with the towers' configurations in it, as the oracle reads it; some layers only, and `changes` on top."""
    raw = copy.deepcopy(dict(CONFIG))
    raw["vision_config"] = dict(VISION) | {"num_hidden_layers": vision_layers}
    raw["audio_config"] = dict(AUDIO) | {"encoder_layers": audio_layers}
    return raw | changes
