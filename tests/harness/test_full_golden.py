"""The full-size case on a machine that cannot make it: what is stored stays whole, and its tool writes by the rules."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stageparity import ledger, store
from stageparity.golden import Sketched
from stageparity.manifest import content_sha256, set_sha256
from tools import make_full_golden
from vidi.config import VidiConfig
from vidi.parity import full

GOLDENS = Path(__file__).resolve().parents[2] / "goldens"
WHY = "the test's reason"


@pytest.fixture
def goldens(tmp_path: Path) -> Path:
    shutil.copytree(GOLDENS / full.FOLDER, tmp_path / full.FOLDER)
    return tmp_path


def opened(goldens: Path = GOLDENS) -> store.Case:
    return store.open_case(goldens / full.FOLDER, full.CASE)


def test_it_holds_every_layer_of_the_released_size() -> None:
    case = opened()
    assert VidiConfig.from_official(case.config) == VidiConfig.full()
    targets = dict(case.variant(full.VARIANT).items())
    assert {f"layer.{i}.{part}" for i in range(42) for part in ("t2t", "t2v", "t2a", "output")} < set(targets)
    assert sum(isinstance(golden, Sketched) for golden in targets.values()) > 300


def test_writing_it_needs_a_reason_and_no_pytest(goldens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set_sha256(goldens / full.FOLDER)
    given = ["--goldens", str(goldens), "--restate", "0123abc"]
    assert make_full_golden.main([*given, "--accept", "--reason", WHY]) == 2
    assert "not written from within pytest" in capsys.readouterr().err
    assert make_full_golden.main(given) == 0
    assert capsys.readouterr().out == f"frames60/provenance/commit: {opened().provenance['commit']!r} -> '0123abc'\n"
    assert opened(goldens).provenance == opened().provenance
    assert set_sha256(goldens / full.FOLDER) == before
    assert not (goldens / "ledger.toml").exists()


@pytest.mark.slow
def test_it_is_exchanged_whole_and_entered(goldens: Path) -> None:
    case = opened(goldens)
    new = make_full_golden.restated(case, case.provenance["commit"])
    assert make_full_golden.changes(case, new) == []
    own = dict(new.targets[full.VARIANT])
    sketched = own["layer.0.output"]
    assert isinstance(sketched, Sketched)
    own["layer.0.output"] = replace(
        sketched, sketch=replace(sketched.sketch, top_value=np.nextafter(sketched.sketch.top_value, np.inf))
    )
    del own["final.norm"]
    lines = make_full_golden.changes(case, replace(new, targets={full.VARIANT: own}))
    assert lines == ["frames60/self/layer.0.output: another sketch", "frames60/self/final.norm: gone"]
    make_full_golden.write(goldens, replace(new, targets={full.VARIANT: own}), WHY, lines)
    (entry,) = ledger.entries(goldens)
    assert (entry["subject"], entry["why"], entry["changes"]) == ("large/full", WHY, lines)
    assert entry["sha256"] == set_sha256(goldens / full.FOLDER)
    assert "final.norm" not in opened(goldens).variant(full.VARIANT)
    bad = replace(new, provenance={"origin": "self"})
    with pytest.raises(store.GoldenError, match="lacks provenance or has it malformed"):
        make_full_golden.write(goldens, bad, WHY, [])
    assert store.verify(goldens / full.FOLDER)
    assert len(ledger.entries(goldens)) == 1


@pytest.mark.slow
def test_the_generator_still_makes_its_inputs() -> None:
    case = opened()
    arrays = full.inputs(VidiConfig.full(), case.info["num_frames"])
    assert {name: content_sha256(array) for name, array in arrays.items()} == case.info["inputs_sha256"]
