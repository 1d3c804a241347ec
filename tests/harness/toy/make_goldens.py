"""python -m toy.make_goldens writes the golden set `small`: weights and ids from a seed, every stage from the oracle."""

from pathlib import Path

import numpy as np

from stageparity import golden, ledger, manifest, writer
from toy import oracle

GOLDENS = Path(__file__).with_name("goldens")
MADE = {"origin": "oracle", "dtype": "float64", "libraries": {}, "device": "cpu", "seed": 3, "commit": ""}
SHAPES = {f"layer.{i}.{n}": (8, 8) for i in "01" for n in "qkv"} | {"layer.0.scale": 8, "layer.1.scale": 8, "table": (12, 8)}
rng = np.random.default_rng(MADE["seed"])
weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
ids = rng.integers(1, 12, (2, 6)) * [[1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1]]  # 0 is padding
targets = {name: golden.whole(x) for name, x in oracle.run(ids, weights, heads=2).items()}
record = lambda: ledger.append(GOLDENS, "small", manifest.set_sha256(GOLDENS / "small"), "the first")  # noqa: E731
with writer.replaced(GOLDENS / "small", record=record) as draft:
    held = writer.write_weights(draft, "weights.safetensors", weights)
    writer.write_case(draft, writer.NewCase("base", MADE, {"heads": 2}, {"inputs.ids": ids}, {"none": targets}, held))
