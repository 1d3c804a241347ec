"""Recordings in the release's own format for a model of other sizes, made by the oracle.

Width 32, 3 query heads over 1 kv head of 8, 5 layers, window 5, an even patch grid (10 a side, so no padding), one vision
layer that runs, one audio layer; three cases, each with its own subset of what a recording can hold.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from goldens.oracle import forward, greedy, teacher_forced
from stageparity import store
from stageparity.golden import stats_of
from vidi.checkpoint import names
from vidi.config import VidiConfig
from vidi.parity.goldens import goldens_dir

__all__ = ["CONFIG", "record", "record_7b"]

VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 3, "num_channels": 3, "patch_size": 3, "image_size": 30, "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
AUDIO = {
    "model_type": "whisper", "d_model": 10, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 14,
    "num_mel_bins": 6, "max_source_positions": 30, "activation_function": "gelu",
}  # fmt: skip
CONFIG = {
    "model_type": "dattn_gemma2", "vocab_size": 130, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 5,
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 9,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 8192, "pad_token_id": 0, "bos_token_id": 2,
    "eos_token_id": 107, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_image_pool_size": 2,
    "mm_audio_pool_size": 5, "mm_input_type": "video", "mm_image_aspect_ratio": "resize", "mm_time_interval": 10000,
    "mm_std": 0.028976401314139366, "mm_splits": 4, "tie_word_embeddings": True,
}  # fmt: skip
MOST = 3000  # elements of a tensor that is recorded whole


def record(folder: Path) -> None:
    """Write `pair` (two samples, padded), `tell` (decoding under a window of its own) and `cost` (losses, no gradients)."""
    folder.mkdir(parents=True)
    weights, rng = _weights(), np.random.default_rng(21)
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].copy()}
    save_file(weights | head, folder / "weights.safetensors")
    run: dict[str, Any] = {"casts": "cast", "pos_freq": _position_table(32)}
    config = CONFIG | {"vision_config": VISION, "audio_config": AUDIO}

    inputs = _pair(rng)
    stages = forward(config, weights, inputs, **run)
    del stages["pos.freq"]
    shown = {f"inputs.images.{b}": _pixels(inputs[f"inputs.images_u8.{b}"]) for b in range(2)}
    _write(folder, "pair", inputs | shown | stages, {"vision_resized": False, "vision_hw": [10, 10]})

    one = {
        "inputs.images.0": _pixels(inputs["inputs.images_u8.0"]), "inputs.audios.0": inputs["inputs.audios.0"],
        "inputs.audio_sizes": np.array([95]),
    }  # fmt: skip
    prompt = {"inputs.input_ids": _ids(rng, 9, 4)[None]}
    wide = config | {"sliding_window": 12}
    tokens = greedy(wide, weights, one | prompt, 7, **run).tokens_BS
    forced = teacher_forced(wide, weights, one | prompt, tokens, **run)
    tell = one | {"tell.prompt_ids": prompt["inputs.input_ids"], "tell.tokens": tokens, "tell.nocache.logits": forced}
    tell |= {"inputs.input_ids": _ids(rng, 6, 1)[None], "inputs.attention_mask": np.ones((1, 6), bool)}
    _write(folder, "tell", tell | {"tell.logits": forced + 1}, {"generate": {"tell": {"window": 12}}})

    labels = np.where(np.arange(11) < 5, -100, inputs["inputs.input_ids"])
    thresholds = {"none": None, "high": 1e6}
    lost = forward(config, weights, inputs | {"inputs.labels": labels}, thresholds=thresholds, **run)
    flat = {"logits": lost["logits"].reshape(-1, 130), "text.labels": lost["text.labels"]}
    flat |= {f"loss.{name}": lost[f"loss.{name}"].reshape(-1) for name in ("per_token", "none", "high")}
    _write(folder, "cost", inputs | {"inputs.labels": labels} | flat, {"loss_thres": thresholds})


def _pixels(u8: np.ndarray) -> np.ndarray:
    return u8.astype(np.float32) / np.float32(127.5) - np.float32(1)


def record_7b(folder: Path, image_pool: int, audio_pool: int) -> None:
    """`pair` of a 7B with these pools: 6 query heads over 2 kv heads of 10 (60 where the width is 32), 5 layers, window 5."""
    folder.mkdir(parents=True)
    config = store.open_case(goldens_dir() / "official-7b", "batch").config | {
        "vocab_size": 130, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 5, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 10, "sliding_window": 5, "mm_image_pool_size": image_pool,
        "mm_audio_pool_size": audio_pool, "mm_time_interval": 7000, "vision_config": VISION, "audio_config": AUDIO,
    }  # fmt: skip
    rng, weights = np.random.default_rng(31), {}
    for name, want in names.expected(VidiConfig.from_official(config)).items():
        around = float(len(want.shape) == 1 and name.endswith("weight"))  # norms
        drawn = around + rng.standard_normal(want.shape) * want.shape[-1] ** -0.5 * (0.3 if around else 1)
        weights[name] = drawn.astype(np.float32)
    save_file(weights, folder / "weights.safetensors")
    inputs = _pair(rng)
    stages = forward(config, weights, inputs, casts="cast", pos_freq=_position_table(32))
    del stages["pos.freq"]
    shown = {f"inputs.images.{b}": _pixels(inputs[f"inputs.images_u8.{b}"]) for b in range(2)}
    _write(folder, "pair", inputs | shown | stages, {}, config)


def _ids(rng: np.random.Generator, length: int, place: int) -> np.ndarray:
    row = rng.integers(3, 107, length)
    row[0], row[place] = 2, -200
    return row


def _pair(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Two samples, the second padded."""

    def video(frames: int) -> np.ndarray:
        return rng.integers(0, 256, (frames, 3, 30, 30)).astype(np.uint8)

    def mel(pieces: int) -> np.ndarray:
        return rng.standard_normal((pieces, 6, 60)).astype(np.float32)

    return {
        "inputs.input_ids": np.stack([_ids(rng, 11, 3), np.pad(_ids(rng, 7, 2), (0, 4))]),
        "inputs.attention_mask": np.arange(11)[None] < np.array([[11], [7]]),
        "inputs.images_u8.0": video(4), "inputs.images_u8.1": video(2),
        "inputs.audios.0": mel(2), "inputs.audios.1": mel(1), "inputs.audio_sizes": np.array([95, 41]),
    }  # fmt: skip


def _position_table(width: int) -> np.ndarray:
    """As torch computes it here (width / 2,)."""
    return torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-np.log(10000.0) / width)).numpy()


def _write(
    folder: Path,
    name: str,
    tensors: Mapping[str, np.ndarray],
    info: Mapping[str, Any],
    config: Mapping[str, Any] = CONFIG,
) -> None:
    """CASE.f32.safetensors and .json: real values in float32, large ones as sample, row sums and statistics."""
    listed: dict[str, Any] = {}
    stored: dict[str, np.ndarray] = {}
    for stage, value in tensors.items():
        x = np.ascontiguousarray(value, np.float32 if value.dtype.kind == "f" else None)
        listed[stage] = {
            "shape": list(x.shape), "dtype": x.dtype.name, "sha256": hashlib.sha256(x.tobytes()).hexdigest(),
            "stored": "full",
        }  # fmt: skip
        if x.size <= MOST or x.dtype.kind != "f" or stage.startswith("inputs."):
            stored[stage] = x
            continue
        axis = int(np.argmax(x.shape))
        index = np.unique(np.linspace(0, x.shape[axis] - 1, 5).astype(np.int64))
        listed[stage] |= {"stored": "sample", "sample_axis": axis}
        others = tuple(a for a in range(x.ndim) if a != axis)
        stored |= {
            f"{stage}.sample": np.ascontiguousarray(np.take(x, index, axis=axis)), f"{stage}.sample_index": index,
            f"{stage}.row_sum": x.astype(np.float64).sum(axis=others), f"{stage}.stats": stats_of(x),
        }  # fmt: skip
    body = {
        "case": name, "dtype": "f32", "info": info, "seed": 21, "args": {"threads": 1}, "torch": torch.__version__,
        "transformers": "none", "numpy": np.__version__,
        "llm_config": {key: x for key, x in config.items() if key not in ("vision_config", "audio_config")},
        "vision_config": VISION, "audio_config": AUDIO, "tensors": listed,
    }  # fmt: skip
    save_file(stored, folder / f"{name}.f32.safetensors")
    (folder / f"{name}.f32.json").write_text(json.dumps(body))


def _weights() -> dict[str, np.ndarray]:
    """Official names and shapes, every value drawn; weights of norms around their neutral value."""
    rng, made = np.random.default_rng(22), {}

    def put(name: str, *shape: int, around: float = 0.0) -> None:
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.125
        made[name] = (around + scale * rng.standard_normal(shape)).astype(np.float32)

    def linear(name: str, out: int, inner: int, bias: bool = True) -> None:
        put(f"{name}.weight", out, inner)
        if bias:
            put(f"{name}.bias", out)

    def norm(name: str, size: int) -> None:
        put(f"{name}.weight", size, around=1.0)
        put(f"{name}.bias", size)

    root = "model.mm_vis.vision_model."
    put(root + "embeddings.patch_embedding.weight", 12, 3, 3, 3)
    put(root + "embeddings.patch_embedding.bias", 12)
    put(root + "embeddings.position_embedding.weight", 100, 12)
    for i in range(2):
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{root}encoder.layers.{i}.self_attn.{part}", 12, 12)
        norm(f"{root}encoder.layers.{i}.layer_norm1", 12)
        norm(f"{root}encoder.layers.{i}.layer_norm2", 12)
        linear(f"{root}encoder.layers.{i}.mlp.fc1", 20, 12)
        linear(f"{root}encoder.layers.{i}.mlp.fc2", 12, 20)
    norm(root + "post_layernorm", 12)
    put(root + "head.probe", 1, 1, 12)
    put(root + "head.attention.in_proj_weight", 36, 12)
    put(root + "head.attention.in_proj_bias", 36)
    linear(root + "head.attention.out_proj", 12, 12)
    norm(root + "head.layernorm", 12)
    linear(root + "head.mlp.fc1", 20, 12)
    linear(root + "head.mlp.fc2", 12, 20)
    root = "model.mm_aud.encoder."
    for name, inner in (("conv1", 6), ("conv2", 10)):
        put(f"{root}{name}.weight", 10, inner, 3)
        put(f"{root}{name}.bias", 10)
    put(root + "embed_positions.weight", 30, 10)
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        linear(f"{root}layers.0.self_attn.{part}", 10, 10, bias=part != "k_proj")
    norm(root + "layers.0.self_attn_layer_norm", 10)
    norm(root + "layers.0.final_layer_norm", 10)
    linear(root + "layers.0.fc1", 14, 10)
    linear(root + "layers.0.fc2", 10, 14)
    norm(root + "layer_norm", 10)
    for name, inner in (("img", 48), ("aud", 32)):
        linear(f"model.mm_rand_{name}_projector.model.0", 32, inner)
        linear(f"model.mm_rand_{name}_projector.model.2", 32, 32)
        put(f"model.mm_rand_{name}_norm.weight", 32, around=1.0)
    put("model.mm_rand_aud_pool.weight", 32, 10, 5)
    put("model.mm_rand_llm_norm.weight", 32, around=0.25)
    for axis in "hwt":
        linear(f"model.mm_rand_pos_{axis}.mlp.0", 32, 32)
        linear(f"model.mm_rand_pos_{axis}.mlp.2", 32, 32)
    put("model.embed_tokens.weight", 130, 32)
    for i in range(5):
        layer = f"model.layers.{i}."
        for part, out, inner in (("q", 24, 32), ("k", 8, 32), ("v", 8, 32), ("o", 32, 24)):
            put(f"{layer}self_attn.{part}_proj.weight", out, inner)
        for part, out, inner in (("gate", 40, 32), ("up", 40, 32), ("down", 32, 40)):
            put(f"{layer}mlp.{part}_proj.weight", out, inner)
        for part in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            put(f"{layer}{part}_layernorm.weight", 32)
    put("model.norm.weight", 32)
    return made
