"""Do the known faults cover every stage, are their brackets kept, and is their stored result today's?"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stageparity import fingerprint
from stageparity.faults import judge as judges
from stageparity.faults import plant, stored
from stageparity.faults.plant import Fault
from tools.studies import LEDGER
from tools.studies import faults as study
from tools.studies import noise as noises
from vidi.commands import faults as command
from vidi.parity import faults
from vidi.parity.faults import again
from vidi.parity.goldens import goldens_dir
from vidi.parity.stages import STAGES

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDENS = goldens_dir()
WITHOUT = {
    "layer.{i}.t2{m}.gate": "told from the mask beside the layer; nothing reads it, so no code of it can be wrong",
    "layer.{i}.input": "the output of the layer before; nothing computes it",
    "{n}.nocache.logits": "whole passes over a longer text, whose stages are judged one by one",
    "{n}.prompt_ids": "an input",
    "grad.{n}": "differentiated, not computed",
    "xattn.{i}.{m}.q_mask": "told from the text mask after the run; what attention received shows in out",
    "xattn.{i}.{m}.kv_mask": "told from the stream's mask after the run; what attention received shows in out",
}

OWN_7B = (
    "vision.conv",
    "vision.pool",
    "lm_head",
    "loss.kept",
    "loss.labels",
    "loss.logits",
    "{n}.greedy_nocache.tokens",
)


@pytest.fixture(scope="module")
def bench() -> judges.Bench:
    return faults.bench(GOLDENS)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    found = stored.read(GOLDENS)
    assert found is not None, "python tools/study.py faults --accept"
    return found


def _ids(fault: Fault, bench: judges.Bench) -> list[str]:
    with fingerprint.ieee():
        return [row.stage for row in bench.clean(fault.place, fault.dtype, fault.setting).rows]


@pytest.mark.slow
def test_every_stage_has_a_fault_that_must_be_reported_there(bench: judges.Bench) -> None:
    planted = [fault for fault in (faults.FAULTS | faults.FAULTS_7B).values() if not fault.needs]
    first = {plant.expected(fault, STAGES, _ids(fault, bench)) for fault in planted}
    assert None not in first
    covered = {STAGES.template_of(found[0]) for found in first if found}
    assert {stage.name for stage in STAGES} - covered == set(WITHOUT)


@pytest.mark.slow
def test_faults_of_the_7b(bench: judges.Bench) -> None:
    """All seen, first at their own stage and as what they are; those measured on the release are among them."""
    known = set(faults.MEASURED_7B.values()) - {None}
    assert len(faults.MEASURED_7B) == 36
    assert known <= set(faults.FAULTS_7B)
    assert len(faults.FAULTS_7B) >= 100
    assert all(fault.what.endswith(".") for fault in faults.FAULTS_7B.values())
    verdicts = judges.judge_all(list(faults.FAULTS_7B.values()), bench)
    assert [v.fault.name for v in verdicts if not v.silent or not v.killed] == []
    wrong = [v.fault.name for v in verdicts if not v.localised]
    assert len(wrong) <= (1 - judges.LOCALISED) * len(verdicts), wrong


def test_what_is_left_out_of_the_7b_stands_in_the_9b() -> None:
    """A renamed fault must not leave its exception behind."""
    for globs in again.LEFT_OUT.values():
        for glob in globs:
            assert any(fnmatch.fnmatchcase(name, glob) for name in faults.FAULTS), glob


def test_other_uses_are_those_that_the_brackets_leave_out() -> None:
    ids = ["vision.pos_h", "vision.pos_w", "audio.pos_t", "logits"]
    height = Fault("t.h", "H.", ("vidi.bridge.position.add[h]",), lambda original: original)
    assert plant.other_uses(height, STAGES, ids) == ["vision.pos_w", "audio.pos_t"]
    everywhere = Fault("t.all", "A.", ("vidi.bridge.position.add",), lambda original: original)
    assert plant.other_uses(everywhere, STAGES, ids) == []


@pytest.mark.parametrize("leak", [0.0, 1e-13])
def test_brackets_limit_a_fault(leak: float, bench: judges.Bench) -> None:
    """What the tolerances forgive (1e-13 of a value) a bracket does not."""

    def make(original: Any) -> Any:
        def add(x: Any, embed: Any) -> Any:
            return x if embed.ndim == 4 and embed.shape[1] > 1 else original(x, embed) * (1 + leak)

        return add

    fault = Fault("t.height_dropped", "H.", ("vidi.bridge.position.add[h]",), make)
    (verdict,) = judges.judge_all([fault], bench)
    assert (verdict.stage, verdict.killed) == ("vision.pos_h", True)
    assert verdict.localised is not bool(leak)
    assert set(verdict.strays) == ({"vision.pos_w", "vision.pos_t", "audio.pos_t"} if leak else set())


def test_rows_that_end_elsewhere_are_no_tie(bench: judges.Bench) -> None:
    """The same tokens, another length: two equal logits would excuse other tokens, not this."""
    (verdict,) = judges.judge_all([faults.FAULTS["decoding.padding_counts_as_answer"]], bench)
    assert verdict.stage == "decode.lengths"


def test_stored_result(document: dict[str, Any]) -> None:
    verdicts = {fault["name"]: fault for fault in document["faults"]}
    assert list(verdicts) == list(faults.FAULTS)
    ran = [fault for fault in verdicts.values() if not fault.get("not_run")]
    assert document["total"] == len(ran) >= 100
    assert document["killed"] == sum(fault["killed"] for fault in ran) == len(ran)
    localised = sum(fault["stage"] == fault["expected_stage"] and not fault.get("strays") for fault in ran)
    assert document["localised"] == localised >= judges.LOCALISED * len(ran)
    assert {name for name in verdicts if verdicts[name].get("not_run")} == {
        fault.name for fault in faults.FAULTS.values() if fault.needs
    }
    assert document["crashed"] == document["loud"] == 0


@pytest.mark.parametrize("dtype", stored.LOWER)
def test_stored_result_in_lower_precision(dtype: str, document: dict[str, Any]) -> None:
    """Every fault of wrong mathematics is seen there, or named as below the noise; no more than a tenth are."""
    own = document["dtypes"][dtype]
    value = {fault.name for fault in faults.FAULTS.values() if fault.dtype == "float64"}
    assert set(own["margins"]) | set(own["invisible"]) == value
    assert own["killed"] == len(own["margins"])
    assert own["localised"] >= judges.LOCALISED * own["killed"]
    assert all(margin is None or margin > 1 for margin in own["margins"].values())
    assert all(margin <= 1 for margin in own["invisible"].values())
    assert len(own["invisible"]) <= (0 if dtype == "float32" else len(value) / 10)


def test_no_tolerance_reaches_the_weakest_fault(document: dict[str, Any]) -> None:
    weakest = noises.weakest(document)
    assert weakest is not None
    assert len({template for _, template in weakest}) >= len(STAGES) - len(WITHOUT) - len(OWN_7B) - 1
    stored_noise = json.loads((GOLDENS / LEDGER["noise"]).read_text())
    assert noises.overlaps(stored_noise, weakest) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_weakest_fault_of_a_stage_is_known_in_every_dtype(dtype: str, document: dict[str, Any]) -> None:
    """Beside noise and budget of a stage stands a fault of wrong mathematics, not only of that dtype's casts."""
    weakest = noises.weakest(document)
    assert weakest is not None
    of = {fault["name"]: fault for fault in document["faults"]}
    gate = {template: margin for (name, template), margin in weakest.items() if name == f"{dtype}-cast"}
    home = {STAGES.template_of(of[name]["expected_stage"]) for name in document["dtypes"][dtype]["margins"]}
    assert home <= set(gate)
    assert all(margin > 1 for margin, _ in gate.values())


def test_faults_may_leave_the_noise_and_not_enter_it() -> None:
    def holding(seen: list[str], unseen: list[str]) -> dict[str, Any]:
        return {"dtypes": {"bfloat16": {"margins": dict.fromkeys(seen, 2.0), "invisible": dict.fromkeys(unseen, 0.5)}}}

    old = holding(["a", "b"], ["c"])
    assert study.grown(old, holding(["a", "b", "c"], ["new"])) == []
    assert study.grown(old, holding(["a"], ["b", "c"])) == ["bfloat16 b"]
    assert study.grown(old, holding(["a"], ["b", "c"]), ["bfloat16 b"]) == []
    assert study.grown(None, holding([], ["a"])) == []


def _run(*given: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(given))


@pytest.mark.slow
def test_command_excuses_what_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ("--fault", "norms.rms_eps,bridge.pad_replicate", "--dtype", "bfloat16")
    assert _run(*chosen) == 0
    assert "below the noise: norms.rms_eps (0." in capsys.readouterr().out
    shutil.copytree(GOLDENS, tmp_path / "goldens", ignore=shutil.ignore_patterns("__pycache__", "faults.json"))
    assert _run(*chosen, "--goldens", str(tmp_path / "goldens")) == 1
    assert "not seen: norms.rms_eps" in capsys.readouterr().out


def test_an_invisible_fault_is_excused_by_name_alone() -> None:
    fault = faults.FAULTS["norms.rms_eps"]
    seen = judges.Verdict(fault, "bfloat16", True, "vision.norm", "stage", "vision.norm", "stage", 5.0)
    missed = judges.Verdict(fault, "bfloat16", False, None, None, "vision.norm", "stage", 0.5)
    assert judges.exit_code([seen, missed], ["norms.rms_eps"]) == 0
    assert judges.exit_code([seen, missed], ["another"]) == judges.exit_code([seen, missed]) == 1


def test_goldens_stay_small() -> None:
    assert (GOLDENS / LEDGER["faults"]).stat().st_size < 120_000
    sizes = {path.relative_to(GOLDENS): path.stat().st_size for path in GOLDENS.rglob("*") if path.is_file()}
    own_7b = sum(size for path, size in sizes.items() if path.parts[0].endswith("-7b"))
    assert sum(sizes.values()) - own_7b < 32_000_000
    assert own_7b < 12_000_000
