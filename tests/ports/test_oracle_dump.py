"""The oracle's tensors as files, judged without adapter or tracer: as they are, and with faults in a copy of its source."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.limited import ROOT
from tests.ports import faults_hf
from tests.ports.doctor import Examined, recognised
from tests.ports.faults_numpy import FAULTS, MISSED
from tests.ports.planted import Planted
from vidi import cli
from vidi.parity.faults import FAULTS as KNOWN

#: faults of which one is run at every run of the tests: of the bridge, of the decoder, of the dump
SHORT = {"pad_top_left", "window_one_short", "keys_not_repeated"}


def dump(at: Path, case: str, fault: Planted | None = None) -> Path:
    """What the program wrote of a case, with a fault in its copy of the oracle."""
    shutil.copytree(ROOT / "goldens/oracle", at / "goldens/oracle", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(__file__).with_name("oracle_dump.py"), at)
    if fault is not None:
        fault.plant(at)
    path = os.pathsep.join((str(at), str(ROOT)))
    command = [sys.executable, str(at / "oracle_dump.py"), case, str(at / "dump")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, cwd=at)
    return at / "dump"


def judged(folder: Path, *more: str) -> Examined:
    report = folder.parent / "report.json"
    status = cli.main(["parity", "--candidate", str(folder), "--quiet", "--json", str(report), *more])
    return Examined(status, json.loads(report.read_text()) if report.exists() else {}, folder)


@pytest.mark.parametrize("case", ["official/single", "small/base"])
def test_every_stage_is_there_and_equal(case: str, tmp_path: Path) -> None:
    assert judged(dump(tmp_path, case), "--require", "all").status == 0


@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, id=f.name, marks=() if f.name in SHORT else pytest.mark.slow) for f in FAULTS],
)
def test_a_fault_is_named_and_recognised_where_it_is_known(fault: Planted, tmp_path: Path) -> None:
    seen = judged(dump(tmp_path, fault.case, fault))
    assert seen.guilty == dict(fault.guilty)
    assert seen.kinds <= {*fault.guilty.values(), "inherited", "chained"}
    assert seen.status == (2 if set(fault.guilty.values()) == {"tracing"} else 1)
    named = recognised(seen.folder)
    assert (named >= fault.known) == (fault.name not in MISSED)
    assert bool(named) == bool(fault.known)


def test_at_least_nine_in_ten_known_faults_are_recognised() -> None:
    """Of all ports that are made of torch or NumPy here; each is held to it above."""
    known = [fault.name for fault in (*FAULTS, *faults_hf.FAULTS) if fault.known]
    assert len(MISSED & set(known)) <= 0.1 * len(known)
    assert {name for fault in (*FAULTS, *faults_hf.FAULTS) for name in fault.known} <= set(KNOWN)


def test_a_dump_of_another_golden_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = dump(tmp_path, "small/base")
    said = (folder / "candidate.toml").read_text()
    (folder / "candidate.toml").write_text(said.replace("small/base", "small/holes"))
    assert judged(folder).status == 2
    assert "another golden of small/holes" in capsys.readouterr().err
