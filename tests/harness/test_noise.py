"""The noise study and the false-alarm runs: settings that act, and verdicts that can be bad."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tools import false_alarms, measure_noise, one_run
from tools.one_run import Setting
from vidi.bridge import fold
from vidi.parity import stages

GOLDENS = Path(__file__).resolve().parents[2] / "goldens"
NAMES = ["small/base", "small/absent", "small/decode", "official/batch", "official/single", "official/longvideo"]
PLAIN = Setting("float32", ("small/absent",))


@pytest.mark.slow
def test_settings_move_bits_and_none_raises_an_alarm() -> None:
    plain = one_run.run(PLAIN, GOLDENS)
    assert plain["rows"]
    assert plain["not_run"] == []
    assert all(row["ok"] for row in plain["rows"])
    assert {row["kind"] for row in plain["rows"]} == {"chained", "isolated"}
    for change in ({"key_order": 3}, {"key_chunk": 7}, {"towers": "eager"}):
        other = one_run.run(replace(PLAIN, **change), GOLDENS)
        assert other["bits"] != plain["bits"], change
        assert all(row["ok"] for row in other["rows"])
    assert one_run.run(PLAIN, GOLDENS)["bits"] == plain["bits"]


def test_each_sample_alone() -> None:
    found = one_run.run(replace(PLAIN, alone=True), GOLDENS)
    assert len({row["stage"] for row in found["rows"]}) > 8
    assert "logits" in {row["stage"] for row in found["rows"]}
    assert all(row["ok"] for row in found["rows"])


def test_a_harmed_model_raises_alarms(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fold.space_to_depth
    monkeypatch.setattr(fold, "space_to_depth", lambda x, pool: plain(x, pool) * 1.001)
    found = one_run.run(PLAIN, GOLDENS)
    assert {row["stage"] for row in found["rows"] if not row["ok"]} >= {"vision.space_to_depth", "logits"}


@pytest.mark.slow
def test_limits_reach_a_process_of_its_own() -> None:
    limited = Setting("float64", ("small/oneframe",), threads=2, aten="default", mkl="COMPATIBLE")
    with one_run.Server(GOLDENS) as server:
        machine = server.run(limited)["machine"]
        assert machine["cpu_capability"] == "DEFAULT"
        assert machine["threads"] == 2
        assert machine["isa_limits"] == {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
        with pytest.raises(RuntimeError, match="no/case"):
            server.run(replace(limited, cases=("no/case",)))
        assert server.run(replace(limited, threads=1))["machine"]["threads"] == 1


def test_three_hundred_settings_cover_what_they_should() -> None:
    settings = list(false_alarms.drawn(NAMES))
    assert len(settings) == 300
    assert settings == list(false_alarms.drawn(NAMES))
    assert len(set(settings)) > 280
    levels = {(s.dtype, s.aten, s.onednn, s.mkl) for s in settings}
    assert len(levels) == 4 * len(false_alarms.LEVELS)
    for name in NAMES:
        assert sum(name in s.cases for s in settings) >= 3
    assert not any(s.dtype == "float64" and any(c.startswith("official/") for c in s.cases) for s in settings)


def test_an_incomplete_result_is_not_a_good_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("tolerances.toml", "baselines.json"):
        (tmp_path / name).write_bytes((GOLDENS / name).read_bytes())
    (tmp_path / "small").symlink_to(GOLDENS / "small")
    (tmp_path / "official").symlink_to(GOLDENS / "official")
    assert false_alarms.main(["--goldens", str(tmp_path)]) == 1
    assert "NOT RUN: 300 of 300 runs are missing" in capsys.readouterr().out


def test_stored_figures_come_back(tmp_path: Path) -> None:
    """Lists under named columns, for room: nothing is lost, and what was not judged is no zero."""
    path = tmp_path / "noise.json"
    figures = dict(zip(measure_noise.COLUMNS, (1e-6, 2e-7, 0.4, "small/base logits rms", 2e-7, 5e-7), strict=True))
    noise = {"unit": "u", "gates": {"float32-official": {"chained": {"logits": figures, "final.norm": figures}}}}
    path.write_text(measure_noise._rendered(noise))
    assert measure_noise.read(path)["gates"] == noise["gates"]
    run = {
        "under": "0", "setting": {"dtype": "float32", "cases": ["small/base", "small/train"]}, "comparisons": 3,
        "alarms": ["x"], "not_run": [], "worst": {"b": 0.0}, "bits": {"small/train": "f0"}, "seconds": 1.0,
    }  # fmt: skip
    other = run | {"worst": {"a": 0.5}, "alarms": []}
    false_alarms._store([run, None, other], {"machine": {}, "code": {"vidi/model.py": "0"}}, path)
    stored = false_alarms.read(path)
    assert stored["runs"] == [run, None, other]
    assert stored["code"] == {"vidi/model.py": "0"}
    assert stored["summary"] == false_alarms.summary([run, other])


NOISE = {
    "gates": {
        "float32-official": {
            "chained": {
                "layer.{i}.t2v": {"ratio": 0.4, "noise": 4e-7, "tolerance": 1e-6, "at": "small/base layer.1.t2v rms"}
            }
        }
    },
    "blind": {},
}


def test_overlap_is_said(tmp_path: Path) -> None:
    assert measure_noise.overlaps(NOISE, None) == []
    loud = json.loads(json.dumps(NOISE))
    loud["gates"]["float32-official"]["chained"]["layer.{i}.t2v"]["ratio"] = 1.0
    assert measure_noise.overlaps(loud, None) == [
        "float32-official chained layer.{i}.t2v: noise is 1 of the tolerance, at small/base layer.1.t2v rms"
    ]
    faults = [
        {"name": "weak", "expected_stage": "layer.2.t2v", "margin": 0.9, "dtype": "float32", "case": "base"},
        {"name": "strong", "expected_stage": "layer.0.t2v", "margin": 50.0, "dtype": "float32", "case": "base"},
        {"name": "exact", "expected_stage": "vision.mask", "margin": None, "dtype": "float64", "case": "base"},
        {"name": "crash", "expected_stage": "layer.0.t2v", "margin": 0.1, "dtype": "float32", "crashed": "x"},
    ]
    assert measure_noise.faults_of(tmp_path) is None
    (tmp_path / "faults.json").write_text(json.dumps({"faults": faults}))
    known = measure_noise.faults_of(tmp_path)
    assert known is not None
    assert known["float32-official", "layer.{i}.t2{m}"] == (0.9, "weak")
    said = measure_noise.overlaps(NOISE, known)
    assert said == ["float32-official layer.{i}.t2{m}: fault weak reaches 0.9 of the tolerance"]
    assert any("NOT KNOWN" in line for line in measure_noise.table(NOISE, None))


def test_templates() -> None:
    assert stages.template_of("layer.12.t2v") == "layer.{i}.t2{m}"
    assert stages.template_of("layer.3.input") == "layer.{i}.input"
    assert stages.template_of("vision.pos_t.embed.1") == "vision.pos_t.embed.{b}"
