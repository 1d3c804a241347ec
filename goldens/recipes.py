"""The small cases, as recipes: one small checkpoint and ten inputs, made of integers, so that their bits depend on
neither library nor machine. The oracle turns each into a golden of every stage; nothing is stored here.

The sizes are chosen so that what the recordings of the release leave untested bites:

    width 24               sqrt(24) is exact in no float format
    4 heads of 4           16 is not the width; scale 6^-0.5 is not 4^-0.5; 2 query heads share a kv head
    window 3               4 keys, less than any prompt but the shortest
    gains of q, k, norm    attention scores of order 50, logits of order 30: both softcaps bend
    image 22, patch 2      11 patches a side, padded to 12, 6×6 tokens; a resize goes to 10, 5×5 tokens
    20 audio positions     a piece is 40 mel frames and 4 tokens
    3 layers               0 and 2 slide, 1 does not; the last layer's stream update feeds nothing
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "POS_FREQ", "TOWERS", "VOCABULARY", "WIDTH", "Checkpoint", "Recipe", "absent", "cases", "config", "frames", "gaussianish",
    "ids_of", "mel", "noise", "put_bridge", "put_mlp", "put_towers", "text_of", "weights", "words",
]  # fmt: skip

WIDTH = 24
VOCABULARY = 112

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


@dataclass(frozen=True)
class Recipe:
    """One small case. `config` is an official config.json with the towers' configs inside, `inputs` are named as in the
    recordings, `decode_steps` > 0 asks for greedy tokens too; `why` says what only this case sees."""

    name: str
    why: str
    config: Mapping[str, Any]
    inputs: Mapping[str, np.ndarray]
    decode_steps: int = 0


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


TOWERS: dict[str, Any] = {
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
_CONFIG: dict[str, Any] = {
    "model_type": "dattn_gemma2",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
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
    **TOWERS,
}


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


def weights() -> dict[str, np.ndarray]:
    """The small checkpoint, float32, official names (lm_head is tied and absent, as in saved files)."""
    made = Checkpoint()
    put_towers(made)
    made.put("model.mm_rand_aud_pool.weight", (WIDTH, 8, 5), -3)
    put_bridge(made, visual=32, audio=WIDTH)
    _put_decoder(made)
    return made.tensors


def put_towers(made: Checkpoint) -> None:
    """SigLIP of 3 layers and Whisper of 2, both 8 wide."""
    root = "model.mm_vis.vision_model."
    made.put(root + "embeddings.patch_embedding.weight", (8, 3, 2, 2), -1)
    made.put(root + "embeddings.patch_embedding.bias", (8,), -3)
    made.put(root + "embeddings.position_embedding.weight", (121, 8), -1)
    for i in range(3):
        layer = f"{root}encoder.layers.{i}."
        for part in ("q_proj", "k_proj"):
            made.linear(f"{layer}self_attn.{part}", 8, 8, log2_gain=1)
        for part in ("v_proj", "out_proj"):
            made.linear(f"{layer}self_attn.{part}", 8, 8)
        made.norm(layer + "layer_norm1", 8)
        made.norm(layer + "layer_norm2", 8)
        made.linear(layer + "mlp.fc1", 16, 8)
        made.linear(layer + "mlp.fc2", 8, 16)
    made.norm(root + "post_layernorm", 8)
    made.put(root + "head.probe", (1, 1, 8), 0)
    made.put(root + "head.attention.in_proj_weight", (24, 8), -2)
    made.put(root + "head.attention.in_proj_bias", (24,), -3)
    made.linear(root + "head.attention.out_proj", 8, 8)
    made.norm(root + "head.layernorm", 8)
    made.linear(root + "head.mlp.fc1", 16, 8)
    made.linear(root + "head.mlp.fc2", 8, 16)

    root = "model.mm_aud.encoder."
    made.put(root + "conv1.weight", (8, 4, 3), -2)
    made.put(root + "conv1.bias", (8,), -3)
    made.put(root + "conv2.weight", (8, 8, 3), -2)
    made.put(root + "conv2.bias", (8,), -3)
    made.put(root + "embed_positions.weight", (20, 8), -1)
    for i in range(2):
        layer = f"{root}layers.{i}."
        made.linear(layer + "self_attn.k_proj", 8, 8, log2_gain=1, bias=False)
        made.linear(layer + "self_attn.q_proj", 8, 8, log2_gain=1)
        made.linear(layer + "self_attn.v_proj", 8, 8)
        made.linear(layer + "self_attn.out_proj", 8, 8)
        made.norm(layer + "self_attn_layer_norm", 8)
        made.linear(layer + "fc1", 16, 8)
        made.linear(layer + "fc2", 8, 16)
        made.norm(layer + "final_layer_norm", 8)
    made.norm(root + "layer_norm", 8)


def put_bridge(made: Checkpoint, visual: int, audio: int) -> None:
    """Projectors from the given widths, norms, position MLPs."""
    for kind, width in (("img", visual), ("aud", audio)):
        made.linear(f"model.mm_rand_{kind}_projector.model.0", WIDTH, width)
        made.linear(f"model.mm_rand_{kind}_projector.model.2", WIDTH, WIDTH)
        made.put(f"model.mm_rand_{kind}_norm.weight", (WIDTH,), -3, around=1.0)
    made.put("model.mm_rand_llm_norm.weight", (WIDTH,), -5, around=0.25)
    for axis in "hwt":
        made.linear(f"model.mm_rand_pos_{axis}.mlp.0", WIDTH, WIDTH)
        made.linear(f"model.mm_rand_pos_{axis}.mlp.2", WIDTH, WIDTH)


def _put_decoder(made: Checkpoint) -> None:
    made.put("model.embed_tokens.weight", (VOCABULARY, WIDTH), -2)
    for i in range(3):
        layer = f"model.layers.{i}."
        made.linear(layer + "self_attn.q_proj", 16, WIDTH, log2_gain=2, bias=False)
        made.linear(layer + "self_attn.k_proj", 8, WIDTH, log2_gain=1, bias=False)
        made.linear(layer + "self_attn.v_proj", 8, WIDTH, bias=False)
        made.linear(layer + "self_attn.o_proj", WIDTH, 16, bias=False)
        put_mlp(made, layer)
        for part in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            made.put(f"{layer}{part}_layernorm.weight", (WIDTH,), -3)
    # large and of both signs: logits of order 30, and a tied head that does not just repeat the token it reads
    made.put("model.norm.weight", (WIDTH,), 3)


def put_mlp(made: Checkpoint, layer: str) -> None:
    """A decoder layer's feed-forward, 32 wide."""
    for part in ("gate_proj", "up_proj"):
        made.linear(f"{layer}mlp.{part}", 32, WIDTH, bias=False)
    made.linear(layer + "mlp.down_proj", WIDTH, 32, bias=False)


def frames(stream: str, count: int) -> np.ndarray:
    """uint8 (count, 3, 22, 22)"""
    return (words(f"frames {stream}", count * 3 * 22 * 22) >> np.uint64(56)).astype(np.uint8).reshape(count, 3, 22, 22)


def mel(stream: str, pieces: int) -> np.ndarray:
    """float32 (pieces, 4, 40)"""
    return gaussianish(f"mel {stream}", (pieces, 4, 40), -1)


def ids_of(stream: str, count: int, image_at: int | None, bos: int = 2) -> np.ndarray:
    """bos, then ids from 3 to 106, with the placeholder at place `image_at` if any; int64 (count,)"""
    ids = (words(f"ids {stream}", count) % np.uint64(104)).astype(np.int64) + 3
    ids[0] = bos
    if image_at is not None:
        ids[image_at] = -200
    return ids


def text_of(*rows: np.ndarray) -> dict[str, np.ndarray]:
    """Rows right-padded with id 0 to one length, and their mask."""
    longest = max(len(row) for row in rows)
    padded = [np.pad(row, (0, longest - len(row))) for row in rows]
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
    ]
    return {recipe.name: recipe for recipe in made}


def _holed() -> dict[str, np.ndarray]:
    ids = np.stack([np.concatenate([np.zeros(3, np.int64), ids_of("left", 8, 2)]), ids_of("holes", 11, 4)])
    mask = np.stack([np.arange(11) >= 3, ~np.isin(np.arange(11), [2, 6, 7, 10])])
    return {"inputs.input_ids": ids, "inputs.attention_mask": mask}


def absent(bos: int = 2) -> dict[str, np.ndarray]:
    """Three samples: all-zero mel, all-zero frames, audio shorter than a token."""
    rows = [ids_of(name, count, at, bos) for name, count, at in (("quiet", 5, 1), ("dark", 7, 2), ("brief", 6, 3))]
    return {
        "inputs.images_u8.0": frames("d", 1),
        "inputs.images.1": np.zeros((1, 3, 22, 22), np.float32),
        "inputs.images_u8.2": frames("e", 1),
        "inputs.audios.0": np.zeros((1, 4, 40), np.float32),
        "inputs.audios.1": mel("d", 1),
        "inputs.audios.2": mel("e", 1),
        "inputs.audio_sizes": np.array([40, 31, 7], np.int64),
    } | text_of(*rows)


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
