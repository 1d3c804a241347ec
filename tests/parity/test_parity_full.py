"""The machinery of the full-size case, on the tiny model: what it stores, that it judges, that a fault is seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stageparity import sketch, store, writer
from stageparity.golden import GoldenError, Sketched, Whole
from vidi.config import VidiConfig
from vidi.fast import twins
from vidi.parity import faults, full


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("full")
    writer.write_case(where, full.make(VidiConfig.tiny(), device="cpu", num_frames=20))
    return where


def test_a_device_sketch_is_the_sketch():
    x = torch.randn(5, 3000, 40, generator=torch.Generator().manual_seed(0))
    found = full.sketched("layer.0.output", x)
    assert isinstance(found, Sketched)
    expected = sketch.make(x.reshape(-1, 40).numpy(), full.SPEC)
    assert np.array_equal(found.sketch.top_index, expected.top_index)
    np.testing.assert_allclose(found.sketch.blocks, expected.blocks, rtol=1e-6, atol=1e-6)
    for part in ("block_max", "top_value", "sample_value", "sum_squares"):
        np.testing.assert_allclose(getattr(found.sketch, part), getattr(expected, part), rtol=1e-12)


def test_axes_that_tell_rows_apart_come_first():
    x = torch.randn(2, 50, 30, 30, generator=torch.Generator().manual_seed(0))
    found = full.sketched("vision.pad", x)
    expected = sketch.make(x.permute(0, 2, 3, 1).reshape(-1, 50).numpy(), full.SPEC)
    np.testing.assert_allclose(found.sketch.blocks, expected.blocks, rtol=1e-6, atol=1e-6)


def test_the_case_holds_every_stage_and_verifies(folder):
    case = store.open_case(folder, full.CASE)
    targets = dict(case.variant(full.VARIANT).items())
    assert {"vision.tower", "audio.llm_norm", "layer.0.image_stream", "layer.3.t2a", "final.norm", "logits"} <= set(
        targets
    )
    assert isinstance(targets["vision.mask"], Whole)
    assert (case.provenance["origin"], case.provenance["dtype"]) == ("self", "float32")
    assert store.verify(folder) == len(targets) + 2


def test_the_fast_run_is_judged_at_every_stage(folder):
    found = full.run(device="cpu", folder=folder)
    assert len(found.stages) > 60
    assert not [s.text() for s in found.stages if s.problem]
    # Tiny tensors make noisy ratios; the limits of the gate are those of the full size.
    assert all(s.fast["rms"] <= 1.6 * s.plain["rms"] + 1e-6 for s in found.stages if s.plain)


def test_a_fault_of_the_fast_path_is_seen(folder, monkeypatch):
    monkeypatch.setattr(twins, "gated_mul", lambda both, _, out: torch.mul(*both.chunk(2, -1), out=out))
    found = full.run(device="cpu", folder=folder)
    assert found.exit_code == 1
    first = next(s for s in found.stages if not s.ok)
    assert first.stage == "layer.0.image_stream"
    assert "<-- over" in found.text()


@pytest.fixture(scope="module")
def case(folder):
    """Its noise is that of the run as it is."""
    found = full.FullCase(device="cpu", folder=folder)
    rows = full.judge(found.golden, *found.passes(found.build()), found.limits, {})
    found.noise = {row.stage: dict(row.plain) for row in rows if row.plain}
    return found


@pytest.mark.slow
def test_a_run_is_within_what_is_stored_of_it(case):
    plain, fast = case.passes(case.build())
    assert case.first_over(plain) is None
    assert not [row.text() for row in case.judge(plain, plain) if not row.ok]
    del case.noise["logits"], fast["vision.tower"]
    wrong = {row.stage: row.text() for row in case.judge(plain, fast) if row.problem}
    assert wrong.keys() == {"logits", "vision.tower"}


SHARED = [(stage, name) for stage, own in full.SHARED.items() for name in own]


def test_twenty_faults_of_both_paths() -> None:
    planted = [name for _, name in SHARED if "." in name]
    assert len(SHARED) >= 28
    assert set(planted) <= set(faults.FAULTS)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "name"), SHARED)
def test_a_fault_of_both_paths_is_seen_in_both(case, stage, name):
    """By the ratio of the two none would be."""
    change = full.SHARED[stage][name]
    model = case.build(change(case.config) if change else None)
    plain, fast = case.passes(model, None if change else faults.FAULTS[name], upto=stage)
    assert (case.first_over(plain), case.first_over(fast)) == (stage, stage)


def test_inputs_that_moved_are_refused(folder, monkeypatch):
    monkeypatch.setattr(full, "_words", lambda seed, stream, count: np.arange(count, dtype=np.uint64))
    with pytest.raises(GoldenError, match="regenerate the case"):
        full.run(device="cpu", folder=folder)


def test_missing_and_nan_are_failures():
    truth = {"layer.0.output": Whole(np.ones((1, 2, 3), np.float32), "float32")}
    rows = full.judge(truth, truth, {}, {"rms": 1.2, "max": 2.0, "row": 1.2, "floor": 1e-6}, {})
    assert not rows[0].ok
    assert "missing" in rows[0].text()
    with pytest.raises(GoldenError, match="NaN"):
        full.sketched("layer.0.output", torch.full((1, 100, 100), torch.nan))
    assert full.FullRun((), "CPU").exit_code == 3
