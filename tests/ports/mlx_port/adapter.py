"""Vidi in MLX under the port doctor: `vidi port run adapter.py --python PY`, PY having mlx and numpy."""

import mlx.core as mx
import numpy as np
from model import load
from stagetrace import call

HEADS = "B T N H -> B N T H"
REPEATED = "B L G H -> B (G r) L H"


def build(config, weights):
    return load(config, weights)


def forward(model, inputs):
    ids, samples = inputs["input_ids"], range(len(inputs["audio_sizes"]))
    keep = inputs.get("attention_mask", np.ones(ids.shape, bool))
    videos, sounds = ([mx.array(np.moveaxis(inputs[f"{n}.{b}"], 1, -1)) for b in samples] for n in ("images", "audios"))
    logits = model(ids, keep, videos, sounds, inputs["audio_sizes"].tolist(), mx.array(inputs["pos_freq"]))
    mx.eval(logits)  # MLX is lazy: a run that nobody looks at computes nothing, and would be timed as free


CROSS = "model.layers.{i}.self_attn.to_stream"
STAGES = {
    "vision.tower": "model.mm_vis",
    "vision.space_to_depth": call("model:space_to_depth", layout="F h w C -> F C h w"),
    "vision.projector": "model.mm_rand_img_projector",
    "vision.norm": "model.mm_rand_img_norm",
    "vision.llm_norm": call("model.visual", item=0),
    "audio.tower": "model.mm_aud.encoder",
    "audio.pool": call("model.mm_rand_aud_pool", layout="B A D -> B D A"),
    "audio.projector": "model.mm_rand_aud_projector",
    "audio.norm": "model.mm_rand_aud_norm",
    "audio.llm_norm": call("model.audio", item=0),
    "layer.{i}.input": call("model.layers.{i}", arg=0),
    "layer.0.image_input": call("model.layers.0", arg=1),
    "layer.0.audio_input": call("model.layers.0", arg=2),
    "layer.{i}.t2t": "model.layers.{i}.self_attn.text_to_text",
    "xattn.{i}.{m}.q": call(CROSS, arg=0, order="m", layout=HEADS),
    "xattn.{i}.{m}.k": call(CROSS, arg=1, order="m", layout=REPEATED),
    "xattn.{i}.{m}.v": call(CROSS, arg=2, order="m", layout=REPEATED),
    "xattn.{i}.{m}.q_mask": call(CROSS, arg=3, order="m"),
    "xattn.{i}.{m}.kv_mask": call(CROSS, arg=4, order="m"),
    "xattn.{i}.{m}.out": call(CROSS, order="m"),
    "layer.{i}.t2{m}": call("model.layers.{i}.self_attn.text_to_stream", order="m"),
    "layer.{i}.t2{m}.gate": call("model.layers.{i}.self_attn.gate", order="m"),
    "layer.{i}.output": call("model.layers.{i}", item=0),
    "layer.{i}.image_stream": call("model.layers.{i}", item=1),
    "layer.{i}.audio_stream": call("model.layers.{i}", item=2),
    "final.norm": "model.norm",
    "logits": "logits",
}
