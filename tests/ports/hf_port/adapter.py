import torch
from model import load
from stagetrace import call


def build(config, weights):
    return load(config, {name: torch.from_numpy(x) for name, x in weights.items()})


def forward(model, inputs):
    given = {name: torch.from_numpy(x) for name, x in inputs.items()}
    given |= {f"images.{n[10:]}": x / 127.5 - 1 for n, x in given.items() if n.startswith("images_u8.")}
    samples = range(len(given["input_ids"]))
    videos, sounds = ([given.get(f"{n}.{b}", torch.zeros(0)) for b in samples] for n in ("images", "audios"))
    with torch.inference_mode():
        return model(given["input_ids"], videos, sounds, *map(given.get, ("attention_mask", "audio_sizes", "pos_freq")))


def along(*axes):  # calls of `add` whose second argument is longer than 1 along these axes
    return lambda args, kwargs: [n > 1 for n in args[1].shape[1:-1]] == list(axes)


ATTEND, HEADS = "model.layers.{i}.self_attn.attend", "B G L H -> B (G r) L H"
ALIASES = {"model.mm_vis.vision_model.*": "model.mm_vis.*"}
STAGES = {
    "vision.tower": call("model.see", join=0),
    "vision.pad": call("model.pad", join=0),
    "vision.space_to_depth": call("model.fold", join=0),
    "vision.projector": "model.mm_rand_img_projector",
    "vision.norm": "model.mm_rand_img_norm",
    "vision.pos_h": call("model.add", when=along(True, False)),
    "vision.pos_w": call("model.add", when=along(False, True)),
    "vision.pos_t": call("model.add", when=along(False, False), join=0),
    "audio.tower": "model.hear",
    "audio.pool": "model.mm_rand_aud_pool",
    "audio.projector": "model.mm_rand_aud_projector",
    "audio.norm": "model.mm_rand_aud_norm",
    "audio.pos_t": call("model.add", when=along(), join=0),
    "layer.{i}.t2t": "model.layers.{i}.self_attn.to_text",
    "layer.{i}.t2{m}": call("model.layers.{i}.self_attn.to_stream", order="m"),
    "layer.{i}.output": call("model.layers.{i}", item=0),
    "xattn.{i}.{m}.q": call(ATTEND, arg=0, order="m"),
    "xattn.{i}.{m}.k": call(ATTEND, arg=1, order="m", layout=HEADS),
    "xattn.{i}.{m}.v": call(ATTEND, arg=2, order="m", layout=HEADS),
    "xattn.{i}.{m}.out": call(ATTEND, order="m"),
    "final.norm": "model.norm",
    "logits": "head",
}
