"""The tracer: hooks on anything that is called, layouts and back, pieces, forced runs, and what a crash leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from stageparity.port import stagetrace
from stageparity.port.stagetrace import arrange

CASE: dict[str, Any] = {
    "case": "toy/one",
    "golden": "g" * 64,
    "dtype": "float32",
    "config": {},
    "stages": ["embed", "layer.0.v", "layer.0.a", "layer.1.v", "layer.1.a", "out"],
    "places": {"i": {"pattern": r"\d+", "values": []}, "m": {"pattern": "[va]", "values": ["v", "a"]}},
}

MODEL = """
import numpy as np
from stagetrace import call, tap


class Layer:
    def __init__(self, i):
        self.i = i

    def cross(self, x, scale):
        return {"mixed": (x.T * scale, None)}

    def __call__(self, x):
        return x + self.cross(x, 2.0)["mixed"][0].T + self.cross(x, 3.0)["mixed"][0].T


class Model:
    def __init__(self):
        self.layers = [Layer(0), Layer(1)]

    def embed(self, x):
        return x * 10


def build(config, weights):
    assert set(weights) == {"w", "mine.w"}, sorted(weights)
    return Model()


def forward(model, inputs):
    x = np.concatenate([model.embed(piece) for piece in (inputs["x"][:2], inputs["x"][2:])])
    for layer in model.layers:
        x = layer(x)
    return tap("out", x)


ALIASES = {"*": "mine.*"}
STAGES = {
    "embed": call("embed", join=0),
    "layer.{i}.{m}": call("layers.{i}.cross", item=("mixed", 0), order="m", layout="d t -> t d"),
}
"""


def traced(
    folder: Path, adapter: str = MODEL, goldens: dict[str, np.ndarray] | None = None
) -> tuple[int, dict[str, Any]]:
    """Exit status of the tracer on a toy case, and its trace.json."""
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    held = {"embed": x * 10, **(goldens or {})}
    case = folder / "case"
    case.mkdir(parents=True)
    shapes = {stage: [3, 2] for stage in CASE["stages"]}
    (case / "case.json").write_text(json.dumps({**CASE, "shapes": shapes}))
    for name, tensors in (("inputs", {"x": x}), ("goldens", held), ("weights", {"w": x})):
        stagetrace.write_tensors(str(case / f"{name}.safetensors"), tensors)
    (folder / "adapter.py").write_text(adapter)
    (folder / "stagetrace.py").write_text(Path(stagetrace.__file__).read_text())
    command = [sys.executable, "-I", str(folder / "stagetrace.py"), str(folder / "adapter.py"), str(case), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, json.loads((folder / "trace.json").read_text())


def test_a_toy_of_plain_objects(tmp_path: Path) -> None:
    """Methods, members, calls told apart by order, pieces, a layout, an inline tap, aliases: values by hand."""
    status, said = traced(tmp_path)
    assert (status, said["finished"], said["notes"], said["unused"]) == (0, True, {}, [])
    found, x = load_file(tmp_path / "chained.safetensors"), np.arange(6, dtype=np.float32).reshape(3, 2) * 10
    wanted = {
        "embed": x,
        "layer.0.v": 2 * x,
        "layer.0.a": 3 * x,
        "layer.1.v": 12 * x,
        "layer.1.a": 18 * x,
        "out": 36 * x,
    }
    assert sorted(found) == sorted(wanted)
    for stage, value in wanted.items():
        np.testing.assert_array_equal(found[stage], value, stage)


def test_a_forced_run_goes_on_with_the_golden(tmp_path: Path) -> None:
    """Through the layout and back; what is recorded is what the port made of the goldens before."""
    golden = np.full((3, 2), 7, np.float32)
    golden[1, 0] = 5  # not symmetric: a golden put back the wrong way round shows
    assert traced(tmp_path, goldens={"layer.0.v": golden})[0] == 0
    x = np.arange(6, dtype=np.float32).reshape(3, 2) * 10
    forced = load_file(tmp_path / "forced.safetensors")
    np.testing.assert_array_equal(forced["layer.0.v"], 2 * x)
    np.testing.assert_array_equal(forced["layer.1.v"], 2 * (x + golden + 3 * x))
    np.testing.assert_array_equal(load_file(tmp_path / "chained.safetensors")["layer.1.v"], 12 * x)


def test_a_golden_reaches_a_tensor_whose_axes_are_turned() -> None:
    """MLX hands a transposed array over with strides; a copy of those has no flat view to write into."""
    golden = np.arange(6, dtype=np.float32).reshape(3, 2)
    trace = stagetrace.Trace(["out"], {"out": (3, 2)}, {"out": golden})
    np.testing.assert_array_equal(trace.record("out", np.zeros((2, 3), np.float32).T, stagetrace.call("")), golden)


def test_what_lies_inside_a_graph_is_shown_and_not_put_back() -> None:
    x, golden = np.zeros((3, 2), np.float32), np.ones((3, 2), np.float32)
    trace = stagetrace.Trace(["out"], {"out": (3, 2)}, {"out": golden})
    assert trace.record("out", x, stagetrace.call("", back=False)) is x
    np.testing.assert_array_equal(trace.tensors()["out"], x)
    assert trace.notes == {"out": stagetrace.SHOWN}


def test_what_a_call_was_given_is_remembered(tmp_path: Path) -> None:
    goldens = {"layer.0.v": np.linspace(0, 9, 18, dtype=np.float32).reshape(9, 2)}
    _, said = traced(tmp_path, goldens=goldens)
    assert said["notes"]["layer.0.v"] == "not forced: the golden has another shape"
    assert said["inside"]["layer.0.v"] == []
    assert "layer.0.v" in said["fed"]


@pytest.mark.parametrize("x", [np.ones(2, complex), np.array(["1"]), [None, object()]])
def test_what_holds_no_real_numbers_is_noted(x: Any) -> None:
    trace = stagetrace.Trace(["out"], {"out": (2,)})
    assert trace.record("out", x, stagetrace.call("")) is x
    assert "no real numbers" in trace.notes["out"]
    assert not trace.tensors()


def test_what_is_not_finite_is_given_and_not_remembered() -> None:
    """A mask of -inf is an argument like others. JSON has no word for it, and a trace that held it could not be read."""
    x = np.ones((3, 4))
    least = np.full((4, 4), np.finfo(np.float64).min)  # finite, and its square is not
    assert stagetrace.known([x, np.full((4, 4), -np.inf), x * np.nan, least]) == [stagetrace.fingerprint(x)]


@pytest.mark.parametrize(
    ("edit", "status", "step", "words"),
    [
        (("x + self.cross", "x + self.missing"), 3, "chained run", "no attribute 'missing'"),
        (("return Model()", "raise RuntimeError('no such weight')"), 3, "build", "RuntimeError: no such weight"),
        (("layers.{i}.cross", "layers.{i}.crosss"), 2, "STAGES", "a Layer has no 'crosss'; it has cross, i"),
        (("ALIASES =", "STAGES ="), 2, "importing the adapter", ""),
        ((', order="m"', ""), 2, "STAGES", "tell its calls apart with order="),
        (("return x * 10", "import os; os._exit(7)"), 7, None, ""),
    ],
)
def test_what_fails_is_said_to_be_the_ports_or_the_adapters(
    edit: tuple[str, str], status: int, step: str | None, words: str, tmp_path: Path
) -> None:
    text = MODEL.replace(*edit)
    text = (
        text.partition("STAGES = {\n")[0].replace("STAGES =", "ALIASES =") if step == "importing the adapter" else text
    )
    code, said = traced(tmp_path, text)
    assert (code, said["finished"]) == (status, False)
    if step is not None:
        assert said["failed"]["step"] == step
        assert words in said["failed"]["error"]
        assert said["failed"]["adapter"] == (status == 2)


def test_the_last_stage_before_a_crash_is_named(tmp_path: Path) -> None:
    _, said = traced(tmp_path, MODEL.replace("x.T * scale", "x.T * scale / (scale - 3.0 or None)"))
    assert said["failed"]["last"] == "layer.0.v"
    assert "TypeError" in said["failed"]["error"]


def test_calls_beyond_the_first_are_noted(tmp_path: Path) -> None:
    _, said = traced(tmp_path, MODEL.replace(", join=0", ""))
    assert "met more than once" in said["notes"]["embed"]


@pytest.mark.parametrize(
    ("pattern", "shape", "sizes", "wanted"),
    [
        ("a b -> b a", None, {}, lambda x: x.T),
        ("(a b) c -> a b c", (2, 2, 3), {}, lambda x: x.reshape(2, 2, 3)),
        ("(a b) c -> a b c", None, {"a": 2}, lambda x: x.reshape(2, 2, 3)),
        ("a b -> (a r) b", (8, 3), {}, lambda x: np.repeat(x, 2, 0)),
        ("a b -> (r a) b", (8, 3), {}, lambda x: np.concatenate([x, x])),
        ("a b -> 1 a b", (1, 4, 3), {}, lambda x: x[None]),
        ("a b -> (a b)", (12,), {}, lambda x: x.reshape(-1)),
    ],
)
def test_layouts(pattern: str, shape: Any, sizes: dict[str, int], wanted: Any) -> None:
    x = np.arange(12).reshape(4, 3)
    np.testing.assert_array_equal(arrange(x, pattern, shape, **sizes), wanted(x))


@pytest.mark.parametrize("pattern", ["a b c -> a b c", "a b -> a", "a b -> a b c", "(a b) c -> a b c"])
def test_layouts_that_do_not_fit_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="layout"):
        arrange(np.zeros((4, 3)), pattern)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_golden_comes_back_as_what_it_replaces(dtype: torch.dtype) -> None:
    x = torch.ones(3, dtype=dtype)
    array, name = stagetrace.to_numpy(x)
    assert name == str(dtype).removeprefix("torch.")
    back = stagetrace.like(array * 2, x)
    assert back.dtype == dtype
    assert back.tolist() == [2, 2, 2]


def test_modules_of_torch() -> None:
    """A module's forward is hooked, also when it is called past __call__; a forced tensor keeps its dtype."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    case = {**CASE, "stages": ["a", "b"]}
    hooks = stagetrace.Hooks(model, {"a": "0", "b": stagetrace.call("1", arg=0)}, case)
    golden = np.full((1, 2), -3, np.float32)
    trace = stagetrace.Trace(case["stages"], {}, {"b": golden})
    hooks.start(trace)
    out = model(torch.ones(1, 2))
    assert out.tolist() == [[0, 0]]  # ReLU of the golden
    np.testing.assert_array_equal(trace.tensors()["a"], trace.tensors()["b"])
    hooks.start(None)
    assert model(torch.ones(1, 2)).shape == (1, 2)


def test_kept_parts_of_padded_pieces() -> None:
    """Surplus rows are cut before judging, and the golden is put where they were not."""
    trace = stagetrace.Trace(["a"], {}, {"a": np.array([10.0, 11, 12])})
    where = stagetrace.call("", join=0, keep=lambda n, x: x[: 2 - n])
    first = trace.record("a", np.array([1.0, 2, 99]), where)
    second = trace.record("a", np.array([3.0, 98]), where)
    assert trace.tensors()["a"].tolist() == [1, 2, 3]
    assert (first.tolist(), second.tolist()) == ([10, 11, 99], [12, 98])


def test_fingerprints_tell_values_and_their_order() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 6))
    assert stagetrace.fingerprint(x)[1] == pytest.approx(stagetrace.fingerprint(x.T)[1])
    assert stagetrace.fingerprint(x)[2] != pytest.approx(stagetrace.fingerprint(np.ascontiguousarray(x[::-1]))[2])
    assert stagetrace.fingerprint(x * 1.001)[1] != pytest.approx(stagetrace.fingerprint(x)[1], rel=1e-5)


def test_tensors_files_are_those_of_safetensors(tmp_path: Path) -> None:
    tensors = {"a": np.arange(6, dtype=np.int64).reshape(2, 3), "b": np.float32(2.5).reshape(()), "c": np.array([True])}
    stagetrace.write_tensors(str(tmp_path / "x.safetensors"), tensors)
    for found in (load_file(tmp_path / "x.safetensors"), stagetrace.read_tensors(str(tmp_path / "x.safetensors"))):
        assert sorted(found) == ["a", "b", "c"]
        for name, x in tensors.items():
            assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape)
            np.testing.assert_array_equal(found[name], x)


def test_it_is_python_3_9() -> None:
    """The port's interpreter may be old: no syntax after 3.9, nothing imported beside the standard library and NumPy."""
    import ast

    tree = ast.parse(Path(stagetrace.__file__).read_text(), feature_version=(3, 9))
    names = {n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names if name} - set(sys.stdlib_module_names) == {"numpy"}
    assert not any(isinstance(node, ast.Match) for node in ast.walk(tree))
