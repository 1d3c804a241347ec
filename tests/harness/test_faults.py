"""The harness is judged by known faults: each is seen, at the stage whose code it is, and no two are the same."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest

from stageparity import fingerprint
from stageparity.code import code, part
from stageparity.faults import judge as judges
from stageparity.faults.plant import Fault, expected, planted
from stageparity.golden import GoldenError
from tests.not_run import not_run
from vidi.attention import unpad
from vidi.bridge import fold, norm
from vidi.cli import main
from vidi.commands import faults as command
from vidi.parity import faults
from vidi.parity.goldens import goldens_dir
from vidi.parity.stages import STAGES

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
GPU_ONLY = "dtypes.tf32_on"
RECORDINGS = Path(os.environ.get("VIDI_RECORDINGS", ROOT.parent / "shared" / "official"))


@pytest.fixture(scope="module")
def bench() -> judges.Bench:
    return faults.bench(goldens_dir())


def _judged(chosen: list[Fault], bench: judges.Bench) -> list[judges.Verdict]:
    return judges.judge_all(chosen, bench)


def _sample() -> list[Fault]:
    """A fault for every third piece of code that any fault patches, and the one that needs a GPU."""
    return [*list({fault.targets[0]: fault for fault in faults.FAULTS.values()}.values())[::3], faults.FAULTS[GPU_ONLY]]


def test_there_are_enough_and_all_are_described() -> None:
    assert len(faults.FAULTS) >= 100
    assert all(fault.what.endswith(".") and fault.targets for fault in faults.FAULTS.values())
    assert all(name == fault.name for name, fault in faults.FAULTS.items())


def test_measured_faults_are_among_them() -> None:
    assert len(faults.MEASURED) == 28
    assert set(faults.MEASURED.values()) <= set(faults.FAULTS)
    if not (RECORDINGS / "bug_effects.txt").is_file():
        not_run(f"no bug_effects.txt in {RECORDINGS}: set VIDI_RECORDINGS to the folder of recordings")
    lines = (RECORDINGS / "bug_effects.txt").read_text("utf-8").splitlines()[1:]
    assert [re.split(r"\s+\{", line)[0] for line in lines if line.strip()] == list(faults.MEASURED)


@pytest.mark.slow
def test_seen_where_they_are(bench: judges.Bench) -> None:
    """Silent, seen, first at the own stage. The slow tier and `vidi faults` run them all."""
    verdicts = _judged(_sample(), bench)
    wrong = {v.fault.name: (v.stage, v.expected_stage, v.strays, v.loud, v.crashed) for v in verdicts if not v.not_run}
    wrong = {name: why for name, why in wrong.items() if why[0] != why[1] or any(why[2:])}
    assert not wrong
    assert {v.fault.name for v in verdicts if v.not_run} == {GPU_ONLY}


@pytest.mark.slow
def test_all_silent_all_seen_all_different(bench: judges.Bench) -> None:
    verdicts = _judged(list(faults.FAULTS.values()), bench)
    ran = [v for v in verdicts if v.not_run is None]
    assert [v.fault.name for v in ran if not v.silent] == []
    assert [v.fault.name for v in ran if not v.killed] == []
    assert sum(v.localised for v in ran) >= 0.95 * len(ran)
    assert judges.exit_code(verdicts) == 0
    assert _twins(ran, bench) == []


def _twins(ran: list[judges.Verdict], bench: judges.Bench) -> list[tuple[str, str]]:
    """Pairs that patch one piece of code, or show at one stage of one case, and do the same to it: in the settings of
    both, where these are different ones."""
    found = []
    for a, b in itertools.combinations([v for v in ran if v.crashed is None], 2):
        one_target = {t.bare for t in a.fault.targets} & {t.bare for t in b.fault.targets}
        if (one_target or (_setting(a) == _setting(b) and a.stage == b.stage)) and (
            _alike(a, _again(b, a, bench)) and _alike(_again(a, b, bench), b)
        ):
            found.append((a.fault.name, b.fault.name))
    return found


def _same(a: Any, b: Any) -> bool:
    """Equal but for rounding in double precision."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    x, y = a.double(), b.double()
    return bool((x - y).abs().max() <= 1e-11 * y.abs().max().clamp(min=1e-300)) if x.numel() else True


def _setting(v: judges.Verdict) -> tuple[str, str, str]:
    return v.fault.case, v.dtype, v.fault.setting


_AGAIN: dict[tuple[Any, ...], judges.Verdict] = {}


def _again(v: judges.Verdict, other: judges.Verdict, bench: judges.Bench) -> judges.Verdict:
    """The fault of ``v`` where ``other`` was planted."""
    case, dtype, way = setting = _setting(other)
    if setting == _setting(v):
        return v
    if (v.fault.name, setting) not in _AGAIN:
        with fingerprint.ieee():
            moved = dataclasses.replace(v.fault, case=case, setting=way)
            _AGAIN[v.fault.name, setting] = judges.judge(moved, bench, dtype)
    return _AGAIN[v.fault.name, setting]


def _alike(a: judges.Verdict, b: judges.Verdict) -> bool:
    """Both change nothing, or the same stage to the same tensor."""
    if (a.killed, a.stage, a.crashed) != (b.killed, b.stage, b.crashed):
        return False
    return not a.killed or (a.tensor is not None and b.tensor is not None and _same(a.tensor, b.tensor))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("base", "float64"),
        *(pytest.param(*way, marks=pytest.mark.slow) for way in (("novideo", "float64"), ("base", "float32"))),
    ],
)
def test_twins_are_found_in_any_setting(case: str, dtype: str, bench: judges.Bench) -> None:
    eps = faults.FAULTS["norms.rms_eps"]
    moved = dataclasses.replace(eps, name="t.twin", case=case, dtype=dtype)
    verdicts = _judged([eps, moved, faults.FAULTS["norms.rms_centred"], faults.FAULTS["norms.rms_as_l2"]], bench)
    assert _twins(verdicts, bench) == [("norms.rms_eps", "t.twin")]


def test_a_fault_that_changes_nothing_is_not_seen(bench: judges.Bench) -> None:
    idle = Fault("test.idle", "Nothing.", ("vidi.bridge.fold.pad",), lambda original: lambda *given: original(*given))
    (verdict,) = _judged([idle], bench)
    assert (verdict.killed, verdict.silent, verdict.expected_stage) == (False, True, "vision.pad")
    assert judges.exit_code([verdict]) == 1


def test_a_fault_of_another_place_is_not_localised(bench: judges.Bench) -> None:
    astray = Fault(
        "test.astray", "Late.", ("vidi.bridge.fold.pad",), lambda original: lambda x, pool=2: original(x, pool)
    )

    def make(original: Any) -> Any:
        def pad(x: Any, pool: int = 2) -> Any:
            norm.EPS = 2.0  # as if the pad's author had changed the norm
            return original(x, pool)

        return pad

    try:
        (verdict,) = _judged([dataclasses.replace(astray, make=make)], bench)
    finally:
        norm.EPS = 1e-5
    assert verdict.killed
    assert verdict.stage == "vision.norm"
    assert not verdict.localised
    assert judges.exit_code([verdict]) == 1


def test_crashes_and_loud_faults_are_counted_apart(bench: judges.Bench) -> None:
    def crash(original: Any) -> Any:
        return lambda *given: 1 / 0

    def loud(original: Any) -> Any:
        return lambda *given: original(*given) * math.nan

    target = ("vidi.bridge.fold.space_to_depth",)
    verdicts = _judged([Fault("t.crash", "C.", target, crash), Fault("t.loud", "L.", target, loud)], bench)
    assert verdicts[0].crashed == "ZeroDivisionError: division by zero"
    assert verdicts[1].loud[0] == "vision.space_to_depth"
    result = judges.as_json(verdicts, 0)
    assert (result["total"], result["crashed"], result["loud"]) == (0, 1, 1)
    assert judges.exit_code(verdicts) == 1  # nothing silent ran


def test_a_model_that_differs_already_is_refused(bench: judges.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "EPS", 1e-6)
    with pytest.raises(GoldenError, match=r"small/base in float64 differs at vision\.norm without any fault"):
        _judged([faults.FAULTS["bridge.pad_top_left"]], faults.bench(goldens_dir()))


def test_patches_are_undone(bench: judges.Bench) -> None:
    model = bench.model("small/base", "float64")
    before = fold.pad, vars(unpad.Rows)["indices"], norm.EPS, model.bridge.llm_norm.weight.data_ptr()
    names = ("bridge.pad_top_left", "unpadding.indices_off_by_one", "norms.rms_eps", "norms.llm_norm_one_percent")
    for name in names:
        with planted(faults.FAULTS[name], model):
            pass
    assert (fold.pad, vars(unpad.Rows)["indices"], norm.EPS, model.bridge.llm_norm.weight.data_ptr()) == before
    with planted(faults.FAULTS["bridge.one_token_a_frame"], model):
        assert "forward" in vars(model.bridge.image_projector)
    assert "forward" not in vars(model.bridge.image_projector)


@pytest.mark.parametrize(
    ("site", "target", "at"),
    [
        ("vidi.bridge.norm.", "vidi.bridge.norm.rms", True),
        ("vidi.bridge.norm.rms", "vidi.bridge.norm.rms", True),
        ("vidi.bridge.norm.rms", "vidi.bridge.norm.EPS", False),
        ("vidi.bridge.norm.RMSNorm", "vidi.bridge.norm.rms", False),
        ("vidi.bridge.position.add[h]", "vidi.bridge.position.add[w]", False),
        ("vidi.bridge.position.add[h]", "vidi.bridge.position.add", True),
        ("model.decoder.layers.0.input_norm", "model.decoder.layers.*.input_norm.eps", True),
        ("model.decoder.layers.0.input_norm", "model.decoder.layers.1.input_norm", False),
    ],
)
def test_sites(site: str, target: str, at: bool) -> None:
    own, patched = (part(name[6:]) if name.startswith("model.") else code(name) for name in (site, target))
    assert own.covers(patched, {}) is at


def test_expected_stage_comes_from_the_registry() -> None:
    """In pipeline order, of the case's own ids: a case without pictures sees a shared norm first in audio."""
    rms = faults.FAULTS["norms.rms_eps"]
    assert expected(rms, STAGES, ["vision.pad", "vision.norm", "audio.norm"]) == ("vision.norm", "stage")
    assert expected(rms, STAGES, ["audio.trim", "audio.norm"]) == ("audio.norm", "stage")
    assert expected(rms, STAGES, ["rope.cos"]) is None
    later = faults.FAULTS["attention.window_on_odd_layer"]
    assert expected(later, STAGES, ["layer.0.t2t", "layer.1.t2t"]) == ("layer.1.t2t", "stage")


def test_weakest_by_stage(bench: judges.Bench) -> None:
    chosen = [faults.FAULTS[n] for n in ("norms.rms_eps", "norms.rms_centred", "bridge.pad_replicate")]
    verdicts = _judged(chosen, bench)
    weakest = judges.weakest_by_stage(verdicts)
    assert weakest["vision.norm"][0] == "norms.rms_eps"
    assert weakest["vision.pad"] == ("bridge.pad_replicate", verdicts[2].margin)


def test_precision_switches_are_restored(bench: judges.Bench) -> None:
    _judged([faults.FAULTS["bridge.pad_replicate"]], bench)
    with fingerprint.ieee():
        fingerprint.assert_ieee()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = _arguments("--fault", "bridge.pad_*,dtypes.tf32_on", "--json", str(tmp_path / "faults.json"))
    assert command.run(args) == 0
    result = json.loads((tmp_path / "faults.json").read_text("utf-8"))
    assert (result["total"], result["killed"], result["localised"], result["not_run"]) == (4, 4, 4, 1)
    assert all({"name", "killed", "stage", "expected_stage", "margin"} <= set(fault) for fault in result["faults"])
    shown = capsys.readouterr().out
    assert "NOT RUN: dtypes.tf32_on (it acts on a CUDA device alone)" in shown
    assert "4 of 4 silent faults seen, 4 first at their own stage" in shown


def test_command_lists_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(_arguments("--list", "--fault", "masks.*")) == 0
    assert "masks.all_tokens_kept" in capsys.readouterr().out
    assert main(["faults", "--fault", "nothing"]) == 2
    assert "no fault matches 'nothing'" in capsys.readouterr().err
    assert main(["faults", "--fault", "bridge.pad_*", "--goldens", str(tmp_path)]) == 2
    assert "no goldens in" in capsys.readouterr().err


def _arguments(*given: str) -> Any:
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(given)


def test_a_verdict_counts_only_silent_faults_that_ran() -> None:
    fault = faults.FAULTS["bridge.pad_top_left"]
    seen = judges.Verdict(fault, "float64", True, "vision.pad", "stage", "vision.pad", "stage", 5.0)
    missed = judges.Verdict(fault, "float64", False, None, None, "vision.pad", "stage", 0.5)
    elsewhere = judges.Verdict(fault, "float64", True, "vision.norm", "stage", "vision.pad", "stage", 1.5)
    assert judges.exit_code([seen] * 20) == 0
    assert judges.exit_code([seen] * 20 + [missed]) == 1
    assert judges.exit_code([seen] * 19 + [elsewhere]) == 0  # 95 %
    assert judges.exit_code([seen] * 18 + [elsewhere]) == 1
    assert judges.as_json([seen, elsewhere], 0)["margins_under_2"] == [fault.name]
    assert judges.as_json([seen, elsewhere], 0)["minimum_margin"] == 1.5
