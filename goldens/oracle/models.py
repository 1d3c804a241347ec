"""Which model a config.json describes: its numbers and its parts, chosen here and nowhere else."""

from collections.abc import Mapping
from typing import Any

from . import nine, seven
from .case import Sizes
from .text import IMAGE_PLACEHOLDER

__all__ = ["read"]

MODELS = {"dattn_gemma2": nine, "dattn_mistral": seven}


def read(config: Mapping[str, Any]) -> Sizes:
    """From the official dict. Recordings lack `model_type`; a field that only Gemma 2 has tells them apart then."""
    kind = config.get("model_type", "dattn_gemma2" if "query_pre_attn_scalar" in config else "dattn_mistral")
    if kind not in MODELS:
        raise ValueError(f"model_type is {kind!r}; it must be one of {', '.join(MODELS)}")
    vision, audio = config["vision_config"], config["audio_config"]
    return Sizes(
        width=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        patch=vision["patch_size"],
        # hidden state k is the output after k layers; -2 of (layers + 1) states is one layer short of the end
        vision_layers_run=vision["num_hidden_layers"] + 1 + config.get("mm_vision_select_layer", -2),
        vision_heads=vision["num_attention_heads"],
        vision_eps=vision.get("layer_norm_eps", 1e-6),
        audio_layers=audio["encoder_layers"],
        audio_heads=audio["encoder_attention_heads"],
        audio_positions=audio["max_source_positions"],
        audio_eps=audio.get("layer_norm_eps", 1e-5),
        placeholder=config.get("image_placeholder", IMAGE_PLACEHOLDER),
        parts=MODELS[kind].PARTS,
        **MODELS[kind].numbers(config),
    )
