"""Adapters of others: STAGES, ports and taps of any form, by seed, in a child under limits, through the tracer itself.

Whatever an adapter says, the tracer ends in 0, 2 or 3, and what it leaves can be read or is refused by name.
"""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stageparity.port import candidate, stagetrace
from stageparity.port.candidate import Unusable
from tests.limited import one_line, run_cases, watched

CASE: dict[str, Any] = {
    "case": "toy/one", "golden": "g" * 64, "dtype": "float32", "config": {},
    "stages": ["embed", "layer.0.v", "layer.0.a", "layer.1.v", "layer.1.a", "out"],
    "places": {"i": {"pattern": r"\d+", "values": []}, "m": {"pattern": "[va]", "values": ["v", "a"]}},
}  # fmt: skip
# fmt: off
PATHS = (
    "embed", "layers.{i}", "layers.{i}.cross", "layers.0", "head", "", ".", "layers.9", "__class__", "layers.-1", "{m}", "{x}",
    "no.such", "nowhere:function", "embed.__call__", "size", "layers",
)
TEMPLATES = (
    "embed", "layer.{i}.{m}", "layer.{i}.v", "layer.0.{m}", "out", "*", "{i}", "", "layer.{q}.v", "[", "out\x1b[2J",
)
OPTIONS: dict[str, tuple[Any, ...]] = {
    "item": (0, 1, -1, 9, "mixed", ("mixed", 0), (0, 0), [], 1.5),
    "arg": (0, 1, 7, "x", "scale", None),
    "join": (0, 1, 5, -1, "a"),
    "order": ("m", "i", "q", 3),
    "layout": (
        "a b -> b a", "a b -> b", "a b c -> a", "a ->", "->", "a b", "(a b) c -> a b c", "a b -> b r a", "a b -> b a r", 7,
    ),
    "back": (False,),
    "when": ("lambda a, k: 1 / 0", "lambda a, k: False", "3"),
    "keep": ("lambda n, x: x[:1]", "lambda n, x: None", "len"),
    "r": (2, 0, -1),
}
RESULTS = (
    "x * 2", "x.T", "x", "None", "(x, None)", "{'mixed': (x, 1)}", "x + 1j", "x.astype('U9')", "np.full_like(x, np.nan)", "[]",
    "x[:0]", "np.float32(3)", "type(x)", "x > 0", "1 / 0", "x.astype('float16')", "np.array([{}])", "iter([x])",
)
ENDS = (
    "return x", "raise SystemExit(0)", "raise KeyboardInterrupt", "raise ValueError('\\x1b[2J' + 'y' * 9000)", "return 1 / 0",
    "tap('out', x); return x", "tap('out', None); tap('embed', 'text'); return x", "return tap('\\x1b', x)",
)
# fmt: on


def _where(rng: random.Random) -> str:
    path = rng.choice(PATHS)
    if rng.random() < 0.2:
        return rng.choice([repr(path), "None", "3", "[]", f"[{path!r}, {path!r}]"])
    words = [f"{name}={value if name in ('when', 'keep') else repr(value)}"
             for name in rng.sample(list(OPTIONS), rng.choice((0, 1, 1, 2, 3)))
             for value in [rng.choice(OPTIONS[name])]]  # fmt: skip
    return f"call({', '.join([repr(path), *words])})"


def _adapter(rng: random.Random) -> str:
    stages = ", ".join(f"{rng.choice(TEMPLATES)!r}: {_where(rng)}" for _ in range(rng.randrange(1, 4)))
    results = [rng.choice(RESULTS if rng.random() < 0.3 else RESULTS[:3]) for _ in range(3)]
    return f"""
import numpy as np
from stageparity.port.stagetrace import call
import stageparity.port.stagetrace as stagetrace

def tap(stage, x):
    return x if stagetrace.CURRENT is None else stagetrace.CURRENT.record(stage, x, call(""))

class Layer:
    def cross(self, x, scale=1.0):
        return {results[0]}
    def __call__(self, x):
        self.cross(x); self.cross(x, scale=2.0)
        return {results[1]}

class Model:
    size = 3
    def __init__(self):
        self.layers = [Layer(), Layer()]
    def embed(self, x):
        return {results[2]}
    def head(self, x):
        return x

def build(config, weights):
    {rng.choice(["return Model()"] * 9 + ["return None", "raise RuntimeError", "return {'embed': len, 'layers': [len]}"])}

def forward(model, inputs):
    x = inputs['x']
    model.embed(x)
    for layer in model.layers:
        layer(x)
    x = model.head(x)
    {rng.choice(ENDS[:1] * 6 + ENDS)}

STAGES = {rng.choice(["{" + stages + "}"] * 9 + ["[]", "None", "{}", "{3: 'embed'}"])}
"""


def case(seed: int, folder: Path) -> str:
    """One hostile adapter: the tracer's status, and whether what it left is read."""
    rng, inside = random.Random(seed), folder / "inside"
    at = inside / "case"
    at.mkdir()
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    goldens = {name: x + 1 for name in CASE["stages"]}
    (at / "case.json").write_text(json.dumps(CASE | {"shapes": {n: [2, 3] for n in goldens}}), "utf-8")
    for name, tensors in (("inputs", {"x": x}), ("goldens", goldens), ("weights", {"w": x})):
        stagetrace.write_tensors(at / f"{name}.safetensors", tensors)
    adapter = inside / f"adapter_{seed}.py"
    adapter.write_text(_adapter(rng), "utf-8")
    with watched(folder / "outside"), contextlib.suppress(SystemExit):
        status = stagetrace.main(str(adapter), str(at), str(inside / "trace"))
    assert status in (0, 2, 3), status
    if status:
        with pytest.raises(Unusable) as refused:
            candidate.header(inside / "trace")
        one_line(refused.value)
        return f"{status}: refused"
    assert candidate.header(inside / "trace")["finished"] is True
    found = stagetrace.read_tensors(inside / "trace" / "chained.safetensors")
    assert set(found) <= set(CASE["stages"])
    return f"{status}: read"


@pytest.mark.parametrize("number", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_hostile_adapters(number: int, tmp_path: Path) -> None:
    outcomes = run_cases("tests.ports.test_fuzz_adapter", number, tmp_path)
    assert outcomes["0: read"] > number // 20
    assert outcomes["2: refused"] > number // 10
    assert outcomes["3: refused"] > number // 20
