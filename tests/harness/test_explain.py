"""Known faults are told from stored sketches: sketches of made-up tensors, where every answer is known beforehand."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stageparity.golden import Golden, GoldenError, Sampled, stats_of, whole
from stageparity.port import sketches as store
from stageparity.port.explain import Explanation, explain
from stageparity.port.sketches import BUCKETS, Difference, Known, Sketches, Table, difference, project
from stageparity.stage import Place, Stage, Stages

ROOT = Path(__file__).resolve().parents[2]
STAGES = Stages(
    [
        Stage("in", ""),
        Stage("layer.{i}.a", ""),
        Stage("layer.{i}.b", ""),
        Stage("mask", "", exact=True),
        Stage("out", ""),
    ],
    {"i": Place(loop=True)},
)
IDS = ["in", "layer.0.a", "layer.0.b", "layer.1.a", "layer.1.b", "mask", "out"]
UNIT = 1e-6
CASE = "set/case"


def tensor(seed: int, shape: tuple[int, ...] = (3, 40), size: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape) * size


GOLDENS: dict[str, Golden] = {s: whole(tensor(n)) for n, s in enumerate(IDS) if s != "mask"}
GOLDENS["mask"] = whole(np.arange(12).reshape(3, 4) % 3 > 0)
ALLOWED = {s: UNIT if s != "mask" else 1.0 for s in IDS}


def port(changes: dict[str, np.ndarray] | None = None, noise: float = 0.4 * UNIT, seed: int = 99) -> dict[str, Any]:
    """The goldens with these changes, and noise of an rms below the budget."""
    made: dict[str, Any] = {"mask": GOLDENS["mask"].array}  # type: ignore[union-attr]
    for n, s in enumerate(s for s in IDS if s != "mask"):
        made[s] = GOLDENS[s].array + tensor(seed + n, size=noise)  # type: ignore[union-attr]
    return made | {s: made[s] + d for s, d in (changes or {}).items()}


#: what each fault changes, from raw inputs and among goldens
EFFECTS: dict[str, dict[str, dict[str, np.ndarray]]] = {
    "near.large": {"chained": {s: tensor(200 + n, size=0.1) for n, s in enumerate(IDS) if s != "mask"}},
    "near.small": {"chained": {s: tensor(300 + n, size=9e-6) for n, s in enumerate(IDS[1:3])}},
    "near.twin": {"chained": {s: tensor(200 + n, size=0.1) for n, s in enumerate(IDS) if s != "mask"}},
    "layers.all": {"chained": {s: tensor(400 + n, size=0.01) for n, s in enumerate(IDS[1:5])}},
}
EFFECTS["near.large"]["forced"] = {"in": EFFECTS["near.large"]["chained"]["in"]}
EFFECTS["near.twin"]["forced"] = EFFECTS["near.large"]["forced"]
EFFECTS["near.small"]["forced"] = EFFECTS["near.small"]["chained"]
EFFECTS["layers.all"]["forced"] = {s: EFFECTS["layers.all"]["chained"][s] for s in ("layer.0.a", "layer.1.a")}


def sketches(most: int = 8, effects: dict[str, Any] = EFFECTS) -> Sketches:
    tables = {}
    for passes in ("chained", "forced"):
        found = {
            (f, s): difference(GOLDENS[s].array + d, GOLDENS[s], UNIT)  # type: ignore[union-attr]
            for f, own in enumerate(effects.values())
            for s, d in own[passes].items()
        }
        tables[CASE, passes] = Table.of(found, ALLOWED, most)
    return Sketches(tuple(Known(name, f"{name}.", "float32") for name in effects), tables, {CASE: "x"})


def explained(tensors: dict[str, Any], passes: str, held: Sketches | None = None, **how: Any) -> list[Explanation]:
    return explain(held or sketches(), CASE, tensors, passes, judging=GOLDENS, allowed=ALLOWED, stages=STAGES, **how)


# ---- one tensor ---------------------------------------------------------------------------------------------------------


def test_a_projection_estimates_the_rms_and_is_linear() -> None:
    x, y = tensor(1, (50, 60)), tensor(2, (50, 60))
    assert np.allclose(project(x, 2.0) + project(y, 2.0), project(x + y, 2.0))
    errors = [math.sqrt(np.square(project(tensor(seed, (30, 20)))).mean()) - 1 for seed in range(200)]
    assert abs(np.mean(errors)) < 0.03
    assert 0.1 < np.std(errors) < 0.2
    one = np.zeros((50, 60))
    one[7, 9] = 3.0
    assert math.sqrt(np.square(project(one)).mean()) == pytest.approx(math.sqrt(9 / 3000))


def test_every_machine_draws_the_same() -> None:
    """A stored sketch is held against one that is made elsewhere: the generator is fixed for good."""
    drawn = project(np.arange(1.0, 101.0)) * math.sqrt(100 / BUCKETS)
    assert np.rint(drawn).astype(int).tolist() == DRAWN


DRAWN = [
    66,
    -111,
    100,
    190,
    98,
    29,
    155,
    -121,
    124,
    -243,
    -298,
    332,
    -149,
    66,
    35,
    57,
    -88,
    136,
    -8,
    160,
    -129,
    -100,
    24,
    55,
]


def test_differences_without_a_size() -> None:
    golden, mask = GOLDENS["in"], GOLDENS["mask"]
    array, bits = golden.array, mask.array  # type: ignore[union-attr]
    assert difference(array, golden, UNIT).rms == 0
    assert difference(bits, mask, 1.0) == Difference(0.0)
    flipped = difference(~bits, mask, 1.0)
    assert (flipped.rms, flipped.content) == (math.inf, difference(~bits, mask, 1.0).content)
    assert flipped.content != difference(np.zeros_like(bits), mask, 1.0).content
    broken = array.copy()
    broken[0, 0] = np.nan
    assert difference(broken, golden, UNIT).rms == math.inf
    shorter = difference(array[:2], golden, UNIT)
    assert shorter.rms == math.inf
    assert shorter.content != difference(array[:, :2], golden, UNIT).content
    assert shorter.numbers is not None


def test_of_a_sampled_golden_the_rows_count() -> None:
    x, index = tensor(5, (9, 4)), np.array([2, 5])
    golden = Sampled((9, 4), "float64", 0, index, x[index], stats_of(x))
    other = x.copy()
    other[3] += 1
    assert difference(other, golden, UNIT).rms == 0
    other[5] += UNIT
    assert difference(other, golden, UNIT).rms == pytest.approx(math.sqrt(0.5))


# ---- which fault --------------------------------------------------------------------------------------------------------


def test_a_fault_is_recognised_and_its_twin_is_named_with_it() -> None:
    (found,) = explained(port(EFFECTS["near.large"]["chained"]), "chained")
    assert found.faults == ("near.large", "near.twin")
    assert found.matches[0].distance < 1
    assert found.matches[1].distance > 1000
    assert found.matches[0].coefficient == pytest.approx(1, abs=1e-3)
    assert found.text().startswith("the same tensors as known faults `near.large` or `near.twin`, which these stages")
    (small,) = explained(port(EFFECTS["near.small"]["chained"]), "chained")
    assert small.faults == ("near.small",)
    assert "`near.small` within 0." in small.text()


@pytest.mark.parametrize(
    "change",
    [
        {"in": tensor(200, size=0.1)},  # of what the fault changes only the first stage
        EFFECTS["near.large"]["chained"] | {"out": tensor(201, size=0.1)},  # and another last stage
        {s: 1.0001 * d for s, d in EFFECTS["near.large"]["chained"].items()},
        {s: d[::-1] for s, d in EFFECTS["near.large"]["chained"].items()},
        {"layer.0.a": tensor(300, size=5e-6), "layer.0.b": tensor(301, size=9e-6)},
        {"in": tensor(1, size=1e-5)},
    ],
)
@pytest.mark.parametrize("most", [1, 8])
def test_what_is_no_known_fault_fits_none(change: dict[str, np.ndarray], most: int) -> None:
    (found,) = explained(port(change), "chained", sketches(most))
    assert not found.recognised
    assert found.matches[0].distance > 1
    assert found.text().startswith("no known fault fits: the nearest, `")


def test_of_two_faults_that_are_near_none_stands_out() -> None:
    near = {"layer.0.a": tensor(500, size=5e-6)}
    beside = {"layer.0.a": near["layer.0.a"] + tensor(501, size=2.2e-6)}
    held = sketches(effects={name: {"chained": own, "forced": own} for name, own in (("one", near), ("two", beside))})
    (found,) = explained(port(near), "chained", held)
    assert not found.recognised
    assert re.fullmatch(r"no known fault stands out: .* `one`, is 0\.\d+ budgets away, then `two`, 2\.\d", found.text())


def test_noise_alone_needs_no_explanation() -> None:
    assert explained(port(), "chained") == explained(port(), "forced") == []


def test_nan_and_other_shapes_fit_nothing() -> None:
    made = port(EFFECTS["near.large"]["chained"])
    (found,) = explained(made | {"out": np.full((3, 40), np.nan)}, "chained")
    assert not found.recognised
    (found,) = explained(made | {"out": made["out"][:2]}, "chained")
    assert not found.recognised
    (found,) = explained(made | {"mask": ~made["mask"]}, "chained")
    assert not found.recognised


def test_a_fault_that_changes_a_shape_is_recognised_by_it() -> None:
    def changed(size: float) -> np.ndarray:
        return tensor(6)[:2] * size

    effects = {"cut": EFFECTS["near.large"], "mask": EFFECTS["near.small"]}
    held, made = sketches(effects=effects), port()
    rows = {
        (0, "out"): difference(changed(1.0), GOLDENS["out"], UNIT),
        (1, "mask"): difference(~made["mask"], GOLDENS["mask"], 1),
    }
    held = replace(held, tables=dict.fromkeys(held.tables, Table.of(rows, ALLOWED, 8)))
    (found,) = explained(made | {"out": changed(1 + 1e-8)}, "chained", held)
    assert found.faults == ("cut",)
    (found,) = explained(made | {"out": changed(1.001)}, "chained", held)
    assert not found.recognised
    (found,) = explained(made | {"mask": ~made["mask"]}, "chained", held)
    assert found.faults == ("mask",)


def test_of_untraced_stages_nothing_is_asked() -> None:
    """One traced stage tells faults apart that change it differently; where none does, nothing is said."""
    made = port(EFFECTS["near.large"]["chained"])
    (found,) = explained({"out": made["out"]}, "chained")
    assert found.faults == ("near.large", "near.twin")
    assert explained({"mask": made["mask"]}, "chained") == []
    assert explain(sketches(), "set/other", made, "chained", judging=GOLDENS, allowed=ALLOWED, stages=STAGES) == []


# ---- several at once ------------------------------------------------------------------------------------------------------


def test_two_faults_at_once_are_both_named() -> None:
    made = port(EFFECTS["near.large"]["forced"] | EFFECTS["layers.all"]["forced"])
    one, other = explained(made, "forced")
    assert one.faults == ("near.large", "near.twin")
    assert other.faults == ("layers.all",)
    assert other.stages == ("layer.0.a", "layer.1.a")
    assert [e.recognised for e in explained(made, "chained")] == [False]


def test_a_fault_beside_one_that_nobody_knows() -> None:
    made = port(EFFECTS["near.large"]["forced"] | {"layer.1.b": tensor(7, size=0.1), "out": tensor(8, size=0.1)})
    one, other, last = explained(made, "forced")
    assert one.faults == ("near.large", "near.twin")
    assert (other.stages, other.faults) == (("layer.1.b",), ())
    assert (last.stages, last.faults, last.text()) == (("out",), (), "no known fault changes these stages")


def test_half_of_a_fault_is_not_the_fault() -> None:
    made = port({"layer.0.a": EFFECTS["layers.all"]["forced"]["layer.0.a"]})
    (found,) = explained(made, "forced")
    assert not found.recognised
    assert found.matches[0].fault != "layers.all" or found.matches[0].distance > 1000


def test_a_forced_run_that_traces_none_of_a_faults_own_stages() -> None:
    """It shows at the next stage that is traced, as in a chained run; behind that nothing is known of it."""
    later = {"layer.0.b": EFFECTS["layers.all"]["chained"]["layer.0.b"], "layer.1.b": tensor(9, size=0.02)}
    made = port(later | {"out": tensor(8, size=0.1)})
    traced = {s: made[s] for s in ("in", "layer.0.b", "layer.1.b", "out")}
    found = explained(traced, "forced", feeds=feeds)
    assert [e.faults for e in found] == [("layers.all",), ()]
    assert [e.stages for e in found] == [("layer.0.b",), ("out",)]
    assert [e.faults for e in explained(traced, "forced")] == [(), ()], "as if all were traced"
    traced["layer.0.b"] = made["layer.0.b"] + tensor(10, size=1e-4)
    assert not any(e.recognised for e in explained(traced, "forced", feeds=feeds))


def feeds(stage: str) -> list[str]:
    """In a row."""
    return {
        "layer.0.a": ["in"],
        "layer.0.b": ["layer.0.a"],
        "layer.1.a": ["layer.0.b"],
        "layer.1.b": ["layer.1.a"],
    }.get(stage, ["layer.1.b"] if stage == "out" else [])


# ---- candidates that err on purpose -----------------------------------------------------------------------------------------


def test_a_fault_under_a_declared_error() -> None:
    """Eight bits err by 0.01 everywhere, 0.012 is declared: a fault of three times that is named, and twice the fault is not."""
    fault = {"near.large": {p: {s: tensor(200, size=0.03) for s in ("in", "out")} for p in ("chained", "forced")}}
    held = sketches(effects=fault | {"near.small": EFFECTS["near.small"]})
    how: dict[str, Any] = {"judging": GOLDENS, "stages": STAGES}
    allowed = dict.fromkeys(IDS, 0.012) | {"mask": 1.0}

    def told(factor: float) -> list[Explanation]:
        changes = {s: factor * d for s, d in fault["near.large"]["chained"].items()}
        return explain(held, CASE, port(changes, noise=0.01), "chained", allowed=allowed, **how)

    (found,) = told(1.0)
    assert found.faults == ("near.large",)
    assert found.matches[0].coefficient == pytest.approx(1, abs=0.2)
    assert found.matches[0].left < 0.5
    assert [e.faults for e in told(2.0)] == [()]
    assert told(0.0) == []


# ---- the file -------------------------------------------------------------------------------------------------------------


def test_neither_torch_nor_a_model_is_loaded() -> None:
    code = "import sys, stageparity.port.explain; print([m for m in ('torch', 'vidi', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_other_numbers_than_the_document_tells_of_are_refused(tmp_path: Path) -> None:
    (tmp_path / "measured").mkdir()
    assert Sketches.load(tmp_path) is None
    for path in (store.STORE, store.NUMBERS):
        shutil.copy(ROOT / "goldens" / path, tmp_path / path)
    assert Sketches.load(tmp_path) is not None
    data = bytearray((tmp_path / store.NUMBERS).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / store.NUMBERS).write_bytes(data)
    with pytest.raises(GoldenError, match=r"fault_sketches\.h5 is not the file that sketches\.json tells of"):
        Sketches.load(tmp_path)
