"""A tiny golden set to break: one case with every stored form, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np

from stageparity import sketch
from stageparity.golden import Golden, Sampled, Sketched, stats_of, whole
from stageparity.manifest import parse, render
from stageparity.writer import NewCase, write_case, write_weights

__all__ = ["make_set", "rebless", "rewrite_tensor"]

CONFIG = {"hidden_size": 4, "num_hidden_layers": 1, "vision_config": {}, "audio_config": {}}


def make_set(folder: Path) -> Path:
    """A set of one case `tiny` in `folder`: whole, sampled and sketched targets, a mask, inputs as bytes, weights."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    embeds, stream = rng.standard_normal((1, 3, 4)), rng.standard_normal((1, 40, 4)).astype(np.float32)
    mask = np.array([[True, True, False]])
    index = np.array([0, 13, 39])
    rows = Sampled(
        stream.shape,
        "float32",
        1,
        index,
        stream[:, index],
        stats_of(stream),
        stream.astype(np.float64).sum(axis=(0, 2)),
        np.arange(40),
    )
    sketched = Sketched(stream.shape, "float32", sketch.make(stream.reshape(40, 4), sketch.SketchSpec(block_rows=16)))
    targets: dict[str, Golden] = {
        "text.embeds": whole(embeds),
        "text.mask": whole(mask),
        "layer.0.input": whole(embeds),
        "layer.0.image_stream": rows,
        "vision.llm_norm": sketched,
    }
    weights = write_weights(folder, "weights.safetensors", {"a.weight": np.ones((2, 2), np.float32)})
    inputs = {"inputs.input_ids": np.array([[2, -200, 7, 9]]), "inputs.images_u8.0": np.zeros((1, 3, 2, 2), np.uint8)}
    provenance = {"origin": "oracle", "dtype": "float64", "libraries": {}, "device": "cpu", "seed": 5, "commit": "none"}
    write_case(folder, NewCase("tiny", provenance, CONFIG, inputs, {"none": targets}, weights))
    return folder


def rewrite_tensor(folder: Path, place: str, change) -> None:
    """Change a dataset inside the data file, as someone would who edits it on purpose: container hash set right."""
    with h5py.File(folder / "tiny.h5", "r+") as file:
        data = file[place][()]
        del file[place]
        file.create_dataset(place, data=change(data))
    rebless(folder)


def rebless(folder: Path, **changes) -> None:
    """Set the manifest's container and own hash to what lies on disk, with further changes to its entries."""
    import hashlib

    raw = (folder / "tiny.h5").read_bytes()
    body = parse(folder / "tiny.json") | changes
    body["container"] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (folder / "tiny.json").write_bytes(render(json.loads(json.dumps(body))))
