"""The fields of the official ``config.json`` of Vidi 7B (its spec §1), where they are not those of 1.5 9B."""

from __future__ import annotations

from vidi.official import IGNORED, NINE, Fields

__all__ = ["SEVEN"]

_DECODER = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "sliding_window", "rms_norm_eps", "rope_theta"),
)
SEVEN = Fields(
    decoder={name: NINE.decoder[name] for name in (*_DECODER, "head_dim")},
    bridge={name: ours for name, ours in NINE.bridge.items() if name not in ("visual_token_budget", "budget_scope")}
    | {"eos_token_id": "end_of_turn_id"},
    # No text says what the release has here, so the file must; `sliding_window` may be null, which is no window.
    needed=(
        *_DECODER,
        *("mm_image_pool_size", "mm_audio_pool_size", "mm_time_interval", "mm_std", "mm_input_type", "eos_token_id"),
    ),
    values=NINE.values
    | {
        "model_type": ("dattn_mistral", None),
        "mm_vision_tower": ("google/siglip-so400m-patch14-384", "google/siglip2-so400m-patch14-384"),
        "hidden_act": ("silu",),
        "tie_word_embeddings": (False,),
    },
    ignored=IGNORED - {"eos_token_id"},
    tower=("mm_vision_tower",),
    architecture="DattnMistralForCausalLM",
    decoder_parts={"kind": "mistral", "windowed_every": 1},
    bridge_parts={"image_grid": "conv", "audio_widens": "projector", "positions_rounded": True},
)
