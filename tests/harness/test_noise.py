"""The studies of noise and of alarms: settings that act, and verdicts that can be bad."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stageparity.evidence import Basis
from tools.studies import alarms, baselines, noise, runs
from tools.studies.log import Log
from tools.studies.runs import Setting
from vidi.bridge import fold

GOLDENS = Path(__file__).resolve().parents[2] / "goldens"
NAMES = ["small/base", "small/absent", "small/decode", "small-7b/base", "small-7b/decode"]
NAMES += ["official/batch", "official/single", "official/longvideo", "official-7b/single"]
PLAIN = Setting("float32", ("small/absent",))


@pytest.mark.slow
def test_settings_move_bits_and_none_raises_an_alarm() -> None:
    plain = runs.run(PLAIN, GOLDENS)
    assert plain["rows"]
    assert plain["not_run"] == []
    assert all(row["ok"] for row in plain["rows"])
    assert {row["kind"] for row in plain["rows"]} == {"chained", "isolated"}
    for change in ({"key_order": 3}, {"key_chunk": 7}, {"towers": "eager"}):
        other = runs.run(replace(PLAIN, **change), GOLDENS)
        assert other["bits"] != plain["bits"], change
        assert all(row["ok"] for row in other["rows"])
    assert runs.run(PLAIN, GOLDENS)["bits"] == plain["bits"]


def test_each_sample_alone() -> None:
    found = runs.run(replace(PLAIN, alone=True), GOLDENS)
    assert len({row["stage"] for row in found["rows"]}) > 8
    assert "logits" in {row["stage"] for row in found["rows"]}
    assert all(row["ok"] for row in found["rows"])


def test_a_harmed_model_raises_alarms(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fold.space_to_depth
    monkeypatch.setattr(fold, "space_to_depth", lambda x, pool: plain(x, pool) * 1.001)
    found = runs.run(PLAIN, GOLDENS)
    assert {row["stage"] for row in found["rows"] if not row["ok"]} >= {"vision.space_to_depth", "logits"}


@pytest.mark.slow
def test_limits_reach_a_process_of_its_own() -> None:
    limited = Setting("float64", ("small/oneframe",), threads=2, aten="default", mkl="COMPATIBLE")
    with runs.Server(GOLDENS) as server:
        machine = server.run(limited)["machine"]
        assert machine["cpu_capability"] == "DEFAULT"
        assert machine["threads"] == 2
        assert machine["isa_limits"] == {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
        with pytest.raises(RuntimeError, match="no/case"):
            server.run(replace(limited, cases=("no/case",)))
        assert server.run(replace(limited, threads=1))["machine"]["threads"] == 1


def test_three_hundred_settings_cover_what_they_should() -> None:
    settings = list(alarms.drawn(NAMES))
    assert len(settings) == 300
    assert settings == list(alarms.drawn(NAMES))
    assert len(set(settings)) > 280
    levels = {(s.dtype, s.aten, s.onednn, s.mkl) for s in settings}
    assert len(levels) == 4 * len(alarms.LEVELS)
    for name in NAMES:
        assert sum(name in s.cases for s in settings) >= 3
    assert not any(s.dtype == "float64" and any(c.startswith("official") for c in s.cases) for s in settings)


RUN: dict[str, Any] = {
    "setting": {"dtype": "float32", "cases": ["small/base", "small/train"]}, "comparisons": 3, "alarms": ["x"],
    "not_run": [], "worst": {"b": 0.0}, "bits": {"small/train": "f0"}, "seconds": 1.0, "device": "cpu",
}  # fmt: skip


def _options(tmp_path: Path, count: int) -> Namespace:
    return Namespace(goldens=GOLDENS, count=count, jobs=1, fresh=False, log=tmp_path / "build" / "log.jsonl")


def test_alarms_go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def some(settings: list[Setting], waiting: list[int], goldens: Path, jobs: int) -> Any:
        for i in waiting:
            if len(made) == 2:
                raise RuntimeError("the machine goes down")
            made.append(i)
            yield i, RUN | {"seconds": float(i)}

    monkeypatch.setattr(alarms, "_runs", some)
    with pytest.raises(RuntimeError):
        alarms.measure(_options(tmp_path, 4), None)
    made.clear()
    found = alarms.measure(_options(tmp_path, 4), None)
    assert made == [2, 3]
    assert [run["seconds"] for run in alarms.unpacked(found)] == [0.0, 1.0, 2.0, 3.0]
    made.clear()
    monkeypatch.setattr(alarms, "basis", lambda goldens: Basis({"vidi/model.py": "another"}))
    with pytest.raises(RuntimeError):
        alarms.measure(_options(tmp_path, 4), None)
    assert made == [0, 1], "runs of other code do not count"


def test_a_log_survives_a_line_that_was_cut(tmp_path: Path) -> None:
    path, basis = tmp_path / "log.jsonl", Basis({"a.py": "1"})
    Log(path, basis).add("one", 1)
    path.write_text(path.read_text() + '{"under": "x", "key": "tw')
    log = Log(path, basis)
    assert log.done == {"one": 1}
    log.add("three", 3)
    assert Log(path, basis).done == {"one": 1, "three": 3}
    assert Log(path, Basis({"a.py": "2"})).done == {}
    assert Log(path, basis, fresh=True).done == {}
    assert not path.exists()


def test_an_incomplete_or_alarming_result_is_not_a_good_one() -> None:
    quiet = RUN | {"alarms": []}
    counts = alarms.summary([quiet])
    assert alarms.problems({"summary": counts}, GOLDENS) == ["299 of 300 runs are missing"]
    counts = alarms.summary([quiet] * 299 + [RUN])
    assert alarms.problems({"summary": counts | {"different_results": 101}}, GOLDENS) == [
        "1 of 300 runs raised an alarm"
    ]
    assert alarms.problems({"summary": counts | {"with_alarm": 0}}, GOLDENS) == [
        "settings that move no bit prove nothing"
    ]


def test_runs_come_back_from_their_lists() -> None:
    """Lists under named columns, for room: nothing is lost, and what was not judged is no zero."""
    other = RUN | {"worst": {"a": 0.5}, "alarms": []}
    gates = ["a", "b"]
    document = {
        "gates": gates,
        "fields": list(alarms.FIELDS),
        "runs": [alarms._packed(run, gates) for run in (RUN, other)],
    }
    kept = [{key: run[key] for key in alarms.FIELDS} for run in (RUN, other)]
    assert alarms.unpacked(json.loads(json.dumps(document))) == kept


def _noise(**changed: Any) -> dict[str, Any]:
    own = {
        "max": 9e-7,
        "rms": 4e-7,
        "ratio": 0.4,
        "at": "small/base layer.1.t2v rms",
        "noise": 4e-7,
        "tolerance": 1e-6,
    } | changed
    gate = {"chained": {"layer.{i}.t2{m}": [own[key] for key in noise.COLUMNS]}}
    return {"columns": noise.COLUMNS, "gates": {"bfloat16-cast": gate, "float32-cast": gate}, "blind": {}}


FAULTS: dict[str, Any] = {
    "faults": [
        {"name": "casts", "expected_stage": "layer.2.t2v", "margin": 9.0, "dtype": "float32", "case": "base"},
        {"name": "weak", "expected_stage": "layer.2.t2v", "margin": 900.0, "dtype": "float64", "case": "base"},
        {"name": "strong", "expected_stage": "layer.0.t2v", "margin": 50.0, "dtype": "float32", "case": "base"},
        {"name": "exact", "expected_stage": "vision.mask", "margin": None, "dtype": "float64", "case": "base"},
        {"name": "moved", "expected_stage": "layer.1.t2v", "margin": 70.0, "dtype": "float64", "case": "base"},
        {"name": "crash", "expected_stage": "layer.0.t2v", "margin": 0.1, "dtype": "float32", "crashed": "x"},
    ],
    "dtypes": {
        "bfloat16": {
            "margins": {"weak": 3.0, "exact": None, "moved": 1.5},
            "elsewhere": {"moved": "logits"},
            "invisible": {},
        },
        "float32": {"margins": {"weak": 20.0}, "elsewhere": {}, "invisible": {"moved": 0.5}},
    },
}


def test_overlap_is_said() -> None:
    assert noise.overlaps(_noise(), None) == []
    said = noise.overlaps(_noise(ratio=1.0), None)
    assert (
        said[0] == "bfloat16-cast chained layer.{i}.t2{m}: noise is 1 of the tolerance, at small/base layer.1.t2v rms"
    )
    harmed = json.loads(json.dumps(FAULTS))
    harmed["dtypes"]["bfloat16"]["margins"]["weak"] = 0.9
    assert noise.overlaps(_noise(), noise.weakest(harmed)) == [
        "bfloat16-cast layer.{i}.t2{m}: fault weak reaches 0.9 of the tolerance"
    ]


def test_weakest_faults_of_every_dtype() -> None:
    """Each fault in its own dtype, and those of wrong mathematics in lower ones, at the stage that they are seen at."""
    assert noise.weakest(None) is None
    known = noise.weakest(FAULTS)
    assert known is not None
    template = "layer.{i}.t2{m}"
    assert known["float64-none", template] == (70.0, "moved")
    assert known["float32-cast", template] == (9.0, "casts")
    assert known["bfloat16-cast", template] == (3.0, "weak")
    assert known["bfloat16-cast", "logits"] == (1.5, "moved")
    assert known["bfloat16-cast", "vision.mask"][0] == float("inf")


def test_noise_budget_and_weakest_fault_stand_side_by_side() -> None:
    lines = list(noise.table(_noise(), noise.weakest(FAULTS)))
    assert lines[0] == "\nbfloat16-cast, chained: noise | budget | weakest fault"
    assert lines[1].split(None, 1) == ["layer.{i}.t2{m}", "4.0e-07 | 1.0e-06 | 3x (weak)"]
    assert lines[3].endswith("| 9x (casts)")
    assert all(line.endswith("NOT KNOWN") for line in list(noise.table(_noise(), None))[1::2])


def test_moves_tell_what_grew() -> None:
    (first, second) = noise.moves(_noise(ratio=0.2), _noise())
    assert (
        first == "bfloat16-cast chained: noise at most 0.4 of a budget (layer.{i}.t2{m}; before 0.2; grew most at"
        " layer.{i}.t2{m}, 0.2 -> 0.4)"
    )
    assert second.startswith("float32-cast chained: ")
    (line, _) = noise.moves(None, _noise())
    assert line == "bfloat16-cast chained: noise at most 0.4 of a budget (layer.{i}.t2{m})"


def test_moves_of_baselines_tell_new_gone_and_moved_stages() -> None:
    def document(**stages: list[float]) -> dict[str, Any]:
        return {"columns": ["chained float32"], "errors": {"s/c": {stage: [own] for stage, own in stages.items()}}}

    then = document(a=[1.0, 2.0, 3.0], b=[0.0, 1.0, 1.0], gone=[1.0, 1.0, 1.0])
    assert list(baselines.moves(then, then)) == []
    (line,) = baselines.moves(then, document(a=[1.5, 2.0, 3.0], b=[0.5, 1.0, 1.0], c=[1.0, 1.0, 1.0]))
    assert line.startswith("s/c chained float32: over the stored: rms 1.5 to inf (b), max 1 to 1 (b), row 1 to 1 (b)")
    assert line.endswith("new 1 to 1 (c), gone 1 to 1 (gone)")
