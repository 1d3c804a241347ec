"""The model against the full recordings of the official release, every recorded row (NOT RUN where they are absent).

They are imported as any folder of recordings would be, so that the import is part of what is tested. float32 files are
held chained from raw inputs; float64 files at the stages that no float32 step precedes; bf16 and fp16 files by the error
against float64, at most 1.5 times the recording's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from stageparity import fingerprint, run, store, tolerance
from stageparity.golden import Whole
from tests.harness.judged import compare
from tests.not_run import not_run
from tests.oracle.recordings import FOLDER
from tools.import_official import import_recordings
from vidi.parity import feed, trace
from vidi.parity.stages import STAGES
from vidi.parity.subject import VidiSubject

GOLDENS = Path(__file__).parents[2] / "goldens"
# Before the first norm nothing is float32 in a float64 run of the release; behind it our float64 run is another
# mathematics (one ulp of float32 in a frequency turns the last frame by 6e-4 rad).
PURE = {
    *("vision.tower", "vision.pad", "vision.resize", "vision.space_to_depth", "vision.projector"),
    *("audio.tower", "audio.trim", "audio.pool", "audio.projector", "text.embeds"),
}
CASES = ("single", "batch", "silent", "generate", "loss", "longvideo", "verylong")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (FOLDER / "weights.safetensors").is_file():
        not_run(f"no recordings in {FOLDER.name}; set VIDI_RECORDINGS to the folder that holds them")
    place = tmp_path_factory.mktemp("recordings") / "full"
    import_recordings(FOLDER, place, full=True)
    return place


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    with fingerprint.ieee():
        yield


def opened(imported: Path, name: str) -> store.Case:
    if not (imported / f"{name}.json").exists():
        not_run(f"recording {name} is not among them")
    return store.open_case(imported, name)


# test_stages.py holds what is embedded of each; here all of a recording is read. One does in the fast tier.
@pytest.mark.parametrize("name", [CASES[0], *(pytest.param(x, marks=pytest.mark.slow) for x in CASES[1:])])
def test_float32_chained_from_raw_inputs(imported: Path, name: str, record_property) -> None:
    case = opened(imported, name)
    model = feed.load_model(case, torch.float32)
    done, _ = run.run_case(VidiSubject("float32"), case, model, tolerance.load(GOLDENS, STAGES), alone=False)
    assert len(done.rows) >= len(case.targets) > 0
    assert not done.not_run
    worst = max((r.errors.get("max", 0.0), row.stage) for row in done.rows for r in row.results)
    record_property("worst", f"{worst[1]}: {worst[0]:.2e} of rms")
    assert not [r.text() for row in done.rows for r in row.results if not r.ok]


@pytest.mark.parametrize("name", ["single.f64"])
def test_float64_before_any_float32_step(imported: Path, name: str) -> None:
    case = opened(imported, name)
    targets = case.variant("recorded")
    wanted = [s for s in targets if s in PURE or targets[s].dtype in ("bool", "int64", "int32")]
    assert {"vision.projector", "audio.projector", "vision.mask", "audio.mask"} <= set(wanted)
    found = trace.capture(case, feed.load_model(case, torch.float64))
    rules = tolerance.load(GOLDENS, STAGES)
    results = [compare(s, found[s], targets[s], rules.rule("float64-recorded", s)) for s in wanted]
    assert all(r.rule.max == 1e-11 for r in results if r.stage in PURE)
    assert not [r.text() for r in results if not r.ok]


@pytest.mark.parametrize(("short", "dtype"), [("bf16", "bfloat16"), ("f16", "float16")])
def test_half_precision_errs_no_more_than_the_release(imported: Path, short: str, dtype: str, record_property) -> None:
    exact, low = opened(imported, "single.f64"), opened(imported, f"single.{short}")
    found = trace.capture(low, feed.load_model(low, feed.DTYPES[dtype]))
    rules, ratios, wrong = tolerance.load(GOLDENS, STAGES), {}, []
    recorded, truth = low.variant("recorded"), exact.variant("recorded")
    for stage in recorded:
        golden, theirs = truth[stage], recorded[stage]
        assert isinstance(golden, Whole)
        assert isinstance(theirs, Whole)
        if STAGES.is_exact(stage) or golden.array.dtype.kind in "bi":
            # pos.freq and masks do not depend on the dtype.
            result = compare(stage, found[stage], theirs, rules.rule(f"{dtype}-recorded", stage))
        else:
            judge = rules.rule("float32-recorded", stage)
            own = tolerance.baseline_of([compare(stage, theirs.array, golden, judge)])
            rule = rules.rule(f"{dtype}-recorded", stage, baseline=own)
            assert rule.rms == 1.5 * own["rms"]
            result = compare(stage, found[stage], golden, rule)
            ratios[stage] = result.errors["rms"] / own["rms"] if own["rms"] else 0.0
        if not result.ok:
            wrong.append(result.text())
    assert len(ratios) > 60
    worst = max(ratios, key=lambda s: ratios[s])
    record_property("worst", f"{worst}: {ratios[worst]:.2f} times the recording's own error")
    assert not wrong, "\n".join(wrong)
    middle = float(np.median([r for r in ratios.values() if r]))
    assert 0.7 < middle < 1.3, (
        f"the typical error is {middle:.2f} of the release's: some rounding is missing or doubled"
    )


def test_what_is_left_out_is_said(imported: Path) -> None:
    for ref in store.list_cases(imported):
        case = store.open_case(imported, ref.name)
        source = {re.sub(r"\.(sample|sample_index|row_sum|stats)$", "", k) for k in _names(ref.name)}
        held = {*case.inputs, *case.targets, *case.left_out}
        assert source - held == set(), f"{ref.name}: neither imported nor left out with a reason"
        assert all(reason.strip() for reason in case.left_out.values())


def _names(case: str) -> list[str]:
    from safetensors import safe_open

    file = case if "." in case else f"{case}.f32"
    with safe_open(FOLDER / f"{file}.safetensors", "np") as tensors:
        return list(tensors.keys())
