"""The small cases, as recipes: two small checkpoints and their inputs, made of integers, so that their bits depend on
neither library nor machine. The oracle turns each into a golden of every stage; nothing is stored here.

The sizes are chosen so that what the recordings of the release leave untested bites:

    width 24               sqrt(24) is exact in no float format
    4 heads of 4           16 is not the width; scale 6^-0.5 is not 4^-0.5; 2 query heads share a kv head
    window 3               4 keys, less than any prompt but the shortest
    gains of q, k, norm    attention scores of order 50, logits of order 30: both softcaps bend
    image 22, patch 2      11 patches a side, padded to 12, 6×6 tokens; a resize goes to 10, 5×5 tokens
    20 audio positions     a piece is 40 mel frames and 4 tokens
    3 layers               0 and 2 slide, 1 does not; the last layer's stream update feeds nothing

One case, `odd`, has a checkpoint of its own, in which every number is another one than here and than in the release: what is
written into the code in place of being read from the configuration shows there.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "POS_FREQ", "Checkpoint", "Recipe", "absent", "cases", "config", "frames", "gaussianish", "ids_of", "mel", "noise",
    "odd_config", "pos_freq", "put_audio", "put_vision", "text_of", "weights", "words",
]  # fmt: skip

# torch.exp(torch.arange(0, 24, 2, float32) · (-ln 10000 / 24)) on a CPU, as bits: the table w of spec §5 for width 24
POS_FREQ = np.array(
    [
        0x3F800000,
        0x3EEDA63C,
        0x3E5C9D37,
        0x3DCCCCCC,
        0x3D3E1E97,
        0x3CB07DC6,
        0x3C23D70A,
        0x3B98187B,
        0x3B0D316B,
        0x3A83126E,
        0x39F35A5D,
        0x3961E8AB,
    ],
    np.uint32,
).view(np.float32)


# The same for width 20, of the odd case.
_ODD_POS_FREQ = np.array(
    [
        0x3F800000,
        0x3ECBD4B4,
        0x3E224B06,
        0x3D813857,
        0x3CCDC614,
        0x3C23D70A,
        0x3B8273A7,
        0x3ACFBC2E,
        0x3A2566D5,
        0x3983B1F5,
    ],
    np.uint32,
).view(np.float32)


def pos_freq(raw: Mapping[str, Any]) -> np.ndarray:
    """The table w of spec §5 for a config's width."""
    return {24: POS_FREQ, 20: _ODD_POS_FREQ}[raw["hidden_size"]]


@dataclass(frozen=True)
class Recipe:
    """One small case. `config` is an official config.json with the towers' configs inside, `inputs` are named as in the
    recordings, `decode_steps` > 0 asks for greedy tokens too; `why` says what only this case sees. `weights_file`: where
    the set keeps the case's checkpoint, `weights(config)`."""

    name: str
    why: str
    config: Mapping[str, Any]
    inputs: Mapping[str, np.ndarray]
    decode_steps: int = 0
    weights_file: str = "weights.safetensors"


def words(stream: str, count: int) -> np.ndarray:
    """`count` pseudo-random uint64: splitmix64 over a counter, keyed by the FNV-1a hash of `stream`."""
    key = 0xCBF29CE484222325
    for byte in stream.encode():
        key = ((key ^ byte) * 0x100000001B3) % 2**64
    z = np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def gaussianish(stream: str, shape: tuple[int, ...], log2_scale: int) -> np.ndarray:
    """float32 of about normal shape and a standard deviation near 1.155·2^log2_scale: each is the centred sum of a
    word's four 16-bit parts, scaled by a power of two, so exact."""
    parts = words(stream, int(np.prod(shape))).view(np.uint16).reshape(-1, 4).astype(np.int64)
    return ((parts.sum(axis=1) - 2 * 65535) * 2.0 ** (log2_scale - 15)).astype(np.float32).reshape(shape)


def config(**changes: Any) -> dict[str, Any]:
    """The small checkpoint's config.json (official keys) with its towers' configs; `changes` go on top."""
    return copy.deepcopy(_CONFIG) | changes


_CONFIG: dict[str, Any] = {
    "model_type": "dattn_gemma2",
    "vocab_size": 112,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "sliding_window": 3,
    "query_pre_attn_scalar": 6,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 107,
    "mm_projector_type": None,
    "mm_vision_select_layer": -2,
    "mm_image_pool_size": 2,
    "mm_audio_pool_size": 5,
    "mm_input_type": "video",
    "mm_image_aspect_ratio": "resize",
    "mm_time_interval": 10000,
    "mm_std": 0.028976401314139366,
    "tie_word_embeddings": True,
    # 3 frames of 12² just fit (3·144 = 108·2²): "more than the budget" is strict
    "visual_token_budget": 108,
    "budget_scope": "batch",
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_channels": 3,
        "patch_size": 2,
        "image_size": 22,
        "layer_norm_eps": 1e-06,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "audio_config": {
        "model_type": "whisper",
        "d_model": 8,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "num_mel_bins": 4,
        "max_source_positions": 20,
        "activation_function": "gelu",
    },
}


_ODD = {
    "model_type": "dattn_gemma2",
    "vocab_size": 90,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "sliding_window": 5,
    "query_pre_attn_scalar": 11,
    "attn_logit_softcapping": 9.0,
    "final_logit_softcapping": 45.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 0.003,
    "rope_theta": 500.0,
    "max_position_embeddings": 300,
    "pad_token_id": 1,
    "bos_token_id": 5,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_image_pool_size": 2,
    "mm_audio_pool_size": 3,
    "mm_input_type": "video",
    "mm_image_aspect_ratio": "resize",
    "mm_time_interval": 777,
    "mm_std": 0.3,
    "loss_thres": 1.5,
    "tie_word_embeddings": True,
    # the first video's 2 frames of 14² are resized to 12², the second's frame is not
    "visual_token_budget": 90,
    "budget_scope": "video",
    "end_of_turn_id": 51,
    "image_placeholder": -77,
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_channels": 3,
        "patch_size": 3,
        "image_size": 40,
        "layer_norm_eps": 0.02,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "audio_config": {
        "model_type": "whisper",
        "d_model": 10,
        "encoder_layers": 3,
        "encoder_attention_heads": 5,
        "encoder_ffn_dim": 18,
        "num_mel_bins": 6,
        "max_source_positions": 14,
        "layer_norm_eps": 0.004,
        "activation_function": "gelu",
    },
}


def odd_config() -> dict[str, Any]:
    """A config.json in which every number differs from `config()` and from the release."""
    return copy.deepcopy(_ODD)


class Checkpoint:
    """Weights by official name, float32, each of them its name's own stream of numbers."""

    def __init__(self) -> None:
        self.tensors: dict[str, np.ndarray] = {}

    def put(self, name: str, shape: tuple[int, ...], log2_scale: int, around: float = 0.0) -> None:
        self.tensors[name] = gaussianish(name, shape, log2_scale) + np.float32(around)

    def linear(self, name: str, out: int, inner: int, log2_gain: int = 0, bias: bool = True) -> None:
        self.put(f"{name}.weight", (out, inner), log2_gain - round(np.log2(inner) / 2))
        if bias:
            self.put(f"{name}.bias", (out,), -3)

    def norm(self, name: str, size: int) -> None:
        self.put(f"{name}.weight", (size,), -3, around=1.0)
        self.put(f"{name}.bias", (size,), -3)


def weights(raw: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
    """The small checkpoint of a config, float32, official names (lm_head is tied and absent, as in saved files)."""
    raw = config() if raw is None else raw
    made = Checkpoint()
    put, linear, norm = made.put, made.linear, made.norm
    width = raw["hidden_size"]
    put_vision(raw["vision_config"], put, linear, norm)
    put_audio(raw["audio_config"], put, linear, norm)
    linear("model.mm_rand_img_projector.model.0", width, 4 * raw["vision_config"]["hidden_size"])
    linear("model.mm_rand_img_projector.model.2", width, width)
    put("model.mm_rand_img_norm.weight", (width,), -3, around=1.0)
    put("model.mm_rand_aud_pool.weight", (width, raw["audio_config"]["d_model"], raw["mm_audio_pool_size"]), -3)
    linear("model.mm_rand_aud_projector.model.0", width, width)
    linear("model.mm_rand_aud_projector.model.2", width, width)
    put("model.mm_rand_aud_norm.weight", (width,), -3, around=1.0)
    put("model.mm_rand_llm_norm.weight", (width,), -5, around=0.25)
    for axis in "hwt":
        linear(f"model.mm_rand_pos_{axis}.mlp.0", width, width)
        linear(f"model.mm_rand_pos_{axis}.mlp.2", width, width)
    _put_decoder(raw, put, linear)
    return made.tensors


def put_vision(raw: Mapping[str, Any], put: Callable, linear: Callable, norm: Callable) -> None:
    root, width, inner = "model.mm_vis.vision_model.", raw["hidden_size"], raw["intermediate_size"]
    patch, side = raw["patch_size"], raw["image_size"] // raw["patch_size"]
    put(root + "embeddings.patch_embedding.weight", (width, 3, patch, patch), -1)
    put(root + "embeddings.patch_embedding.bias", (width,), -3)
    put(root + "embeddings.position_embedding.weight", (side**2, width), -1)
    for i in range(raw["num_hidden_layers"]):
        layer = f"{root}encoder.layers.{i}."
        for part in ("q_proj", "k_proj"):
            linear(f"{layer}self_attn.{part}", width, width, log2_gain=1)
        for part in ("v_proj", "out_proj"):
            linear(f"{layer}self_attn.{part}", width, width)
        norm(layer + "layer_norm1", width)
        norm(layer + "layer_norm2", width)
        linear(layer + "mlp.fc1", inner, width)
        linear(layer + "mlp.fc2", width, inner)
    norm(root + "post_layernorm", width)
    put(root + "head.probe", (1, 1, width), 0)
    put(root + "head.attention.in_proj_weight", (3 * width, width), -2)
    put(root + "head.attention.in_proj_bias", (3 * width,), -3)
    linear(root + "head.attention.out_proj", width, width)
    norm(root + "head.layernorm", width)
    linear(root + "head.mlp.fc1", inner, width)
    linear(root + "head.mlp.fc2", width, inner)


def put_audio(raw: Mapping[str, Any], put: Callable, linear: Callable, norm: Callable) -> None:
    root, width, inner = "model.mm_aud.encoder.", raw["d_model"], raw["encoder_ffn_dim"]
    put(root + "conv1.weight", (width, raw["num_mel_bins"], 3), -2)
    put(root + "conv1.bias", (width,), -3)
    put(root + "conv2.weight", (width, width, 3), -2)
    put(root + "conv2.bias", (width,), -3)
    put(root + "embed_positions.weight", (raw["max_source_positions"], width), -1)
    for i in range(raw["encoder_layers"]):
        layer = f"{root}layers.{i}."
        linear(layer + "self_attn.k_proj", width, width, log2_gain=1, bias=False)
        linear(layer + "self_attn.q_proj", width, width, log2_gain=1)
        linear(layer + "self_attn.v_proj", width, width)
        linear(layer + "self_attn.out_proj", width, width)
        norm(layer + "self_attn_layer_norm", width)
        linear(layer + "fc1", inner, width)
        linear(layer + "fc2", width, inner)
        norm(layer + "final_layer_norm", width)
    norm(root + "layer_norm", width)


def _put_decoder(raw: Mapping[str, Any], put: Callable, linear: Callable) -> None:
    width, inner, head_dim = raw["hidden_size"], raw["intermediate_size"], raw["head_dim"]
    query_width, key_width = raw["num_attention_heads"] * head_dim, raw["num_key_value_heads"] * head_dim
    put("model.embed_tokens.weight", (raw["vocab_size"], width), -2)
    for i in range(raw["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        linear(layer + "self_attn.q_proj", query_width, width, log2_gain=2, bias=False)
        linear(layer + "self_attn.k_proj", key_width, width, log2_gain=1, bias=False)
        linear(layer + "self_attn.v_proj", key_width, width, bias=False)
        linear(layer + "self_attn.o_proj", width, query_width, bias=False)
        for part in ("gate_proj", "up_proj"):
            linear(f"{layer}mlp.{part}", inner, width, bias=False)
        linear(layer + "mlp.down_proj", width, inner, bias=False)
        for part in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            put(f"{layer}{part}_layernorm.weight", (width,), -3)
    # large and of both signs: logits of order 30, and a tied head that does not just repeat the token it reads
    put("model.norm.weight", (width,), 3)


def frames(stream: str, count: int, side: int = 22) -> np.ndarray:
    """uint8 (count, 3, side, side)"""
    pixels = words(f"frames {stream}", count * 3 * side * side) >> np.uint64(56)
    return pixels.astype(np.uint8).reshape(count, 3, side, side)


def mel(stream: str, pieces: int, bins: int = 4, length: int = 40) -> np.ndarray:
    """float32 (pieces, bins, length)"""
    return gaussianish(f"mel {stream}", (pieces, bins, length), -1)


def ids_of(stream: str, count: int, image_at: int | None, bos: int = 2) -> np.ndarray:
    """bos, then ids from 3 to 106, with the placeholder at place `image_at` if any; int64 (count,)"""
    ids = (words(f"ids {stream}", count) % np.uint64(104)).astype(np.int64) + 3
    ids[0] = bos
    if image_at is not None:
        ids[image_at] = -200
    return ids


def text_of(*rows: np.ndarray, pad: int = 0) -> dict[str, np.ndarray]:
    """Rows right-padded with id `pad` to one length, and their mask."""
    longest = max(len(row) for row in rows)
    padded = [np.pad(row, (0, longest - len(row)), constant_values=pad) for row in rows]
    mask = [np.arange(longest) < len(row) for row in rows]
    return {"inputs.input_ids": np.stack(padded), "inputs.attention_mask": np.stack(mask)}


def noise(stream: str, length: int) -> np.ndarray:
    """Training's position noise, float64, about normal·0.45, cut at ±0.45 (spec §5)."""
    return np.clip(gaussianish(f"noise {stream}", (length,), 0).astype(np.float64) * 0.45, -0.45, 0.45)


def cases() -> dict[str, Recipe]:
    """Every small case by name."""
    videos = {"inputs.images_u8.0": frames("a", 2), "inputs.images_u8.1": frames("b", 1)}
    # 29 positions, 5 tokens; 13 positions, 2 tokens, and a third window that straddles the end (positions 10 to 14)
    audios = {
        "inputs.audios.0": mel("a", 2),
        "inputs.audios.1": mel("b", 1),
        "inputs.audio_sizes": np.array([58, 27], np.int64),
    }
    text = text_of(ids_of("long", 9, 2), ids_of("short", 6, 1))
    made = [
        Recipe(
            "base", "two videos of unlike length, right-padded text, two audio pieces", config(), videos | audios | text
        ),
        Recipe(
            "budget",
            "the frames of all videos together pass the token budget, no video alone does: 12 -> 10",
            config(visual_token_budget=80),
            videos | audios | text,
        ),
        Recipe(
            "pervideo",
            "a budget for each video: the first is resized, the second is not, grids of 5×5 and 6×6",
            config(visual_token_budget=50, budget_scope="video"),
            videos | text,
        ),
        Recipe(
            "holes",
            "left padding in one row, holes and right padding in the other",
            config(),
            videos | audios | _holed(),
        ),
        Recipe(
            "oneframe",
            "one frame and one audio token stand at position 0; no attention mask at all",
            config(),
            {
                "inputs.images_u8.0": frames("c", 1),
                "inputs.audios.0": mel("c", 1),
                "inputs.audio_sizes": np.array([13], np.int64),
                "inputs.input_ids": ids_of("one", 7, 3)[None],
            },
        ),
        Recipe(
            "noaudio",
            "no sample has one whole audio token, so that there is no audio stream",
            config(),
            videos | audios | {"inputs.audio_sizes": np.array([9, 6], np.int64)} | text,
        ),
        Recipe("novideo", "no frames in the whole batch", config(), audios | text),
        Recipe(
            "absent",
            "all-zero mel, all-zero frames, and audio shorter than a token, a sample each",
            config(),
            absent(),
        ),
        Recipe("train", "position noise and labels", config(), _training()),
        Recipe(
            "decode",
            "batched greedy decoding from right-padded prompts past the window; a row stops at 107 before the other",
            config(),
            videos | audios | text_of(ids_of("prompt a23", 7, 1), ids_of("prompt b29", 4, 2)),
            decode_steps=8,
        ),
        _odd(),
        _odd_one(),
    ]
    return {recipe.name: recipe for recipe in made}


def _holed() -> dict[str, np.ndarray]:
    ids = np.stack([np.concatenate([np.zeros(3, np.int64), ids_of("left", 8, 2)]), ids_of("holes", 11, 4)])
    mask = np.stack([np.arange(11) >= 3, ~np.isin(np.arange(11), [2, 6, 7, 10])])
    return {"inputs.input_ids": ids, "inputs.attention_mask": mask}


def absent(bos: int = 2) -> dict[str, np.ndarray]:
    """Frames or sound that are all zero, or too short for a token, a sample each."""
    return {
        "inputs.images_u8.0": frames("d", 1),
        "inputs.images.1": np.zeros((1, 3, 22, 22), np.float32),
        "inputs.images_u8.2": frames("e", 1),
        "inputs.audios.0": np.zeros((1, 4, 40), np.float32),
        "inputs.audios.1": mel("d", 1),
        "inputs.audios.2": mel("e", 1),
        "inputs.audio_sizes": np.array([40, 31, 7], np.int64),
    } | text_of(ids_of("quiet", 5, 1, bos), ids_of("dark", 7, 2, bos), ids_of("brief", 6, 3, bos))


def _training() -> dict[str, np.ndarray]:
    ids = ids_of("train", 9, 2)[None]
    return {
        "inputs.images_u8.0": frames("a", 2),
        "inputs.audios.0": mel("a", 2),
        "inputs.audio_sizes": np.array([58], np.int64),
        "inputs.input_ids": ids,
        "inputs.attention_mask": np.ones((1, 9), bool),
        "inputs.labels": np.where(np.arange(9) < 5, -100, ids),
        "inputs.pos_noise.h": noise("h", 6),
        "inputs.pos_noise.w": noise("w", 6),
        "inputs.pos_noise.t_v.0": noise("t_v", 2),
        "inputs.pos_noise.t_a.0": noise("t_a", 5),
    }


def _odd_media() -> dict[str, np.ndarray]:
    side, bins, length = 40, 6, 28
    return {
        "inputs.images_u8.0": frames("odd a", 2, side),
        "inputs.images_u8.1": frames("odd b", 1, side),
        # 22 positions, 7 tokens; 11 positions, 3 tokens and a window that straddles the end
        "inputs.audios.0": mel("odd a", 2, bins, length),
        "inputs.audios.1": mel("odd b", 1, bins, length),
        "inputs.audio_sizes": np.array([45, 22], np.int64),
    }


def _odd_ids(stream: str, count: int, image_at: int) -> np.ndarray:
    """As `_ids`, of the odd vocabulary: ids from 6 to 85."""
    ids = ids_of(stream, count, image_at) % 80 + 6
    ids[0], ids[image_at] = 5, -77
    return ids


def _odd() -> Recipe:
    text = text_of(_odd_ids("odd a124", 10, 1), _odd_ids("odd b26", 7, 4), pad=1)
    return Recipe(
        "odd",
        "no number of the configuration is the release's or another case's; decoding past another window to another stop",
        odd_config(),
        _odd_media() | text,
        decode_steps=7,
        weights_file="odd.safetensors",
    )


def _odd_one() -> Recipe:
    """Left padding and a hole in the mask of a prompt that is decoded from, alone."""
    media = {name: value for name, value in _odd_media().items() if not name.endswith(".1")}
    ids = np.concatenate([np.ones(3, np.int64), _odd_ids("odd one 161", 9, 3)])
    mask = ~np.isin(np.arange(12), [0, 1, 2, 7, 8])
    return Recipe(
        "oddone",
        "the odd configuration with one sample: left padding and holes in a prompt, and the fast path's fused step",
        odd_config(),
        media
        | {
            "inputs.audio_sizes": media["inputs.audio_sizes"][:1],
            "inputs.input_ids": ids[None],
            "inputs.attention_mask": mask[None],
        },
        decode_steps=6,
        weights_file="odd.safetensors",
    )
