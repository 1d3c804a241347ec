"""The one comparison: what it must not let pass, and the text it fails with."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stageparity import rounding, sketch, tolerance
from stageparity.compare import EXACT, Rule, as_matrix, nothing_compared
from stageparity.golden import Sampled, Sketched, stats_of, whole
from tests.harness.judged import compare
from vidi.parity.stages import STAGES

GOLDENS = Path(__file__).resolve().parents[2] / "goldens"
RULE = Rule("float32-test", "a reason", max=1e-4)
SUMS = replace(RULE, sums=1e-4)
ROWS = Rule("rows", "a reason", rms=1e-3, row=1e-3, head=1e-3)


def _stream(rows: int = 40) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((2, rows, 8))


def test_equal() -> None:
    x = _stream()
    result = compare("layer.0.output", x.astype(np.float32), whole(x), RULE)
    assert result.ok
    assert result.ratio < 0.01
    assert result.text().startswith("layer.0.output: equal (640 values, max ")


def test_one_value() -> None:
    x = _stream()
    y = x.copy()
    y[1, 7, 3] += 0.5
    result = compare("layer.0.output", y, whole(x), RULE)
    rms = np.sqrt(np.square(x).mean())
    assert not result.ok
    assert result.ratio == pytest.approx(0.5 / (1e-4 * rms))
    assert result.text() == "\n".join(
        [
            "layer.0.output: DIFFERENT under float32-test",
            "  1 of 640 values over budget",
            f"  worst |d| 0.5 at [1, 7, 3]: candidate {y[1, 7, 3]:.9g}, golden {x[1, 7, 3]:.9g}",
            f"  max: {0.5 / rms:.3g} of rms, budget 0.0001  <-- over",
            "  1 of 80 rows differ, first: [1, 7]",
            "  budget: a reason",
        ]
    )


def test_one_wrong_token_and_two_swapped_heads() -> None:
    x = _stream(512)
    y = x.copy()
    y[0, 100] = -y[0, 100]
    result = compare("layer.0.output", y, whole(x), ROWS)
    assert result.worst_row == (0, 100)
    assert result.first_rows == ((0, 100),)
    out = np.random.default_rng(4).standard_normal((1, 6, 4, 3))
    swapped = out[:, :, [1, 0, 2, 3]]
    result = compare("xattn.0.v.out", swapped, whole(out), replace(ROWS, row=None, rms=None))
    assert not result.ok
    assert result.worst_head in (0, 1)
    assert "  head at " in result.text()


def test_structure() -> None:
    x = _stream()

    def problems(candidate: np.ndarray | None, golden: np.ndarray = x, stage: str = "logits") -> str:
        result = compare(stage, candidate, whole(golden), RULE)
        assert not result.ok
        assert result.ratio == math.inf
        return "; ".join(result.problems)

    assert problems(None) == "missing: the run produced no tensor of this id"
    said = "shape [1, 40, 8], golden has [2, 40, 8] (it would broadcast, which hides a missing axis)"
    assert problems(x[:1]) == said
    assert problems(x[:, :39]) == "shape [2, 39, 8], golden has [2, 40, 8]"
    assert problems(x[:, :0], x[:, :0]) == "empty: nothing to compare"
    bad = x.copy()
    bad[1, 2, 3], bad[1, 3, 0] = np.nan, np.inf
    assert problems(bad) == "2 of 640 values are NaN or Inf, first at [1, 2, 3]"
    assert problems(x.astype(np.int64)) == "dtype int64, golden has float64"
    mask = x > 0
    assert problems(mask.astype(np.uint8), mask, "vision.mask") == "dtype uint8, golden has bool"
    assert problems(x, mask, "vision.mask") == "dtype float64, golden has bool"


def test_a_rule_without_budget_compares_nothing() -> None:
    x = _stream()
    result = compare("logits", x, whole(x), Rule("none", "no reason"))
    assert result.problems == ("rule none sets no budget: nothing would be compared",)
    assert nothing_compared([])
    assert nothing_compared([result])
    assert not nothing_compared([result, compare("logits", x, whole(x), RULE)])


def test_exact() -> None:
    mask = np.ones((2, 9), bool)
    wrong = mask.copy()
    wrong[0, 8], wrong[1, 0] = False, False
    result = compare("vision.mask", wrong, whole(mask), EXACT)
    assert not result.ok
    assert result.text() == "\n".join(
        [
            "vision.mask: DIFFERENT under exact",
            "  2 of 18 exact values differ",
            "  2 of 18 values over budget",
            "  worst |d| 1 at [0, 8]: candidate 0, golden 1",
            "  2 of 18 rows differ, first: [0, 8], [1, 0]",
            "  budget: masks, indices, lengths and ids have no rounding",
        ]
    )
    table = np.exp(-np.arange(12.0)).astype(np.float32)
    assert compare("pos.freq", table, whole(table), EXACT).ok
    assert not compare("pos.freq", np.nextafter(table, np.float32(2)), whole(table), EXACT).ok


def test_padding_must_stay_exactly_zero() -> None:
    x = _stream()
    x[1, 30:] = 0
    y = x.copy()
    y[1, 35, 0] = 1e-12
    result = compare("layer.0.image_stream", y, whole(x), RULE)
    assert result.problems == ("1 rows are exactly zero in the golden (padding), not in the candidate",)
    assert compare("layer.0.image_stream", y, whole(x), replace(RULE, zero_rows=False)).ok
    zeros = np.zeros((1, 4, 8))
    assert compare("layer.0.t2a", zeros, whole(zeros), RULE).ok
    assert not compare("layer.0.t2a", zeros + 1e-30, whole(zeros), RULE).ok


def test_floor_is_at_the_rows_own_scale() -> None:
    x = np.ones((1, 4, 8))
    x[0, 2] = 1e-3
    rule = Rule("floor", "a reason", max=0.0, floor_ulp=2, eps=2.0**-8)
    assert compare("logits", x + 0.9 * 2 * 2.0**-8 * x, whole(x), rule).ok
    y = x.copy()
    y[0, 2] += 1e-4
    assert compare("logits", y, whole(x), rule).first_rows == ((0, 2),)


def _sampled(x: np.ndarray, index: np.ndarray) -> Sampled:
    sums = x.sum(axis=(0, 2))
    return Sampled(x.shape, "float64", 1, index, x[:, index], stats_of(x), sums, np.arange(x.shape[1]))


def test_sampled_sees_rows_that_are_not_sampled() -> None:
    x = _stream(200)
    golden = _sampled(x, np.array([0, 99, 199]))
    assert compare("vision.packed", x * (1 + 1e-6), golden, SUMS).ok
    common = x + 5e-5 * np.sqrt(np.square(x).mean())  # an error that all values share, as half precision makes
    assert compare("vision.packed", common, golden, RULE).ok
    assert not compare("vision.packed", common, golden, SUMS).ok
    y = x.copy()
    y[0, 57] *= 1.5
    result = compare("vision.packed", y, golden, SUMS)
    assert not result.ok
    assert "1 of 200 row sums along axis 1 differ, first rows [57]" in result.problems[0]
    y = x[:, ::-1].copy()
    assert not compare("vision.packed", y, golden, RULE).ok
    y = x.copy()
    y[1, 57, 2] = 9.0
    assert not compare("vision.packed", y, golden, RULE).ok, "a new maximum is seen without sums"
    y = x.copy()
    y[0, 99, 1] += 1e-2
    assert compare("vision.packed", y, golden, RULE).first_rows == ((0, 1),)


@pytest.mark.parametrize(("bias_ulp", "ulps", "ok"), [(0, 3, False), (4, 3, True), (4, 6, False)])
def test_a_sum_may_lean_one_way_by_some_units_in_the_last_place(bias_ulp: int, ulps: int, ok: bool) -> None:
    """Over a million values independent errors of 3e-7 add up to less than a common one does."""
    x = np.random.default_rng(9).standard_normal((1, 4000, 256))
    golden = _sampled(x, np.array([0, 99, 199]))
    rule = replace(RULE, sums=1e-5, bias_ulp=bias_ulp, eps=2**-23)
    result = compare("vision.packed", x * (1 - ulps * 2**-23), golden, rule)
    assert result.ok == ok
    assert ok or "of the whole tensor" in result.text()


def test_a_row_within_its_own_budget_is_no_fault_of_the_whole() -> None:
    """Of four rows one errs by three times the rms budget, as `row` allows; five times, or two of them, is too much. A
    single row has the row's budget for both."""
    x = _stream(2)
    unit, rms = np.full(8, 1e-3), np.sqrt(np.square(x).mean())
    rule = Rule("rows", "a reason", rms=1e-3 / rms, row=3e-3 / rms)
    for rows, factor, ok in (([0], 2.9, True), ([0], 5, False), ([0, 1], 2.9, False)):
        y = x.copy()
        y[0, rows] += factor * unit
        assert compare("layer.0.output", y, whole(x), rule).ok == ok
        assert not compare("layer.0.output", y, whole(x), replace(rule, row=None)).ok
    x = x[:1, :1]
    rms = np.sqrt(np.square(x).mean())
    result = compare("layer.0.output", x + unit, whole(x), replace(rule, rms=1e-3 / rms, row=3e-3 / rms))
    assert result.budgets["rms"] == pytest.approx(result.budgets["row"])


def test_sketched_finds_the_block_and_the_single_element() -> None:
    x = np.random.default_rng(8).standard_normal((1, 300, 64))
    matrix = as_matrix(x, STAGES.axes("vision.packed"))
    golden = Sketched(x.shape, "float64", sketch.make(matrix, sketch.SketchSpec(block_rows=100)))
    rule = Rule("sketch", "a reason", max=1e-3, rms=1e-3, row=1e-3)
    assert compare("vision.packed", x * (1 + 1e-5), golden, rule).ok
    y = x.copy()
    y[0, 150] *= -1
    result = compare("vision.packed", y, golden, rule)
    assert not result.ok
    assert result.worst_row == (100,)
    y = x.copy()
    largest = np.unravel_index(np.abs(x).argmax(), x.shape)
    y[largest] *= 1.001
    assert not compare("vision.packed", y, golden, rule).ok


def test_every_gate_has_a_reason_and_every_baseline_gate_a_floor() -> None:
    tables = tolerance.load(GOLDENS, STAGES)
    assert {"float64-none", "float32-recorded", "float32-cast", "bfloat16-cast"} <= set(tables.gates)
    assert tables.rule("float64-none", "layer.0.t2t").max == 1e-9
    assert tables.rule("float32-recorded", "grad.none.model.norm.weight").max == 2e-4
    mid = tables.rule("float32-recorded", "loss.mid")
    assert mid == Rule("float32-recorded", mid.why, max_abs=1e-5, sums=1e-4, bias_ulp=4, eps=2**-23)
    assert tables.rule("bfloat16-cast", "vision.mask", "small/base") is EXACT
    for kind in tolerance.KINDS:
        measured = tables.baselines[kind]["bfloat16"]["small/base"]["layer.1.t2v"]
        rule = tables.rule("bfloat16-cast", "layer.1.t2v", "small/base", kind=kind)
        assert rule.rms == (1.5 if kind == "chained" else 1.3) * measured["rms"]
        assert rule.floor_ulp > 0
    with pytest.raises(ValueError, match=r"no chained baseline for bfloat16 small/nowhere layer\.0\.t2v"):
        tables.rule("bfloat16-cast", "layer.0.t2v", "small/nowhere")
    with pytest.raises(ValueError, match="no gate named 'float8-none'"):
        tables.rule("float8-none", "layer.0.t2v")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[gate.a]\nmax = 1e-4\n", "gate a: every number needs a reason in `why`"),
        ('[gate.a]\nwhy = "x"\nmaxx = 1\n', "gate a: unknown field maxx"),
        ('[gate.a]\nwhy = "x"\nmax = 0\n', "gate a: max = 0 must be a number above 0"),
        ('[gate.a]\nwhy = "x"\nc_max = 3\n', "gate a: a budget from baselines needs floor_ulp and eps above 0"),
    ],
)
def test_a_bad_tolerance_file(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "tolerances.toml").write_text(text)
    with pytest.raises(ValueError, match=said):
        tolerance.load(tmp_path, STAGES)


@pytest.mark.parametrize(("allowed", "ok"), [(0.3, True), (0.05, False)])
def test_casts_that_are_within_their_share_are_no_problem(allowed: float, ok: bool) -> None:
    """A tenth of the values differ; the verdict and what is said about it go by the same limit."""
    theirs = np.ones((1, 5, 20), np.float32)
    mine = theirs.copy()
    mine[0, :, :2] = 2
    result = rounding.compare("layer.0.t2t", mine, theirs, STAGES.axes("layer.0.t2t"), allowed)
    said = () if ok else ("10.0% of the values have other bits than the specified casts give",)
    assert (result.ok, result.problems) == (ok, said)


def test_the_worst_of_several_steps_is_told_by_name() -> None:
    theirs = np.ones((1, 5, 20), np.float32)
    steps = [rounding.Step("entry", theirs, theirs), rounding.Step("layer 0", theirs + 1, theirs)]
    result = rounding.judge("audio.tower", theirs, steps, STAGES.axes("audio.tower"), {})
    assert (result.ok, result.problems) == (
        False,
        ("layer 0: 100.0% of the values have other bits than the specified casts give",),
    )
    assert rounding.judge("audio.tower", theirs, steps[:1], STAGES.axes("audio.tower"), {}).ok


def test_any_of_several_legitimate_roundings_will_do() -> None:
    mine = np.ones((1, 5, 20), np.float32)
    axes = STAGES.axes("vision.projector")
    assert rounding.judge("vision.projector", mine, (mine + 1, mine), axes, {}).ok
    assert not rounding.judge("vision.projector", mine, (mine + 1, mine - 1), axes, {}).ok
