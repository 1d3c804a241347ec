"""Our own model as if it were foreign: reached by hooks alone, none of its own tap. A test puts its bug into `plant`."""

import torch
from stagetrace import call

from vidi.checkpoint import names
from vidi.config import VidiConfig
from vidi.inputs.batch import Batch
from vidi.model import VidiModel


def build(config, weights):
    dtype = getattr(torch, config.pop("dtype"))
    config = VidiConfig.from_official(config)
    model = VidiModel(config)
    ours = {names.our_name(name, config): torch.from_numpy(x.copy()) for name, x in weights.items()}
    model.load_state_dict({name: x for name, x in ours.items() if name is not None})
    plant(model)
    return model.to(dtype).eval()


def plant(model):
    pass


@torch.no_grad()
def forward(model, inputs):
    given = {name: torch.from_numpy(x) for name, x in inputs.items()}
    model(
        Batch(
            given["input_ids"], keep_BT=given["attention_mask"], images=(given["images.0"],), audios=(given["audios.0"],),
            audio_sizes=(int(inputs["audio_sizes"][0]),),
        ),
        last_stream=True,
    )  # fmt: skip


STAGES = {
    "vision.projector": "bridge.image_projector",
    "vision.norm": "bridge.image_norm",
    "audio.projector": "bridge.audio_projector",
    "text.embeds": "decoder.embed_tokens",
    "layer.{i}.input": call("decoder.layers.{i}", arg=0),
    "layer.{i}.output": "decoder.layers.{i}",
    "layer.{i}.t2t": "decoder.layers.{i}.text_to_text",
    "layer.{i}.t2{m}": call("decoder.layers.{i}.text_to_stream", order="m"),
    "logits": "decoder.logits",
}
