"""The fields of the official ``config.json`` and of Hugging Face tower configurations, and what they mean here (spec §1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = [
    *("AUDIO_FIELDS", "AUDIO_REQUIRED", "BRIDGE_FIELDS", "DECODER_FIELDS", "GENERIC", "IGNORED", "NINE"),
    *("REQUIRED_VALUES", "TOWER_IGNORED", "VISION_FIELDS", "VISION_REQUIRED", "Fields"),
]


@dataclass(frozen=True)
class Fields:
    """What the config.json of one model may and must hold.

    decoder, bridge: their fields -> ours. needed: must be there; tower: likewise, where the vision
    tower's own configuration is not beside them. values: fields that choose what is computed, with the
    choices that are. ignored: known, without effect. decoder_parts, bridge_parts: what the model itself chooses, as
    fields of `DecoderConfig` and `VidiConfig`.
    """

    decoder: dict[str, str]
    bridge: dict[str, str]
    needed: tuple[str, ...]
    values: dict[str, tuple[Any, ...]]
    ignored: frozenset[str]
    architecture: str
    tower: tuple[str, ...] = ()
    decoder_parts: dict[str, Any] = field(default_factory=dict)
    bridge_parts: dict[str, Any] = field(default_factory=dict)

    @property
    def known(self) -> set[str]:
        """Every field that may stand in the file."""
        return {*self.decoder, *self.bridge, *self.values, *self.ignored, *GENERIC, "vision_config", "audio_config"}


# Theirs -> ours.
DECODER_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "sliding_window": "sliding_window",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "attn_logit_softcapping": "attn_softcap",
    "final_logit_softcapping": "final_softcap",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}
BRIDGE_FIELDS = {
    "mm_image_pool_size": "image_pool_size",
    "mm_audio_pool_size": "audio_pool_size",
    "mm_time_interval": "time_interval",
    "mm_std": "norm_std",
    "visual_token_budget": "visual_token_budget",
    "budget_scope": "budget_scope",
    "loss_thres": "loss_threshold",
    "bos_token_id": "bos_id",
    "pad_token_id": "pad_id",
    "end_of_turn_id": "end_of_turn_id",
    "image_placeholder": "image_placeholder",
    "max_position_embeddings": "max_positions",
}
# Fields that choose what is computed: one choice is implemented, any other is refused. The released file holds
# `mm_projector_type: null`, which means mlp2x_gelu (its weights are model.0 and model.2).
REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "model_type": ("dattn_gemma2",),
    "mm_projector_type": (None, "mlp2x_gelu"),
    "mm_vision_select_layer": (-2,),
    "mm_input_type": ("video",),
    "mm_image_aspect_ratio": ("resize",),
    "mm_vision_tower": ("google/siglip2-so400m-patch14-384", None),
    "mm_audio_tower": ("openai/whisper-large-v3", None),
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "hidden_act": ("gelu_pytorch_tanh", None),
    "tie_word_embeddings": (True,),
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
}
# Known, without effect on what is computed here: chunk counts, training switches, how the file was written.
IGNORED = frozenset(
    {
        "mm_splits",
        "train_vis",
        "train_aud",
        "eos_token_id",
        "cache_implementation",
        "initializer_range",
        "use_cache",
        "_attn_implementation",
    }
)
# What Hugging Face writes into every configuration, whatever the model.
GENERIC = {
    *("_attn_implementation_autoset", "_name_or_path", "add_cross_attention", "architectures", "bad_words_ids"),
    *("begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size"),
    *("decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping"),
    *("encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty", "finetuning_task"),
    *("forced_bos_token_id", "forced_eos_token_id", "id2label", "is_decoder", "is_encoder_decoder", "label2id"),
    *("length_penalty", "max_length", "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups"),
    *("num_beams", "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores"),
    *("pad_token_id", "prefix", "problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty"),
    *("return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params"),
    *("temperature", "tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k"),
    *("top_p", "torch_dtype", "torchscript", "transformers_version", "typical_p", "use_bfloat16"),
}
NINE = Fields(DECODER_FIELDS, BRIDGE_FIELDS, tuple(DECODER_FIELDS), REQUIRED_VALUES, IGNORED, "DattnGemma2ForCausalLM")
VISION_FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "num_channels",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "layer_norm_eps": "layer_norm_eps",
}
VISION_REQUIRED = {"hidden_act": "gelu_pytorch_tanh", "select_layer": -2}
AUDIO_FIELDS = {
    "num_mel_bins": "num_mel_bins",
    "d_model": "hidden_size",
    "encoder_layers": "num_layers",
    "encoder_attention_heads": "num_heads",
    "encoder_ffn_dim": "intermediate_size",
    "max_source_positions": "max_source_positions",
    "layer_norm_eps": "layer_norm_eps",
}
AUDIO_REQUIRED = {"activation_function": "gelu", "scale_embedding": False}
TOWER_IGNORED = {
    *("attention_dropout", "activation_dropout", "dropout", "encoder_layerdrop", "nb_max_frames", "num_hidden_layers"),
    *("_attn_implementation", "use_cache", "init_std", "vocab_size", "max_target_positions", "decoder_layers"),
    *("decoder_attention_heads", "decoder_ffn_dim", "decoder_layerdrop", "initializer_range", "vision_use_head"),
}
