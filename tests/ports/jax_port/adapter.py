import jax.numpy as jnp
import model
from stagetrace import call


class Port:
    def __init__(self, config, weights):
        self.config, self.weights = config, {name: jnp.asarray(x) for name, x in weights.items()}

    def visual(self, images, freq):
        return model.visual(self.weights, self.config, images, freq)


def build(config, weights):
    return Port(config, weights)


def forward(port, inputs):
    port.visual(jnp.asarray(inputs["images.0"]), jnp.asarray(inputs["pos_freq"]))


STAGES = {
    "vision.tower": call("model:tower"),
    "vision.pad": call("model:pad"),
    "vision.space_to_depth": call("model:fold"),
    "vision.projector": call("model:project"),
    "vision.norm": call("model:norm"),
    "vision.llm_norm": call("visual"),
}
