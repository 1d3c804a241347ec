"""Three ONNX graphs under the port doctor: `vidi port run adapter.py --python PY`, PY having onnxruntime and numpy.

A graph takes back nothing that lies inside it, so its inner stages are shown (back=False) and judged by what feeds them.
"""

from pathlib import Path

import numpy as np
import onnxruntime as ort
from stagetrace import call

HERE = Path(__file__).parent
INSIDE = {
    "bridge": (
        "vision.pad", "vision.space_to_depth", "vision.projector", "vision.norm", "vision.pos_h.embed", "vision.pos_h",
        "vision.pos_w.embed", "vision.pos_w", "vision.pos_t.embed.0", "vision.pos_t", "vision.packed", "vision.mask",
    ),
    "layer": ("layer.0.t2t", "layer.0.t2v", "layer.0.t2a"),
}  # fmt: skip
GIVEN = {
    "tower": ("vision.tower",),
    "bridge": ("vision.llm_norm",),
    "layer": ("layer.0.output", "layer.0.image_stream", "layer.0.audio_stream"),
}


class Graph:
    def __init__(self, name):
        self.session = ort.InferenceSession(HERE / f"{name}.onnx", providers=["CPUExecutionProvider"])
        self.outputs = [output.name for output in self.session.get_outputs()]

    def __call__(self, **inputs):
        return dict(zip(self.outputs, self.session.run(None, inputs), strict=True))


class Port:
    def __init__(self, config):
        self.root = np.float32(config["hidden_size"] ** 0.5)
        self.tower, self.bridge, self.layer = (Graph(name) for name in ("tower", "bridge", "layer"))
        self.given = dict(np.load(HERE / "given.npz"))  # what no graph computes: text, sound, rotary angles

    def __call__(self, images):
        features = self.tower(images=images)["vision.tower"]
        image = self.bridge(features=features)["vision.llm_norm"] * self.root
        return self.layer(image=image, **self.given)


def build(config, weights):
    return Port(config)  # the graphs hold their weights


def forward(model, inputs):
    model(inputs["images.0"])


STAGES = {
    "layer.0.image_input": call("layer", arg="image"),
    **{stage: call(graph, item=stage, back=False) for graph, stages in INSIDE.items() for stage in stages},
    **{stage: call(graph, item=stage) for graph, stages in GIVEN.items() for stage in stages},
}
