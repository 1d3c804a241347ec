"""Rounding by hand-picked bits, which steps the casts touch, and what a run with another summation order changes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from goldens import recipes
from goldens.oracle import Arithmetic, forward, round_bf16, round_fp16


def bits(value: int) -> np.float32:
    return np.array(value, np.uint32).view(np.float32)[()]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (0x3F800000, 0x3F800000),  # 1 stays
        (0x3F808000, 0x3F800000),  # a tie, even below
        (0x3F818000, 0x3F820000),  # a tie, even above
        (0x3F808001, 0x3F810000),  # just over the tie
        (0x3F80FFFF, 0x3F810000),
        (0xBF808000, 0xBF800000),  # ties by magnitude
        (0x3FFFFFFF, 0x40000000),  # carries into the exponent
        (0x7F7FFFFF, 0x7F800000),  # overflows to inf
        (0x7F800000, 0x7F800000),
        (0xFF800000, 0xFF800000),
        (0x80000000, 0x80000000),  # -0 keeps its sign
        (0x00008001, 0x00010000),  # a subnormal
        (0x00008000, 0x00000000),
    ],
)
def test_bf16_of_float32(before: int, after: int) -> None:
    assert round_bf16(np.array([bits(before)])).view(np.uint32)[0] == after


def test_bf16_rounds_float64_once() -> None:
    """1 + 2^-8 + 2^-40 is above the tie; through float32 it would be on it, and fall to even."""
    assert round_bf16(np.array([1 + 2.0**-8 + 2.0**-40]))[0] == 1 + 2.0**-7
    assert round_bf16(np.array([1 + 2.0**-8 - 2.0**-40]))[0] == 1.0
    assert round_bf16(np.array([1 + 2.0**-8]))[0] == 1.0
    assert round_bf16(np.array([-(1 + 2.0**-8 + 2.0**-40)]))[0] == -(1 + 2.0**-7)
    assert np.isnan(round_bf16(np.array([np.nan]))[0])
    assert np.isnan(round_bf16(np.array([bits(0x7F800001)]))[0])  # its payload would be cut off


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (1 + 2.0**-11, 1.0),
        (1 + 3 * 2.0**-11, 1 + 2.0**-9),
        (1 + 2.0**-11 + 2.0**-40, 1 + 2.0**-10),
        (65519.0, 65504.0),
        (65520.0, np.inf),
        (2.0**-24, 2.0**-24),
        (2.0**-25, 0.0),
        (1.5 * 2.0**-24, 2.0**-23),
    ],
)
def test_fp16(before: float, after: float) -> None:
    assert round_fp16(np.array([before, -before])).tolist() == [after, -after]


@pytest.mark.parametrize(("rounding", "dtype"), [(round_bf16, torch.bfloat16), (round_fp16, torch.float16)])
def test_rounding_is_torchs(rounding, dtype: torch.dtype) -> None:
    patterns = recipes.words("patterns", 200_000).view(np.uint32)
    values = patterns.view(np.float32)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(rounding(values), torch.from_numpy(values.copy()).to(dtype).float().numpy())


def test_sqrt_width_is_rounded_to_the_models_dtype() -> None:
    """59.75 in bf16 and 59.875 in fp16 for a width of 3584 (spec §6)."""
    for round_to, wanted in (("bf16", 59.75), ("fp16", 59.875), ("fp32", float(np.float32(3584**0.5)))):
        assert Arithmetic("cast", round_to).store(np.array(3584.0) ** 0.5) == wanted
    assert Arithmetic("cast").store(np.array(3584.0) ** 0.5) == 3584**0.5


def test_the_table_is_torchs() -> None:
    table = torch.exp(torch.arange(0, 24, 2, dtype=torch.float32) * (-np.log(10000.0) / 24)).numpy()
    np.testing.assert_array_equal(recipes.POS_FREQ.view(np.uint32), table.view(np.uint32))


@pytest.fixture(scope="module")
def runs() -> dict[str, dict[str, np.ndarray]]:
    base, tensors = recipes.cases()["base"], recipes.weights()
    settings = {
        "none": {"casts": "none"},
        "cast": {"casts": "cast"},
        "other order": {"casts": "cast", "order_seed": 1},
        "exact, other order": {"casts": "none", "order_seed": 1},
        **{
            f"{r} {seed}": {"casts": "cast", "round_to": r, "order_seed": seed}
            for r in ("bf16", "fp16")
            for seed in (1, 2, 3)
        },
    }
    return {
        name: forward(base.config, tensors, base.inputs, pos_freq=recipes.POS_FREQ, **how)
        for name, how in settings.items()
    }


def apart(runs: dict, one: str, other: str, stage: str) -> float:
    a, b = (runs[name][stage].astype(np.float64) for name in (one, other))
    return float(np.sqrt(np.mean((a - b) ** 2)) / np.sqrt(np.mean(b**2)))


def test_casts_touch_what_the_spec_casts_and_nothing_before(runs: dict) -> None:
    before = ["vision.tower", "vision.pad", "vision.space_to_depth", "vision.projector"]
    before += ["audio.tower", "audio.trim", "audio.pool", "audio.projector", "text.embeds", "layer.0.input"]
    assert [stage for stage in before if apart(runs, "none", "cast", stage) != 0] == []
    for stage in ("vision.norm", "audio.norm", "rope.cos", "layer.0.t2t", "final.norm", "logits"):
        assert 1e-9 < apart(runs, "none", "cast", stage) < 1e-2, stage


def test_time_positions_differ_as_the_spec_says() -> None:
    """Float32 angles up to 9999 move pos_t by 2e-4 to 9e-4 of rms at worst entries (§5); h and w span 0 to 1 and do not
    move. The middle of a long axis shows it: frames at the ends stand at 0 and 9999, exact in float32."""
    rows = {}
    recipe, tensors = recipes.cases()["train"], recipes.weights()
    for casts in ("none", "cast"):
        inputs = {k: v for k, v in recipe.inputs.items() if "noise" not in k and "images" not in k}
        inputs |= {"inputs.audios.0": np.tile(inputs["inputs.audios.0"], (20, 1, 1))}
        inputs |= {"inputs.audio_sizes": np.array([40 * 40])}
        rows[casts] = forward(recipe.config, tensors, inputs, casts=casts, pos_freq=recipes.POS_FREQ)
    worst = np.abs(rows["none"]["audio.pos_t"] - rows["cast"]["audio.pos_t"]).max()
    assert 1e-4 < worst / np.sqrt(np.mean(rows["none"]["audio.pos_t"] ** 2)) < 1e-3


@pytest.mark.parametrize("path", ["pos_h", "pos_w"])
def test_grid_positions_hardly_differ(runs: dict, path: str) -> None:
    assert apart(runs, "none", "cast", f"vision.{path}.embed") < 1e-6


def test_order_changes_noise_only(runs: dict) -> None:
    assert 0 < apart(runs, "exact, other order", "none", "logits") < 1e-12
    assert 0 < apart(runs, "other order", "cast", "logits") < 1e-4
    for name in ("bf16", "fp16"):
        for one, other in ((1, 2), (1, 3), (2, 3)):
            assert apart(runs, f"{name} {one}", f"{name} {other}", "logits") > 1e-4


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_rounded_runs_store_nothing_finer(runs: dict, name: str) -> None:
    rounding = round_bf16 if name == "bf16" else round_fp16
    finer = [
        stage
        for stage, value in runs[f"{name} 1"].items()
        if value.dtype.kind == "f" and stage != "pos.freq" and not np.array_equal(rounding(value), value)
    ]
    assert finer == []


def test_imports_numpy_alone() -> None:
    """Everything in sys.modules after importing the oracle and the recipes is NumPy's, the standard library's or theirs."""
    code = (
        "import sys, numpy; before = set(sys.modules); import goldens.oracle, goldens.recipes, goldens.recipes_7b;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new - set(sys.stdlib_module_names) - {'numpy', 'goldens'}))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_refuses_what_no_model_does() -> None:
    with pytest.raises(ValueError, match="round_to needs casts='cast'"):
        Arithmetic("none", "bf16")
    with pytest.raises(ValueError, match="it must be 'none' or 'cast'"):
        Arithmetic("offical")
    recipe = recipes.cases()["base"]
    with pytest.raises(ValueError, match=r"pos_freq has shape \(3,\); hidden_size 24 needs half of it"):
        forward(recipe.config, recipes.weights(), recipe.inputs, pos_freq=np.ones(3))
