"""Three graphs of our model for ONNX Runtime: tower, visual bridge, first decoder layer. `python export.py OUT [CASE]`.

Runs where torch, onnxscript and this project are; the port that reads the graphs has onnxruntime and NumPy alone. Sizes are
those of the case, one video without padding. Each graph gives the stages inside it as further outputs: nothing can be put
in their place.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stageparity import store
from vidi.attention.unpad import Rows
from vidi.bridge import visual
from vidi.decoder.layer import TextRows
from vidi.model import VidiModel
from vidi.parity import feed
from vidi.parity.goldens import goldens_dir

TOWER = ("vision.tower",)
BRIDGE = (
    "vision.pad", "vision.space_to_depth", "vision.projector", "vision.norm", "vision.pos_h.embed", "vision.pos_h",
    "vision.pos_w.embed", "vision.pos_w", "vision.pos_t.embed.0", "vision.pos_t", "vision.packed", "vision.mask",
    "vision.llm_norm",
)  # fmt: skip
LAYER = tuple(f"layer.0.{name}" for name in ("t2t", "t2v", "t2a", "output", "image_stream", "audio_stream"))


class Outputs(dict[str, Tensor]):
    """A tap that keeps what it is handed."""

    def __call__(self, stage: str, x: Tensor) -> Tensor:
        self[stage] = x
        return x

    def wants(self, stage: str) -> bool:
        return True


class Tower(nn.Module):
    def __init__(self, model: VidiModel) -> None:
        super().__init__()
        self.tower = model.vision_tower

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.tower(images),)


class Bridge(nn.Module):
    def __init__(self, model: VidiModel) -> None:
        super().__init__()
        self.bridge, self.config = model.bridge, model.config

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        seen = Outputs()
        signal = torch.ones(1, dtype=torch.bool)
        visual.encode(self.bridge, [features], [len(features)], signal, self.config, tap=seen)
        return tuple(seen[stage] for stage in BRIDGE)


class Layer(nn.Module):
    """Text and both streams through the first layer."""

    def __init__(self, model: VidiModel) -> None:
        super().__init__()
        self.layer = model.decoder.layers[0]

    def forward(self, x: Tensor, image: Tensor, audio: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        seen, layer, length = Outputs(), self.layer, x.shape[1]
        streams = {"v": image, "a": audio}
        keys = {m: layer.stream_keys(s, Rows.all_kept(1, s.shape[1]), m) for m, s in streams.items()}
        text = TextRows(torch.arange(length)[None], cos, sin, Rows.all_kept(1, length), "eager")
        layer(x, text, keys, tap=seen)
        for name, (m, s) in zip(("image", "audio"), streams.items(), strict=True):
            seen[f"layer.0.{name}_stream"] = layer.update_stream(s, keys[m].v_BLGH)
        return tuple(seen[stage] for stage in LAYER)


def export(out: Path, name: str = "official/single") -> None:
    """tower.onnx, bridge.onnx, layer.onnx in ``out``, and given.npz: what the layer reads that none of them computes."""
    folder, _, case_name = name.partition("/")
    case = store.open_case(goldens_dir() / folder, case_name)
    golden = {stage: torch.from_numpy(x.array) for stage, x in case.targets.items() if hasattr(x, "array")}
    model: Any = feed.load_model(case, torch.float32)
    out.mkdir(parents=True, exist_ok=True)
    layer = [
        golden[stage]
        for stage in ("layer.0.input", "layer.0.image_input", "layer.0.audio_input", "rope.cos", "rope.sin")
    ]
    names = ["x", "image", "audio", "cos", "sin"]
    np.savez(out / "given.npz", **{name: x.numpy() for name, x in zip(names, layer, strict=True) if name != "image"})
    parts: tuple[tuple[str, nn.Module, list[Tensor], list[str], tuple[str, ...]], ...] = (
        ("tower", Tower(model), [torch.from_numpy(case.inputs["inputs.images.0"])], ["images"], TOWER),
        ("bridge", Bridge(model), [golden["vision.tower"]], ["features"], BRIDGE),
        ("layer", Layer(model), layer, names, LAYER),
    )  # fmt: skip
    for name, module, given, inputs, outputs in parts:
        with torch.no_grad():
            torch.onnx.export(
                module.eval(), tuple(given), out / f"{name}.onnx", input_names=inputs, output_names=list(outputs),
                dynamo=True, external_data=False, verbose=False,
            )  # fmt: skip


if __name__ == "__main__":
    export(Path(sys.argv[1]), *sys.argv[2:])
