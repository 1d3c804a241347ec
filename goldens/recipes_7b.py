"""The small cases of the 7B, as recipes like those of `recipes.py`: one small checkpoint and the inputs that no recording of
the release holds, because it cannot run them or was not asked to.

The sizes differ from the recordings' where a mix-up would hide there:

    width 24, 6 heads of 8     48 is not the width; 2 query heads share one of 3 kv heads, and n // 2 is not n % 3
    pool 3 of 11 patches       kernel 4, an even one; 8 rows sampled at 0, 3.5 and 7; h and w span 0 … 2
    audio pool 4               a piece is 40 mel frames, 20 positions and 5 tokens
    time interval 5000         not the 9B's
    norm eps 4e-5              not the bridge's 1e-5
    window 3                   4 keys on each of the 3 layers, less than any prompt but the shortest
    eos 2                      not the 9B's stop token, and read from config.json
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import recipes
from .recipes import Checkpoint, Recipe, absent, frames, ids_of, mel, noise, put_audio, put_vision, text_of

__all__ = ["cases", "config", "weights"]

WIDTH, VOCABULARY = 24, 112
TOWERS = {part: recipes.config()[part] for part in ("vision_config", "audio_config")}

BOS, EOS = 1, 2


def config(**changes: Any) -> dict[str, Any]:
    """The small checkpoint's config.json (official keys) with its towers' configs; `changes` go on top."""
    return copy.deepcopy(_CONFIG) | changes


_CONFIG: dict[str, Any] = {
    "model_type": "dattn_mistral",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "sliding_window": 3,
    "hidden_act": "silu",
    "rms_norm_eps": 4e-05,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "pad_token_id": 0,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_image_pool_size": 3,
    "mm_audio_pool_size": 4,
    "mm_input_type": "video",
    "mm_image_aspect_ratio": "resize",
    "mm_time_interval": 5000,
    "mm_std": 0.03,
    "mm_splits": 32,
    "loss_thres": None,
    "train_vis": False,
    "train_aud": False,
    **TOWERS,
}


def weights(raw: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
    """The small checkpoint, float32, official names; all cases share it."""
    made = Checkpoint()
    for part, put_tower in (("vision_config", put_vision), ("audio_config", put_audio)):
        put_tower(TOWERS[part], made.put, made.linear, made.norm)
    made.put("model.mm_rand_img_pool.conv.weight", (8, 8, 4, 4), -3)
    made.put("model.mm_rand_aud_pool.weight", (8, 8, 4), -3)
    _put_bridge(made)
    made.put("model.embed_tokens.weight", (VOCABULARY, WIDTH), 0)
    for i in range(3):
        layer = f"model.layers.{i}."
        made.linear(layer + "self_attn.q_proj", 48, WIDTH, log2_gain=1, bias=False)
        made.linear(layer + "self_attn.k_proj", 24, WIDTH, bias=False)
        made.linear(layer + "self_attn.v_proj", 24, WIDTH, bias=False)
        made.linear(layer + "self_attn.o_proj", WIDTH, 48, bias=False)
        for part in ("gate_proj", "up_proj"):
            made.linear(f"{layer}mlp.{part}", 32, WIDTH, bias=False)
        made.linear(layer + "mlp.down_proj", WIDTH, 32, bias=False)
        for part in ("input", "post_attention"):
            made.put(f"{layer}{part}_layernorm.weight", (WIDTH,), -3, around=1.0)
    made.put("model.norm.weight", (WIDTH,), -3, around=1.0)
    made.put("lm_head.weight", (VOCABULARY, WIDTH), 0)
    return made.tensors


def _put_bridge(made: Checkpoint) -> None:
    for kind in ("img", "aud"):
        made.linear(f"model.mm_rand_{kind}_projector.model.0", WIDTH, 8)
        made.linear(f"model.mm_rand_{kind}_projector.model.2", WIDTH, WIDTH)
        made.put(f"model.mm_rand_{kind}_norm.weight", (WIDTH,), -3, around=1.0)
    made.put("model.mm_rand_llm_norm.weight", (WIDTH,), -5, around=0.25)
    for axis in "hwt":
        made.linear(f"model.mm_rand_pos_{axis}.mlp.0", WIDTH, WIDTH)
        made.linear(f"model.mm_rand_pos_{axis}.mlp.2", WIDTH, WIDTH)


def _ids(stream: str, count: int, image_at: int | None) -> np.ndarray:
    return ids_of(stream, count, image_at, bos=BOS)


def cases() -> dict[str, Recipe]:
    """Every small case by name."""
    videos = {"inputs.images_u8.0": frames("a", 2), "inputs.images_u8.1": frames("b", 1)}
    # 29 positions, 7 tokens; 13 positions, 3 tokens, and a fourth window that straddles the end (positions 12 to 15)
    audios = {
        "inputs.audios.0": mel("a", 2),
        "inputs.audios.1": mel("b", 1),
        "inputs.audio_sizes": np.array([58, 27], np.int64),
    }
    text = text_of(_ids("long", 9, 2), _ids("short", 6, 1))
    plain = text_of(_ids("plain", 9, None), _ids("plainer", 4, None))
    made = [
        Recipe(
            "base",
            "two videos of unlike length, right-padded text, two audio pieces",
            config(),
            videos | audios | text,
        ),
        Recipe("textonly", "no frames and no sound: a plain Mistral, longer than its window", config(), plain),
        Recipe(
            "oneframe",
            "one frame and one audio token stand at position 0; no attention mask at all",
            config(),
            _one_frame(),
        ),
        Recipe("oneid", "a prompt of one id", config(), _one_id()),
        Recipe(
            "noaudio",
            "no sample has one whole audio token, so that there is no audio stream",
            config(),
            videos | audios | {"inputs.audio_sizes": np.array([7, 6], np.int64)} | text,
        ),
        Recipe(
            "absent",
            "all-zero mel, all-zero frames, and audio shorter than a token, a sample each",
            config(),
            absent(BOS),
        ),
        Recipe("train", "position noise and labels", config(), _training()),
        Recipe("trainvideo", "position noise and labels, frames alone", config(), _training(sound=False)),
        Recipe(
            "decode",
            "batched greedy decoding past the window from prompts padded at the left, at the right and within, one of them"
            " without sound; a row stops at eos before the others",
            config(),
            _prompts(),
            decode_steps=8,
        ),
    ]
    return {recipe.name: recipe for recipe in made}


def _one_frame() -> dict[str, np.ndarray]:
    return {
        "inputs.images_u8.0": frames("c", 1),
        "inputs.audios.0": mel("c", 1),
        "inputs.audio_sizes": np.array([13], np.int64),
        "inputs.input_ids": _ids("one", 7, 3)[None],
    }


def _one_id() -> dict[str, np.ndarray]:
    return {"inputs.images_u8.0": frames("a", 2), "inputs.input_ids": np.array([[BOS, -200]])}


def _training(sound: bool = True) -> dict[str, np.ndarray]:
    """A labelled row of 8 kept tokens: the first, the placeholder and what the user said are ignored."""
    ids = _ids("train", 9, 2)[None]
    heard = {
        "inputs.audios.0": mel("a", 2),
        "inputs.audio_sizes": np.array([58], np.int64),
        "inputs.pos_noise.t_a.0": noise("t_a", 7),
    }
    return {
        "inputs.images_u8.0": frames("a", 2),
        "inputs.input_ids": ids,
        "inputs.attention_mask": np.ones((1, 9), bool),
        "inputs.labels": np.where(np.arange(9) < 5, -100, ids),
        "inputs.pos_noise.h": noise("h", 3),
        "inputs.pos_noise.w": noise("w", 3),
        "inputs.pos_noise.t_v.0": noise("t_v", 2),
    } | (heard if sound else {})


def _prompts(names: tuple[str, str, str] = ("left 23", "right 84", "within 137")) -> dict[str, np.ndarray]:
    left, right, within = (_ids(f"prompt {name}", count, 1) for name, count in zip(names, (6, 5, 9), strict=True))
    ids = np.stack([np.pad(left, (3, 0)), np.pad(right, (0, 4)), within])
    mask = np.stack([np.arange(9) >= 3, np.arange(9) < 5, ~np.isin(np.arange(9), [3, 4])])
    return {
        **{
            f"inputs.images_u8.{b}": frames(name, count)
            for b, (name, count) in enumerate((("a", 2), ("b", 1), ("c", 1)))
        },
        "inputs.audios.0": mel("a", 2),
        "inputs.audios.1": mel("b", 1),
        "inputs.audio_sizes": np.array([58, 27, 0], np.int64),
        "inputs.input_ids": ids,
        "inputs.attention_mask": mask,
    }
