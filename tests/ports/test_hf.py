"""A port made of transformers' modules, held against the goldens by the port doctor: as it is, and with faults."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.ports.doctor import examine, recognised
from tests.ports.faults_hf import FAULTS
from tests.ports.planted import Planted

PORT, PYTHON = Path(__file__).parent / "hf_port", Path(sys.executable)
CASES = ("official/single", "official/batch", "official/silent", "small/base", "small/absent", "small/holes", "small/budget")
pytestmark = pytest.mark.slow


def test_every_stage_that_it_has_is_equal(tmp_path: Path) -> None:
    """All but the unpadded tensors of varlen kernels, which it does not use."""
    required = "80%,padding,resize,silent modality,window,several videos"
    seen = examine(PORT, tmp_path / "port", PYTHON, CASES, "--require", required)
    assert seen.status == 0
    lacking = [gap["stage"] for case in seen.report["cases"] for gap in case["not_run"]]
    assert lacking
    assert all(".unpad." in stage for stage in lacking)


def test_a_recording_is_covered_whole_by_forty_lines(tmp_path: Path) -> None:
    assert examine(PORT, tmp_path / "port", PYTHON, ["official/single"], "--require", "all").status == 0
    lines = [line for line in (PORT / "adapter.py").read_text("utf-8").splitlines() if line.strip()]
    assert len(lines) <= 40


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_named_and_recognised_where_it_is_known(fault: Planted, tmp_path: Path) -> None:
    seen = examine(PORT, tmp_path / "port", PYTHON, [fault.case], fault=fault)
    assert seen.guilty == dict(fault.guilty)
    assert seen.kinds <= {*fault.guilty.values(), "inherited", "chained"}
    assert seen.status == (2 if set(fault.guilty.values()) == {"tracing"} else 1)
    named = recognised(seen.folder / "trace" / fault.case.replace("/", "-"))
    assert named >= fault.known
    assert bool(named) == bool(fault.known)
