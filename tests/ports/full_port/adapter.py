"""Our own plain path as a port of any size, on a GPU where there is one: every stage goes through its tap."""

import torch
from stagetrace import tap

from vidi.checkpoint.load import load
from vidi.inputs.batch import Batch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(config, weights):
    model = load(weights.folder, device=DEVICE, dtype=getattr(torch, config["dtype"]))
    plant(model)
    return model


def plant(model):
    pass


@torch.no_grad()
def forward(model, inputs):
    ids, images, sound = (torch.from_numpy(inputs[name]) for name in ("input_ids", "images_u8.0", "audios.0"))
    model.frame_chunk = len(images)  # each stage in one piece
    batch = Batch(ids, None, (images,), (sound,), tuple(inputs["audio_sizes"].tolist()))
    weight = next(model.parameters())
    model(batch.to(weight.device, weight.dtype), tap=tap)


STAGES = {}  # the model hands every stage to the tap
