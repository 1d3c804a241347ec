import os

import torch
import torch._dynamo
from stagetrace import tap

from vidi.checkpoint import names
from vidi.config import VidiConfig
from vidi.model import VidiModel
from vidi.parity.feed import batch_of
from vidi.parity.trace import Recorded

BACKEND = os.environ.get("COMPILED_PORT_BACKEND", "inductor")


def build(config, weights):
    config = VidiConfig.from_official(config)
    model = VidiModel(config)
    ours = {names.our_name(name, config): torch.from_numpy(x) for name, x in weights.items()}
    model.load_state_dict({name: x for name, x in ours.items() if name is not None})
    for module in (model.vision_tower, model.audio_tower, model.bridge.image_projector, model.bridge.audio_projector):
        compile_step(module, "forward")
    for layer in model.decoder.layers:
        for step in ("text_to_text", "merge", "update_stream"):
            compile_step(layer, step)
    return model


def compile_step(module, step):
    setattr(module, step, torch.compile(getattr(module, step), backend=BACKEND))


@torch.no_grad()
def forward(model, inputs):
    tap("pos.freq", model.bridge.pos_h.freq_K)
    recorded = Recorded(model.config.decoder, tap)
    given = {f"inputs.{name}": x for name, x in inputs.items()}
    given |= {n.replace("_u8", ""): x / 127.5 - 1 for n, x in given.items() if "images_u8" in n}
    model(batch_of(given), last_stream=True, tap=recorded)
    recorded.beside_attention()
    if not torch._dynamo.utils.counters["frames"]["ok"]:
        raise RuntimeError("nothing was compiled")


STAGES = {}  # the model hands every stage to a tap of its own
